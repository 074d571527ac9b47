"""Device functions that decide between codes which a screen cannot tell apart: by squared distances in float64, and where those are too
close, by exact sums. Inputs have at most the precision and the range of float32.

``code`` (CODES,) are the numbers of the codes in a block, ``candidate`` (CODES,) says which of them take part, ``row`` points to a vector
(dim,) and ``codebook`` to vectors that are ``code_stride`` apart. COLUMNS elements are loaded at a time.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
# SENTINEL is above every code and every bin.
NO_CODE, SENTINEL = tl.constexpr(-1), tl.constexpr(2**62)

# The product of two float32, and twice it, is a multiple of 2^-298 and below 2^257. Exact sums of such products are stored in bins of 32
# bits, which cover the bits from 2^258 down to 2^-318.
BINS, BIN_BITS, TOP_BIT = tl.constexpr(18), tl.constexpr(32), tl.constexpr(258)


@triton.jit
def load_tile_in_float64(row, codebook, code, candidate, code_stride, first, dim, COLUMNS: tl.constexpr):
    """COLUMNS elements of the row and of the candidates in float64, from element ``first`` on; 0 elsewhere."""
    column = first + tl.arange(0, COLUMNS)
    mask = column < dim
    pointers = codebook + (code[:, None] * code_stride + column[None, :])
    codes = tl.load(pointers, mask=candidate[:, None] & mask[None, :], other=0.0).to(tl.float64)
    return tl.load(row + column, mask=mask, other=0.0).to(tl.float64)[None, :], codes


@triton.jit
def distances(row, codebook, code, candidate, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """The squared distances of the row to the candidates, with a relative error of at most (dim + 3) 2^-53; infinite for other codes."""
    total = tl.zeros([CODES], tl.float64)
    for first in range(0, dim, COLUMNS):
        x, codes = load_tile_in_float64(row, codebook, code, candidate, code_stride, first, dim, COLUMNS)
        total += tl.sum((x - codes) * (x - codes), axis=1)
    return tl.where(candidate, total, INFINITY)


@triton.jit
def bin_unit(index):
    """The reciprocal of the unit of a bin, and the rounding constant 1.5 * 2^52 * unit: adding it rounds any float64 below 2^51 units to a
    multiple of the unit."""
    exponent = tl.cast(TOP_BIT - BIN_BITS, tl.int64) - BIN_BITS * index
    shift = (1023 + exponent + 52) << 52 | 1 << 51
    return ((1023 - exponent) << 52).to(tl.float64, bitcast=True), shift.to(tl.float64, bitcast=True)


@triton.jit
def in_bin(bins, index):
    """The contents of one bin of each code."""
    return tl.sum(tl.where(tl.arange(0, 32)[None, :] == index, bins, 0), axis=1)


@triton.jit
def binned_scores(row, codebook, code, candidate, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """The scores |c|^2 - 2 x.c without any rounding: a number in units of 2^258, and bins (CODES, 32) of the rest, each from 0 to 2^32 - 1.

    A product of two float32 is exact in float64. It is split into multiples of the units of the bins, whose sums are exact too.
    """
    number = tl.arange(0, 32)[None, :]
    bins = tl.zeros([CODES, 32], tl.int64)
    for first in range(0, dim, COLUMNS):
        x, codes = load_tile_in_float64(row, codebook, code, candidate, code_stride, first, dim, COLUMNS)
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
def keep_smallest(candidate, values):
    """The candidates with the smallest value."""
    return candidate & (values == tl.min(tl.where(candidate, values, SENTINEL), axis=0))


@triton.jit
def keep_nearest(row, codebook, code, candidate, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """The candidates at the smallest distance."""
    distance = distances(row, codebook, code, candidate, code_stride, dim, CODES, COLUMNS)
    tolerance = 1.0 + 2.0 * tl.cast(dim + 8, tl.float64) * (2.0**-52)
    close = candidate & (distance <= tl.min(distance, axis=0) * tolerance)
    if tl.sum(close.to(tl.int32), axis=0) > 1:
        units, bins = binned_scores(row, codebook, code, close, code_stride, dim, CODES, COLUMNS)
        close = keep_smallest(close, units)
        for index in range(BINS):
            close = keep_smallest(close, in_bin(bins, index))
    return close


@triton.jit
def nearest_exactly(row, codebook, code, candidate, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """The nearest candidate, the lowest where several are equally near; NO_CODE where there is none. A single candidate needs no
    distance."""
    if tl.sum(candidate.to(tl.int32), axis=0) > 1:
        candidate = keep_nearest(row, codebook, code, candidate, code_stride, dim, CODES, COLUMNS)
    nearest = tl.min(tl.where(candidate, code, SENTINEL), axis=0)
    return tl.where(nearest == SENTINEL, NO_CODE, nearest)
