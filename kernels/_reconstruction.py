"""Device functions of the reconstruction kernels: the formulas of the losses, and loads of their operands.

Each formula returns the loss of an element and its gradients with respect to input, target and log variance.
"""

import triton
import triton.language as tl

from fastvae.kernels._index import divide
from fastvae.kernels._math import log1p_unit
from fastvae.ops.reconstruction import LIKELIHOODS

BCE_WITH_LOGITS, BCE = tl.constexpr(LIKELIHOODS["bce_with_logits"]), tl.constexpr(LIKELIHOODS["bce"])
MSE = tl.constexpr(LIKELIHOODS["mse"])


@triton.jit
def bce_with_logits(x, t):
    """(1 - t) x + softplus(-x)."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    sigmoid = tl.where(x < 0, e * r, r)
    hinge = tl.where(-x > 0, -x, 0.0)
    return tl.fma(1.0 - t, x, hinge + log1p_unit(e)), sigmoid - t, -x, 0.0


@triton.jit
def weighted_bce_with_logits(x, t, pos_weight):
    """(1 - t) x + (1 + (pos_weight - 1) t) softplus(-x)."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    # complement is sigmoid(-x), softplus is softplus(-x).
    complement = tl.where(x < 0, r, e * r)
    softplus = tl.where(-x > 0, -x, 0.0) + log1p_unit(e)
    excess = pos_weight - 1.0
    factor = 1.0 + excess * t
    return (1.0 - t) * x + factor * softplus, (1.0 - t) - factor * complement, excess * softplus - x, 0.0


@triton.jit
def floor_log(value):
    return tl.where(value < -100.0, -100.0, value)


@triton.jit
def bce(x, t):
    """-t log(x) - (1 - t) log(1 - x), with torch's floors: -100 for the logarithms, 1e-12 for the denominator of the gradient."""
    complement = 1.0 - x
    product = complement * x
    floored = tl.where(product < 1e-12, 1e-12, product)
    # The first-order term of the rounding error of 1 - x corrects its logarithm.
    lost = (1.0 - complement) - x
    log_one, log_zero = floor_log(tl.log(x)), floor_log(tl.log(complement) + lost)
    return -(t * log_one + (1.0 - t) * log_zero), (x - t) / floored, log_zero - log_one, 0.0


@triton.jit
def squared_error(x, t):
    """(x - t)^2."""
    difference = x - t
    return difference * difference, 2.0 * difference, -2.0 * difference, 0.0


@triton.jit
def gaussian(x, t, logvar):
    """(log(2 pi) + logvar + (x - t)^2 / e^logvar) / 2."""
    difference = x - t
    scaled = difference * tl.exp(-logvar)
    square = difference * scaled
    return 0.5 * (1.8378770664093453 + logvar + square), scaled, -scaled, 0.5 * (1.0 - square)


@triton.jit
def loss_terms(x, t, weight, pos_weight, logvar, LIKELIHOOD: tl.constexpr):
    """The loss of each element and its gradients with respect to input, target and logvar, times the weight. The compiler drops those that
    the kernel does not use."""
    if LIKELIHOOD == BCE_WITH_LOGITS:
        terms = bce_with_logits(x, t) if pos_weight is None else weighted_bce_with_logits(x, t, pos_weight)
    elif LIKELIHOOD == BCE:
        terms = bce(x, t)
    elif LIKELIHOOD == MSE:
        terms = squared_error(x, t)
    else:
        terms = gaussian(x, t, logvar)
    if weight is None:
        return terms
    else:
        return terms[0] * weight, terms[1] * weight, terms[2] * weight, terms[3] * weight


@triton.jit
def load_target(pointers, mask):
    """The target in float32; a uint8 pixel stands for a value in [0, 1]."""
    values = tl.load(pointers, mask=mask)
    if values.dtype == tl.uint8:
        return values.to(tl.float32) * (1.0 / 255.0)
    else:
        return values.to(tl.float32)


@triton.jit
def load_shared(operand, start, offset, mask, BOUND: tl.constexpr):
    """The values of a broadcast operand for the elements ``start + offset`` in float32; None where there is no operand."""
    pointer, inner, period = operand
    if pointer is not None:
        if inner is None:
            return tl.load(pointer + start + offset, mask=mask).to(tl.float32)
        elif period is None:
            return tl.load(pointer).to(tl.float32)
        else:
            first, added, _ = divide(start, offset, inner, BOUND)
            _, _, index = divide(first, added, period, BOUND)
            return tl.load(pointer + index, mask=mask).to(tl.float32)


@triton.jit
def load_terms(operands, start, offset, mask, LIKELIHOOD: tl.constexpr, BOUND: tl.constexpr):
    """:func:`loss_terms` of the elements ``start + offset``."""
    input, target, weight, pos_weight, logvar = operands
    x, t = tl.load(input + start + offset, mask=mask).to(tl.float32), load_target(target + start + offset, mask)
    w = load_shared(weight, start, offset, mask, BOUND)
    p = load_shared(pos_weight, start, offset, mask, BOUND)
    v = load_shared(logvar, start, offset, mask, BOUND)
    return loss_terms(x, t, w, p, v, LIKELIHOOD)
