"""Index arithmetic: the elements that a program handles, and their addresses.

Offsets have 64 bits, so that tensors of more than 2^31 elements work. Offsets within a block have 32, because a GPU composes 64-bit
arithmetic of several instructions.
"""

import triton
import triton.language as tl

from fastvae.ops._results import REDUCTIONS

NONE, SAMPLE = tl.constexpr(REDUCTIONS["none"]), tl.constexpr(REDUCTIONS["sample"])


@triton.jit
def first_chunk(full, program, programs):
    """The first of the chunks that ``program`` handles, where programs handle the ``full`` blocks in turn and then the chunks of the rest
    in turn, see _launch.Stream."""
    return (program - full % programs + programs) % programs


@triton.jit
def inside(offset, remaining, MASKED: tl.constexpr):
    """The mask of the elements that exist. Without MASKED all do, and the mask is None, with which accesses can be 16 bytes wide."""
    if MASKED:
        return offset < remaining


@triton.jit
def zero_outside(values, mask):
    """``values``, but 0 for elements that do not exist."""
    if mask is None:
        return values
    else:
        return tl.where(mask, values, 0.0)


@triton.jit
def divide(start, offset, divisor, BOUND: tl.constexpr):
    """Divides ``start + offset`` by ``divisor``: the quotient of ``start``, what ``offset`` adds to the quotient, and the remainder.

    ``start`` is an int64 scalar and ``offset`` a block of numbers in [0, BOUND), so that one 64-bit division serves the whole block. A
    divisor of at least BOUND is reached at most once in a block, so a comparison stands for the division. A smaller one takes a 32-bit
    division.
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
    """The row and the column of the elements ``start + offset``, as :func:`at` takes them. ``inner`` is the length of a row; where it is
    None, the tensor is contiguous and has no rows."""
    if inner is None:
        return start, offset, offset
    else:
        return divide(start, offset, inner, BOUND)


@triton.jit
def at(pointer, first, added, column, stride):
    """Pointers to elements from :func:`locate`, in rows that are ``stride`` elements apart; None stands for a contiguous tensor."""
    if stride is None:
        return pointer + first + column
    else:
        return pointer + ((first + added) * stride + column)


@triton.jit
def incoming_gradient(gradient, start, offset, mask, per_sample, common, REDUCTION: tl.constexpr, BOUND: tl.constexpr):
    """grad_output of the elements ``start + offset``, one value for each element or for each sample of ``per_sample`` elements, by
    REDUCTION; for a scalar it is ``common``, see :func:`common_gradient`."""
    if REDUCTION == NONE:
        return tl.load(gradient + start + offset, mask=mask).to(tl.float32)
    elif REDUCTION == SAMPLE:
        first, added, _ = divide(start, offset, per_sample, BOUND)
        return tl.load(gradient + first + added, mask=mask).to(tl.float32)
    else:
        return common


@triton.jit
def common_gradient(gradient, scale, REDUCTION: tl.constexpr):
    """A scalar grad_output times ``scale``; 0 where there is none or where :func:`incoming_gradient` reads one value for each element or
    sample."""
    if gradient is None or REDUCTION == NONE or REDUCTION == SAMPLE:  # noqa: SIM109 (Triton has no `in`)
        return 0.0
    else:
        return tl.load(gradient).to(tl.float32) * scale
