"""Index arithmetic: which elements a program takes, and where they lie. Offsets are 64 bits wide, but for those within a block."""

import triton
import triton.language as tl

from fastvae._ops import REDUCTIONS

NONE, SAMPLE = tl.constexpr(REDUCTIONS["none"]), tl.constexpr(REDUCTIONS["sample"])


@triton.jit
def first_chunk(full, program, programs):
    """Programs take the ``full`` blocks in turn, then the chunks of what is left: the first chunk of this one."""
    return (program - full % programs + programs) % programs


@triton.jit
def inside(offset, remaining, MASKED: tl.constexpr):
    """The mask of the elements that there are; None, which makes accesses wider, where all are."""
    if MASKED:
        return offset < remaining


@triton.jit
def zero_outside(values, mask):
    """``values``, and 0 where there are no elements."""
    if mask is None:
        return values
    else:
        return tl.where(mask, values, 0.0)


@triton.jit
def divide(start, offset, divisor, BOUND: tl.constexpr):
    """``start + offset`` divided by ``divisor``: the quotient of ``start``, what ``offset`` adds to it, and the remainder.

    ``start`` is an int64 scalar, ``offset`` a block of numbers in [0, BOUND): one 64-bit division for all of them. A divisor above them
    all is passed at most once, so that a comparison divides; elsewhere 32 bits do.
    """
    first = start // divisor
    local = (start - first * divisor) + offset
    if divisor >= BOUND:
        added = (local >= divisor).to(tl.int32)
        remainder = tl.where(local >= divisor, local - divisor, local)
    else:
        small, small_divisor = local.to(tl.int32), tl.cast(divisor, tl.int32)
        added = small // small_divisor
        remainder = (small - added * small_divisor).to(tl.int64)
    return first, added, remainder


@triton.jit
def locate(start, offset, inner, BOUND: tl.constexpr):
    """The row and the column of the elements ``start + offset``, for :func:`at`; without rows where ``inner``, their length, is None."""
    if inner is None:
        return start, offset, offset
    else:
        return divide(start, offset, inner, BOUND)


@triton.jit
def at(pointer, first, added, column, stride):
    """Pointers to located elements: rows lie ``stride`` apart, or there are none and all is contiguous."""
    if stride is None:
        return pointer + first + column
    else:
        return pointer + first * stride + (added.to(tl.int64) * stride + column)


@triton.jit
def incoming_gradient(gradient, start, offset, mask, per_sample, common, REDUCTION: tl.constexpr, BOUND: tl.constexpr):
    """The gradient that comes in for each element, where one does for each or for each sample; else ``common``."""
    if REDUCTION == NONE:
        return tl.load(gradient + start + offset, mask=mask).to(tl.float32)
    elif REDUCTION == SAMPLE:
        first, added, _ = divide(start, offset, per_sample, BOUND)
        return tl.load(gradient + first + added, mask=mask).to(tl.float32)
    else:
        return common


@triton.jit
def common_gradient(gradient, scale, REDUCTION: tl.constexpr):
    """The gradient of a scalar, times the reduction's scale; 0 where :func:`incoming_gradient` reads gradients of its own."""
    if gradient is None or REDUCTION == NONE or REDUCTION == SAMPLE:  # noqa: SIM109 (Triton has no `in`)
        return 0.0
    else:
        return tl.load(gradient).to(tl.float32) * scale
