"""The exact search for the nearest code.

A score |c|^2 / 2 - x.c orders the codes as their distances do. A product in float16 (in float32 for short vectors) gives it with an error
that the norms of what rounding took away bound, so it leaves few codes that can be the nearest, mostly one. Rows for which it leaves more
go on a list in device memory; a second kernel takes them from there and decides in float64, and where that is too close exactly. What is
on the list follows from the data alone, and its order does not matter.

Before, the mean of the codes is subtracted from both sides, which changes no distance and makes the norms small, and both are multiplied
with powers of two that put them into the range of float16: one for all codes, one for each row.

The codebook is not looked at on the host. A code that is not finite is never the nearest; where all are, the index is 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._exact import settle

# A score that no code has: of padding, of a code that is equal to an earlier one and of one that is not finite.
NEVER = tl.constexpr(2.0**100)
# What stands in for the scale of a row that has no products: an element is not finite, or too large beside the codes.
NOT_FINITE, TOO_LARGE = tl.constexpr(-1.0), tl.constexpr(0.0)
# More than underflow takes away from a norm, for vectors whose largest element is near 2^14.
NORM_SLACK = tl.constexpr(2.0**-40)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)
LARGEST_HALF, SMALLEST_NORMAL_HALF = tl.constexpr(65504.0), tl.constexpr(2.0**-14)
INFINITY = tl.constexpr(float("inf"))
NO_CODE = tl.constexpr(2**31 - 1)


@triton.jit
def scale_exponent(largest):
    """The biased exponent of the power of two that brings ``largest`` to [2^13, 2^14), as far as it is a normal float32."""
    exponent = 267 - (largest.to(tl.int32, bitcast=True) >> 23)
    return tl.minimum(tl.maximum(exponent, 1), 253)


@triton.jit
def power_of_two(exponent):
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def code_scale_exponent(largest):
    """``largest`` points to a quarter of the codes' largest element: the whole may overflow. That of nothing but zeros is the one of 1."""
    quarter = tl.load(largest)
    return tl.where(quarter == 0, 127, tl.maximum(scale_exponent(quarter.to(tl.float32, bitcast=True)) - 2, 1))


@triton.jit
def load_mean(mean, column, mask):
    """0 where the mean is not finite: any vector would do."""
    values = tl.load(mean + column, mask=mask, other=0.0)
    return tl.where(tl.abs(values) <= LARGEST_FLOAT, values, 0.0)


@triton.jit
def load_tile(pointer, row, row_stride, column, mask):
    """Rows that begin at ``row * row_stride``."""
    return tl.load(pointer + (row[:, None] * row_stride + column[None, :]), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def round_off(value, HALF: tl.constexpr):
    """``value`` (float32) as the screen reads it. What would be a subnormal number is 0: not every device multiplies those."""
    if HALF:
        return tl.where(tl.abs(value) < SMALLEST_NORMAL_HALF, 0.0, value).to(tl.float16)
    else:
        return value


@triton.jit(do_not_specialize=["codes"])
def codebook_measure_kernel(
    codebook, mean, largest, hashes, code_head_stride, code_stride, codes, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A hash of each code, and a quarter of the largest element of all codes less their mean, as the bits of a float32.

    Grid: (blocks of codes, heads).
    """
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    top, mixed = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int64)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        values = load_tile(codebook + head * code_head_stride, code, code_stride, column, mask)
        centred = values.to(tl.float64) - load_mean(mean + head * dim, column, column < dim).to(tl.float64)[None, :]
        size = (tl.abs(centred) * 0.25).to(tl.float32)
        top = tl.maximum(top, tl.max(tl.where(mask & (size <= LARGEST_FLOAT), size, 0.0), axis=1))
        # -0 is 0.
        bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True).to(tl.int64)
        factor = (2 * column + 1).to(tl.int64) * 0x1E3779B97F4A7C15
        mixed += tl.sum(tl.where(mask, (bits ^ (bits << 27)) * factor[None, :], 0), axis=1)
    tl.store(hashes + head * codes + code, mixed ^ (mixed >> 31), mask=code < codes)
    tl.atomic_max(largest + head, tl.max(top, axis=0).to(tl.int32, bitcast=True))


@triton.jit
def find_repeated(codebook, hashes, code, code_stride, codes, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which codes of a block are equal to the first one of the same hash: an untrained codebook of equal codes costs no more than another.

    One whose hash a different code has too is not found, and is decided later.
    """
    own = tl.load(hashes + code, mask=code < codes, other=0)
    twin = tl.full([ROWS], NO_CODE, tl.int32)
    for start in range(0, tl.minimum(tl.max(code, axis=0), codes), COLUMNS):
        other = start + tl.arange(0, COLUMNS)
        theirs = tl.load(hashes + other, mask=other < codes, other=0)
        same = (own[:, None] == theirs[None, :]) & (other[None, :] < code[:, None])
        twin = tl.minimum(twin, tl.min(tl.where(same, other[None, :].to(tl.int32), NO_CODE), axis=1))
    differs = tl.where((twin == NO_CODE) | (code >= codes), 1, 0)
    if tl.min(differs, axis=0) == 0:
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (differs == 0)[:, None] & (column < dim)[None, :]
            one = load_tile(codebook, code, code_stride, column, mask)
            other_one = load_tile(codebook, twin.to(tl.int64), code_stride, column, mask)
            differs = tl.maximum(differs, tl.max(tl.where(one == other_one, 0, 1), axis=1))
    return differs == 0


@triton.jit(do_not_specialize=["codes"])
def codebook_pack_codes_kernel(
    codebook, mean, largest, hashes, packed, half_norm, weight, code_head_stride, code_stride,
    codes, dim, padded_codes, padded_dim, unit, half_norm_rounding,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The codes as the screen reads them: centred, scaled and rounded, with half their squared norms less the part of a score's error that
    goes with those, and what the part that goes with a row is multiplied with. Grid: (blocks of codes, heads)."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = codebook + head * code_head_stride
    scale = power_of_two(code_scale_exponent(largest + head)).to(tl.float64)
    used = (code < codes) & ~find_repeated(base, hashes + head * codes, code, code_stride, codes, dim, ROWS, COLUMNS)
    square, square_rest = tl.zeros([ROWS], tl.float64), tl.zeros([ROWS], tl.float64)
    for first in range(0, padded_dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        values = load_tile(base, code, code_stride, column, mask)
        used = used & (tl.min(tl.where(tl.abs(values) <= LARGEST_FLOAT, 1, 0), axis=1) == 1)
        centre = load_mean(mean + head * dim, column, column < dim).to(tl.float64)
        centred = tl.where(mask, (values.to(tl.float64) - centre[None, :]) * scale, 0.0)
        # The others are those of a code that is not used.
        centred = tl.where(tl.abs(centred) <= LARGEST_HALF, centred, 0.0)
        rounded = round_off(centred.to(tl.float32), HALF)
        rest = centred - rounded.to(tl.float64)
        square += tl.sum(centred * centred, axis=1)
        square_rest += tl.sum(rest * rest, axis=1)
        at = packed + ((head * padded_codes + code)[:, None] * padded_dim + column[None, :])
        tl.store(at, rounded, mask=(code < padded_codes)[:, None] & (column < padded_dim)[None, :])
    norm = tl.sqrt(square) * (1.0 + 1e-6) + NORM_SLACK
    rest_norm = tl.sqrt(square_rest) * (1.0 + 1e-6) + NORM_SLACK
    lowered = 0.5 * square * (1.0 - half_norm_rounding)
    slot = head * padded_codes + code
    tl.store(half_norm + slot, tl.where(used, lowered, NEVER), mask=code < padded_codes)
    tl.store(weight + slot, tl.where(used, tl.maximum(norm + rest_norm, rest_norm / unit), 0.0), mask=code < padded_codes)


@triton.jit(do_not_specialize=["rows"])
def codebook_pack_rows_kernel(
    x, mean, largest, packed, factor, error, x_head_stride, x_stride, rows, dim, padded_rows, padded_dim, rounding,
    HALF: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rows as the screen reads them: centred, scaled and rounded, with the factor that takes their products with codes to the scale of
    the half norms, and their part of a score's error. Grid: (blocks of rows, heads)."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    base = x + head * x_head_stride
    top, faults = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.int32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < dim)[None, :]
        values = load_tile(base, row, x_stride, column, mask)
        size = tl.abs(values - load_mean(mean + head * dim, column, column < dim)[None, :])
        top = tl.maximum(top, tl.max(tl.where(mask, tl.where(size <= LARGEST_FLOAT, size, INFINITY), 0.0), axis=1))
        faults = tl.maximum(faults, tl.max(tl.where(tl.abs(values) <= LARGEST_FLOAT, 0, 1), axis=1))
    code_exponent = code_scale_exponent(largest + head)
    exponent = tl.minimum(scale_exponent(top), code_exponent + 100)
    usual = (faults == 0) & (top <= LARGEST_FLOAT) & (code_exponent - exponent <= 40)
    scale = tl.where(usual, power_of_two(exponent), 0.0)
    square, square_rest = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, padded_dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = usual[:, None] & (row < rows)[:, None] & (column < dim)[None, :]
        values = load_tile(base, row, x_stride, column, mask)
        centre = load_mean(mean + head * dim, column, column < dim)[None, :]
        scaled = tl.where(mask, (values - centre) * scale[:, None], 0.0)
        rounded = round_off(scaled, HALF)
        single = rounded.to(tl.float32)
        square += tl.sum(single * single, axis=1)
        square_rest += tl.sum((scaled - single) * (scaled - single), axis=1)
        at = packed + ((head * padded_rows + row)[:, None] * padded_dim + column[None, :])
        tl.store(at, rounded, mask=(row < padded_rows)[:, None] & (column < padded_dim)[None, :])
    inflation = 1.0 + tl.cast(padded_dim + 16, tl.float32) * (2.0**-22)
    norm = tl.sqrt(square) * inflation + NORM_SLACK
    # The difference from the mean was rounded to float32 before.
    rest_norm = tl.sqrt(square_rest) * inflation + NORM_SLACK + norm * (2.0**-22)
    to_codes = power_of_two(tl.where(usual, code_exponent - exponent + 127, 127))
    slot = head * padded_rows + row
    mark = tl.where(faults == 0, tl.where(usual, to_codes, TOO_LARGE), NOT_FINITE)
    tl.store(factor + slot, mark, mask=row < padded_rows)
    tl.store(error + slot, to_codes * (rest_norm + rounding * norm) * (1.0 + 2.0**-12), mask=row < padded_rows)


@triton.jit
def products(
    rows_packed, codes_packed, padded_dim, held,
    HALF: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """The products of a block of rows and a block of codes, which begin at the pointers; ``held`` are the rows where one block of columns
    holds them."""
    row, code = tl.arange(0, ROWS), tl.arange(0, CODES)
    total = tl.zeros([ROWS, CODES], tl.float32)
    if not HALF:
        # Not unrolled: all factors at once do not fit into registers.
        for d in range(DIM):
            total += tl.load(rows_packed + (row * DIM + d))[:, None] * tl.load(codes_packed + (code * DIM + d))[None, :]
    elif held is not None:
        column = tl.arange(0, COLUMNS)
        others = tl.load(codes_packed + (code[None, :] * COLUMNS + column[:, None]))
        total = tl.dot(held, others, total, input_precision="ieee")
    else:
        for first in range(0, padded_dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            some = tl.load(rows_packed + (row[:, None] * padded_dim + column[None, :]))
            others = tl.load(codes_packed + (code[None, :] * padded_dim + column[:, None]))
            total = tl.dot(some, others, total, input_precision="ieee")
    return total


@triton.jit
def insert(value, code, least, nearest, second, next_nearest, third):
    """The two least values with their codes, and the third, when one more has come."""
    first, below = value < least, value < second
    third = tl.where(below, second, tl.minimum(third, value))
    next_nearest = tl.where(first, nearest, tl.where(below, code, next_nearest))
    second = tl.where(first, least, tl.where(below, value, second))
    return tl.where(first, value, least), tl.where(first, code, nearest), second, next_nearest, third


@triton.jit
def take_least(best, second, first_tile, MASK: tl.constexpr, CODES: tl.constexpr):
    """The least of each row of slots, its code, and the slots without it: its slot has the slot's second instead."""
    column = tl.arange(0, CODES)[None, :]
    least = tl.min(best, axis=1)
    slot = tl.min(tl.where(best == least[:, None], column, CODES), axis=1)
    tile = first_tile + (least.to(tl.int32, bitcast=True) & MASK)
    return least, tile * CODES + slot, tl.where(column == slot[:, None], second, best)


@triton.jit(do_not_specialize=["rows", "codes"])
def codebook_screen_kernel(
    rows_packed, factor, error, codes_packed, half_norm, weight, indices, listed, listed_count,
    rows, codes, padded_rows, padded_codes, padded_dim, half_norm_rounding,
    HALF: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, TILE_BITS: tl.constexpr,
):  # fmt: skip
    """For each row the code of the least score less its error. Rows of which another code may be as near are listed, with that code where
    it is the only one, else with -1. Grid: (blocks of rows, heads).

    A slot is a column of the tiles of codes and holds the two least scores that it met; a score's low bits hold the number of its tile.
    """
    MASK: tl.constexpr = (1 << TILE_BITS) - 1
    head, first_row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    lane, slot = tl.arange(0, ROWS), tl.arange(0, CODES)
    row = first_row + lane
    of_head = head * padded_rows + first_row
    to_codes, row_error = tl.load(factor + of_head + lane), tl.load(error + of_head + lane)
    screened = to_codes > 0.0
    minus_scale, minus_error = tl.where(screened, -to_codes, 0.0)[:, None], tl.where(screened, -row_error, 0.0)[:, None]
    rows_packed += of_head * padded_dim
    codes_packed += head * padded_codes * padded_dim
    half_norm += head * padded_codes
    weight += head * padded_codes
    if HALF and DIM == COLUMNS:  # noqa: SIM108 (Triton evaluates both sides of a conditional expression)
        held = tl.load(rows_packed + (lane[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]))
    else:
        held = None

    least, nearest = tl.full([ROWS], INFINITY, tl.float32), tl.zeros([ROWS], tl.int32)
    second_least, next_nearest = tl.full([ROWS], INFINITY, tl.float32), tl.zeros([ROWS], tl.int32)
    third = tl.full([ROWS], INFINITY, tl.float32)
    tiles = padded_codes // CODES
    for first_tile in range(0, tiles, MASK + 1):
        best, second = tl.full([ROWS, CODES], 2.0 * NEVER, tl.float32), tl.full([ROWS, CODES], 2.0 * NEVER, tl.float32)
        for tile in range(first_tile, tl.minimum(first_tile + MASK + 1, tiles)):
            first_code = tl.cast(tile, tl.int64) * CODES
            product = products(rows_packed, codes_packed + first_code * padded_dim, padded_dim, held, HALF, DIM, COLUMNS, ROWS, CODES)
            score = minus_scale * product + tl.load(half_norm + first_code + slot)[None, :]
            score = minus_error * tl.load(weight + first_code + slot)[None, :] + score
            score = ((score.to(tl.int32, bitcast=True) & ~MASK) | (tile - first_tile)).to(tl.float32, bitcast=True)
            second = tl.minimum(second, tl.maximum(best, score))
            best = tl.minimum(best, score)
        for _ in tl.static_range(2):
            value, code_of_value, best = take_least(best, second, first_tile, MASK, CODES)
            least, nearest, second_least, next_nearest, third = insert(
                value, code_of_value, least, nearest, second_least, next_nearest, third
            )
        third = tl.minimum(third, tl.min(best, axis=1))

    # The score itself is at most twice its error above; more than that by what the sum here rounds.
    bound = least + 2.01 * (row_error * tl.load(weight + nearest) + half_norm_rounding * tl.load(half_norm + nearest))
    usual, too_large = (row < rows) & (to_codes != NOT_FINITE), to_codes == TOO_LARGE
    tl.store(indices + head * rows + row, tl.where(usual, tl.minimum(nearest, codes - 1), 0).to(tl.int64), mask=row < rows)
    uncertain = usual & (too_large | (second_least <= bound))
    count = tl.where(uncertain, 1, 0)
    position = tl.atomic_add(listed_count, tl.sum(count, axis=0)) + tl.cumsum(count, axis=0) - 1
    entry = listed + position.to(tl.int64) * 3
    tl.store(entry, head + tl.zeros([ROWS], tl.int64), mask=uncertain)
    tl.store(entry + 1, row, mask=uncertain)
    tl.store(entry + 2, tl.where(too_large | (third <= bound), -1, next_nearest).to(tl.int64), mask=uncertain)


@triton.jit(do_not_specialize=["rows", "codes"])
def codebook_recheck_kernel(
    x, codebook, half_norm, indices, listed, listed_count, x_head_stride, x_stride, code_head_stride, code_stride,
    rows, codes, dim, padded_codes, CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Decides the listed rows, between two codes or among all, in float64 from the start: where that is fast, reading the codes takes as
    long. Grid: (programs,)."""
    lane = tl.arange(0, CODES).to(tl.int64)
    for entry in range(tl.program_id(0), tl.load(listed_count), tl.num_programs(0)):
        record = listed + tl.cast(entry, tl.int64) * 3
        head, own, other = tl.load(record), tl.load(record + 1), tl.load(record + 2)
        index = indices + head * rows + own
        row = x + head * x_head_stride + own * x_stride
        own_codes, norms = codebook + head * code_head_stride, half_norm + head * padded_codes
        nearest = tl.where(other >= 0, tl.load(index), -1)
        # The last lane has the nearest code up to here; of a row with two candidates the first lane has the other one.
        for first in range(0, tl.where(other >= 0, 1, codes), CODES - 1):
            code = tl.where(other >= 0, tl.where(lane == 0, other, codes), first + lane)
            code = tl.where(lane == CODES - 1, nearest, code)
            inside = (code >= 0) & (code < codes)
            live = tl.load(norms + code, mask=inside, other=NEVER) < NEVER
            nearest = settle(row, own_codes, code, live, code_stride, dim, CODES, COLUMNS)
        tl.store(index, tl.maximum(nearest, 0))


class Rows(NamedTuple):
    """(heads, rows, dim), the elements of a row side by side."""

    tensor: Tensor
    head_stride: int
    stride: int


def rows_of(tensor: Tensor) -> Rows:
    """A copy where a row's elements do not lie side by side."""
    dense = tensor if tensor.shape[2] == 1 or tensor.stride(2) == 1 else tensor.contiguous()
    return Rows(dense, dense.stride(0), dense.stride(1))


def nearest(x: Rows, codebook: Rows) -> Tensor:
    """int64 (heads, rows); 0 for a row that is not finite."""
    heads, rows, dim = x.tensor.shape
    codes = codebook.tensor.shape[1]
    device, new = x.tensor.device, x.tensor.new_empty
    indices = new((heads, rows), dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    machine = _device.machine(device)
    plan = _launch.screen(heads, rows, codes, dim, machine)
    packed_dtype = torch.float16 if plan.half else torch.float32
    # What the kernels add to: a count of listed rows, and the largest element of each head.
    counters = torch.zeros((1 + heads,), dtype=torch.int32, device=device)
    count, largest = counters[:1], counters[1:]
    mean = codebook.tensor.mean(1, dtype=torch.float32)
    hashes = new((heads, codes), dtype=torch.int64)
    packed_rows, packed_codes = (new((heads, n, plan.dim), dtype=packed_dtype) for n in (plan.rows, plan.codes))
    factor, error = new((2, heads, plan.rows), dtype=torch.float32)
    half_norm, weight = new((2, heads, plan.codes), dtype=torch.float32)
    listed = new((heads * rows, 3), dtype=torch.int64)
    block = {"ROWS": plan.pack_rows, "COLUMNS": plan.pack_columns, **_launch.OPTIONS}
    with _device.on(device):
        codebook_measure_kernel[triton.cdiv(codes, plan.pack_rows), heads](
            codebook.tensor, mean, largest, hashes, *codebook[1:], codes, dim, **block
        )
        codebook_pack_codes_kernel[triton.cdiv(plan.codes, plan.pack_rows), heads](
            codebook.tensor, mean, largest, hashes, packed_codes, half_norm, weight, *codebook[1:],
            codes, dim, plan.codes, plan.dim, plan.unit, plan.half_norm_rounding, HALF=plan.half, **block,
        )  # fmt: skip
        codebook_pack_rows_kernel[triton.cdiv(plan.rows, plan.pack_rows), heads](
            x.tensor, mean, largest, packed_rows, factor, error, *x[1:], rows, dim, plan.rows, plan.dim, plan.rounding,
            HALF=plan.half, **block,
        )  # fmt: skip
        codebook_screen_kernel[plan.rows // plan.block_rows, heads](
            packed_rows, factor, error, packed_codes, half_norm, weight, indices, listed, count,
            rows, codes, plan.rows, plan.codes, plan.dim, plan.half_norm_rounding,
            HALF=plan.half, DIM=plan.known_dim, COLUMNS=plan.columns, ROWS=plan.block_rows, CODES=plan.block_codes,
            TILE_BITS=plan.tile_bits, **_launch.OPTIONS,
        )  # fmt: skip
        codebook_recheck_kernel[(min(heads * rows, machine.programs),)](
            x.tensor, codebook.tensor, half_norm, indices, listed, count, *x[1:], *codebook[1:],
            rows, codes, dim, plan.codes, CODES=plan.recheck_codes, COLUMNS=plan.recheck_columns, **_launch.recheck_options(machine),
        )  # fmt: skip
    return indices
