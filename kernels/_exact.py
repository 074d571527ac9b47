"""What decides between codes that a screen cannot tell apart: squared distances in float64, and where those are too close exact sums.

Inputs have at most the precision and range of float32.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
NO_CODE, MOST = tl.constexpr(-1), tl.constexpr(2**62)

# Products of two float32 are multiples of 2^-298 below 2^257, also twice them. Bins of 32 bits hold their sums, from 2^258 down.
BINS, BIN_BITS, TOP_BIT = tl.constexpr(18), tl.constexpr(32), tl.constexpr(258)


@triton.jit
def load_tile(row, codebook, code, live, code_stride, first, dim, COLUMNS: tl.constexpr):
    """Some columns of a row and of a block of codes, in float64, 0 where not ``live``."""
    column = first + tl.arange(0, COLUMNS)
    mask = column < dim
    pointers = codebook + (code[:, None] * code_stride + column[None, :])
    codes = tl.load(pointers, mask=live[:, None] & mask[None, :], other=0.0).to(tl.float64)
    return tl.load(row + column, mask=mask, other=0.0).to(tl.float64)[None, :], codes


@triton.jit
def distances(row, codebook, code, live, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """Squared, with the relative error (dim + 3) 2^-53; infinite where not ``live``."""
    total = tl.zeros([CODES], tl.float64)
    for first in range(0, dim, COLUMNS):
        x, codes = load_tile(row, codebook, code, live, code_stride, first, dim, COLUMNS)
        total += tl.sum((x - codes) * (x - codes), axis=1)
    return tl.where(live, total, INFINITY)


@triton.jit
def bin_unit(index):
    """1 over what is 1 in a bin, and the number a sum with which of any float64 in reach is a multiple of that: 1.5 2^52 times it."""
    exponent = tl.cast(TOP_BIT - BIN_BITS, tl.int64) - BIN_BITS * index
    shift = (1023 + exponent + 52) << 52 | 1 << 51
    return ((1023 - exponent) << 52).to(tl.float64, bitcast=True), shift.to(tl.float64, bitcast=True)


@triton.jit
def in_bin(bins, index):
    return tl.sum(tl.where(tl.arange(0, 32)[None, :] == index, bins, 0), axis=1)


@triton.jit
def binned_scores(row, codebook, code, live, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """|c|^2 - 2 x.c without any rounding: a number of which 2^258 is the unit, and bins that hold the rest, each from 0 to 2^32 - 1.

    A product of float32 is exact in float64. It is cut into multiples of the bins' units, whose sums are exact too.
    """
    number = tl.arange(0, 32)[None, :]
    bins = tl.zeros([CODES, 32], tl.int64)
    for first in range(0, dim, COLUMNS):
        x, codes = load_tile(row, codebook, code, live, code_stride, first, dim, COLUMNS)
        square, product = codes * codes, -2.0 * x * codes
        for index in range(BINS):
            inverse, shift = bin_unit(index)
            square_part, product_part = (square + shift) - shift, (product + shift) - shift
            square, product = square - square_part, product - product_part
            part = (tl.sum(square_part + product_part, axis=1) * inverse).to(tl.int64)
            bins += tl.where(number == index, part[:, None], 0)
    carry = tl.zeros([CODES], tl.int64)
    for place in range(BINS):
        index = BINS - 1 - place
        total = in_bin(bins, index) + carry
        carry = total >> BIN_BITS
        bins = tl.where(number == index, (total - (carry << BIN_BITS))[:, None], bins)
    return carry, bins


@triton.jit
def keep_least(live, values):
    return live & (values == tl.min(tl.where(live, values, MOST), axis=0))


@triton.jit
def settle(row, codebook, code, live, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """The nearest ``live`` code of a block, of equally near ones the lowest; -1 where none is live."""
    distance = distances(row, codebook, code, live, code_stride, dim, CODES, COLUMNS)
    tolerance = 1.0 + 2.0 * tl.cast(dim + 8, tl.float64) * (2.0**-52)
    close = live & (distance <= tl.min(distance, axis=0) * tolerance)
    if tl.sum(close.to(tl.int32), axis=0) > 1:
        units, bins = binned_scores(row, codebook, code, close, code_stride, dim, CODES, COLUMNS)
        close = keep_least(close, units)
        for index in range(BINS):
            close = keep_least(close, in_bin(bins, index))
    nearest = tl.min(tl.where(close, code, MOST), axis=0)
    return tl.where(nearest == MOST, NO_CODE, nearest)
