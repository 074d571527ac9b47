"""The gradients of vector quantization with respect to x.

========================  ===========  ===============================================  ======
kernel                    grid         reads                                            writes
========================  ===========  ===============================================  ======
codebook_backward_kernel  (programs,)  x, codebook, indices, grad_quantized, grad_loss  grad_x
========================  ===========  ===============================================  ======
"""

import triton
import triton.language as tl

from fastvae.kernels._codebook_pack import load_tile
from fastvae.ops._results import REDUCTIONS

NONE, SAMPLE = tl.constexpr(REDUCTIONS["none"]), tl.constexpr(REDUCTIONS["sample"])
# The smallest normal float32. Norms are at least this before they are divided by.
TINY = tl.constexpr(2.0**-126)
# A sum of two unit vectors up to this length is what their rounding leaves where they are opposite: 16 units in the last place.
ROUNDING = tl.constexpr(2.0**-19)


@triton.jit
def loss_gradient(grad_loss, flat, at, mask, rows_per_sample, REDUCTION: tl.constexpr):
    """grad_loss of the elements of a block of rows: per element, per sample or for all, by REDUCTION."""
    if REDUCTION == NONE:
        return tl.load(grad_loss + at, mask=mask, other=0.0).to(tl.float32)
    elif REDUCTION == SAMPLE:
        sample = flat // rows_per_sample
        return tl.load(grad_loss + sample[:, None], mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(grad_loss).to(tl.float32)


@triton.jit
def load_norms(x, codebook, row, code, x_stride, code_stride, inside, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """|x|, at least TINY, and |c| of each row and its code."""
    x_square, code_square = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < dim)[None, :]
        values, codes = load_tile(x, row, x_stride, column, mask), load_tile(codebook, code, code_stride, column, mask)
        x_square += tl.sum(values * values, axis=1)
        code_square += tl.sum(codes * codes, axis=1)
    return tl.maximum(tl.sqrt(x_square), TINY), tl.sqrt(code_square)


@triton.jit
def rotation_of(
    grad, x, codebook, row, code, grad_stride, x_stride, code_stride, inside, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Per-row coefficients (scale, of_x, of_code) of grad_x = scale * (grad_quantized + of_x * x + of_code * c), the gradient through the
    rotation and scaling that take x to its code c, see CodebookRotation in csrc/common/codebook_formulas.h."""
    x_norm, code_norm = load_norms(x, codebook, row, code, x_stride, code_stride, inside, dim, ROWS, COLUMNS)
    x_factor, code_factor = 1.0 / x_norm, 1.0 / tl.maximum(code_norm, TINY)
    square, h_dot_grad, code_dot_grad = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < dim)[None, :]
        x_unit = load_tile(x, row, x_stride, column, mask) * x_factor[:, None]
        code_unit = load_tile(codebook, code, code_stride, column, mask) * code_factor[:, None]
        gradient = load_tile(grad, row, grad_stride, column, mask)
        h = x_unit + code_unit
        square += tl.sum(h * h, axis=1)
        h_dot_grad += tl.sum(h * gradient, axis=1)
        code_dot_grad += tl.sum(code_unit * gradient, axis=1)
    h_norm = tl.maximum(tl.sqrt(square), TINY)
    grad_on_h = tl.where(h_norm <= ROUNDING, 0.0, 2.0 * (h_dot_grad / h_norm) / h_norm)
    scale = code_norm / x_norm
    return scale, x_factor * (2.0 * code_dot_grad - grad_on_h), code_factor * -grad_on_h


@triton.jit(do_not_specialize=["rows"])
def codebook_backward_kernel(
    grad_quantized, grad_loss, x, codebook, indices, grad_x, grad_head_stride, grad_stride, x_head_stride, x_stride,
    code_head_stride, code_stride, heads, rows, dim, rows_per_sample, factor,
    REDUCTION: tl.constexpr, ROTATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes grad_x: grad_quantized, straight through or with ROTATION through the rotation trick, plus ``factor`` * grad_loss * (x - c).
    Grid: (programs,), which take blocks of rows in turn.

    Pointers: grad_quantized (heads, rows, dim) or None; grad_loss, one value for each element, each sample of ``rows_per_sample`` rows, or
    for all, by REDUCTION, or None; grad_x (heads, rows, dim).
    """
    blocks = tl.cdiv(rows, ROWS)
    for block in range(tl.program_id(0), heads * blocks, tl.num_programs(0)):
        head = (block // blocks).to(tl.int64)
        row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat, inside = head * rows + row, row < rows
        code = tl.load(indices + flat, mask=inside, other=0)
        head_x, head_codes = x + head * x_head_stride, codebook + head * code_head_stride
        if ROTATION:
            scale, of_x, of_code = rotation_of(
                grad_quantized + head * grad_head_stride, head_x, head_codes, row, code, grad_stride, x_stride, code_stride, inside, dim,
                ROWS, COLUMNS,
            )  # fmt: skip
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < dim)[None, :]
            at = flat[:, None] * dim + column[None, :]
            gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
            values = load_tile(head_x, row, x_stride, column, mask)
            codes = load_tile(head_codes, code, code_stride, column, mask)
            if grad_quantized is not None:
                gradient = load_tile(grad_quantized + head * grad_head_stride, row, grad_stride, column, mask)
            if ROTATION:
                gradient = scale[:, None] * (gradient + of_x[:, None] * values + of_code[:, None] * codes)
            if grad_loss is not None:
                weights = loss_gradient(grad_loss, flat, at, mask, rows_per_sample, REDUCTION)
                gradient += factor * weights * (values - codes)
            tl.store(grad_x + at, gradient, mask=mask)
