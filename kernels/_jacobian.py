"""Device functions of the Jacobian kernels: the derivatives of activations, and loads of blocks of a matrix."""

import triton
import triton.language as tl

from fastvae.kernels._index import NONE, SAMPLE
from fastvae.kernels._math import expm1, logistic, standard_normal
from fastvae.ops.jacobian import ACTIVATIONS

SIGMOID, TANH = tl.constexpr(ACTIVATIONS["sigmoid"].number), tl.constexpr(ACTIVATIONS["tanh"].number)
RELU, LEAKY_RELU = tl.constexpr(ACTIVATIONS["relu"].number), tl.constexpr(ACTIVATIONS["leaky_relu"].number)
ELU, SOFTPLUS = tl.constexpr(ACTIVATIONS["elu"].number), tl.constexpr(ACTIVATIONS["softplus"].number)
SILU, GELU = tl.constexpr(ACTIVATIONS["silu"].number), tl.constexpr(ACTIVATIONS["gelu"].number)
GELU_TANH = tl.constexpr(ACTIVATIONS["gelu_tanh"].number)


@triton.jit
def unless_nan(value, h):
    """``value``, but NaN where ``h`` is NaN."""
    return tl.where(h == h, value, h)


@triton.jit
def gelu_tanh(h):
    """:func:`derivatives` of h * (1 + tanh(g)) / 2 with g = sqrt(2 / pi) * (h + 0.044715 h^3)."""
    # (1 + tanh(g)) / 2 is the logistic function of 2 g.
    square = h * h
    sigma, complement = logistic(1.59576912 * h * tl.fma(square, 0.044715, 1.0))
    inner, curvature = 0.797884561 * tl.fma(square, 0.134145, 1.0), 0.214064466 * h
    half_slope, tanh = 2.0 * sigma * complement, sigma - complement
    change = half_slope * tl.fma(h, tl.fma(-2.0 * tanh, inner * inner, curvature), 2.0 * inner)
    return tl.fma(h * half_slope, inner, sigma), change


@triton.jit
def derivatives(h, alpha, ACTIVATION: tl.constexpr):
    """phi' and its derivative with respect to the hidden value h.

    h is the output of the activation, or for SiLU and both GELUs, whose output does not determine the derivative, its input.
    """
    if ACTIVATION == SIGMOID:
        return h * (1.0 - h), tl.fma(h, -2.0, 1.0)
    elif ACTIVATION == TANH:
        return tl.fma(-h, h, 1.0), -2.0 * h
    elif ACTIVATION == RELU:
        return unless_nan(tl.where(h <= 0, 0.0, 1.0), h), unless_nan(0.0, h)
    elif ACTIVATION == LEAKY_RELU:
        return unless_nan(tl.where(h <= 0, alpha, 1.0), h), unless_nan(0.0, h)
    elif ACTIVATION == ELU:
        return tl.where(h <= 0, h + alpha, unless_nan(1.0, h)), unless_nan(tl.where(h <= 0, 1.0, 0.0), h)
    elif ACTIVATION == SOFTPLUS:
        slope = -expm1(-alpha * h)
        return slope, alpha * (1.0 - slope)
    elif ACTIVATION == SILU:
        sigma, complement = logistic(h)
        product = sigma * complement
        return tl.fma(h, product, sigma), product * tl.fma(h, tl.fma(sigma, -2.0, 1.0), 2.0)
    elif ACTIVATION == GELU:
        density, distribution = standard_normal(h)
        return tl.fma(h, density, distribution), density * tl.fma(-h, h, 2.0)
    elif ACTIVATION == GELU_TANH:
        return gelu_tanh(h)
    else:
        return unless_nan(1.0, h), unless_nan(0.0, h)


@triton.jit
def block_indices(program, BLOCK: tl.constexpr):
    """The int64 indices of the rows or columns of block number ``program``."""
    return tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def block_mask(row, rows, column, columns):
    """The mask of the elements of a block that exist."""
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def load_block(pointer, row, column, stride, mask):
    """A block of a matrix in float32, 0 where there are no elements."""
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def grad_output_of(grad_output, row, column, stride, rows, mask, REDUCTION: tl.constexpr):
    """grad_output for this block: of each element, of each sample, or 1 where it is a scalar, which :func:`scaled_by` applies."""
    if REDUCTION == NONE:
        return load_block(grad_output, row, column, stride, mask)
    elif REDUCTION == SAMPLE:
        return tl.load(grad_output + row * stride, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    else:
        return 1.0


@triton.jit
def scaled_by(factor, gradient):
    """``factor`` times ``gradient``, a pointer to a scalar; ``factor`` alone where that is None."""
    if gradient is None:
        return factor
    else:
        return tl.load(gradient).to(tl.float32) * factor
