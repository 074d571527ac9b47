"""The exact search for the nearest code.

=======================  =======================  ===========================================  ==============================
kernel                   grid                     reads                                        writes
=======================  =======================  ===========================================  ==============================
codebook_screen_kernel   (blocks of rows, heads)  packed rows and codes, their error bounds    indices, worklist
=======================  =======================  ===========================================  ==============================

The kernels that pack are in :mod:`fastvae.kernels._codebook_pack`, the one that decides the worklist's rows is in
:mod:`fastvae.kernels._codebook_recheck`.

A score |c|^2 / 2 - x.c orders the codes as their distances do. The screen computes it with a product in float16, or in float32 for short
vectors. The norms of the rounding errors bound the error of a score, so the screen leaves few codes that can be the nearest, mostly one.
Rows for which it leaves more go on a worklist in device memory; a second kernel decides them in float64, and where that is too close,
exactly. Which rows are on the worklist follows from the data alone, and no result depends on their order.

No value is read on the host, so a codebook is not checked. A code that is not finite is never the nearest; where all are, the index is 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._codebook_pack import (
    INFINITY,
    NEVER_NEAREST,
    NOT_FINITE,
    TOO_LARGE,
    codebook_measure_kernel,
    codebook_pack_codes_kernel,
    codebook_pack_rows_kernel,
    lower_bound,
    upper_bound,
)
from fastvae.kernels._codebook_recheck import codebook_recheck_kernel


@triton.jit
def products(
    rows_packed, codes_packed, padded_dim, row_block,
    HALF: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """The products (ROWS, CODES) of the packed rows and codes that begin at the pointers. Where COLUMNS are all elements of a vector,
    ``row_block`` contains the rows, which stay in registers for all blocks of codes; otherwise it is None."""
    row, code = tl.arange(0, ROWS), tl.arange(0, CODES)
    total = tl.zeros([ROWS, CODES], tl.float32)
    if not HALF:
        # The number of elements is an argument, DIM too, but not a constant, so that the compiler does not unroll the loop: all operands
        # together do not fit into registers.
        for d in range(padded_dim):
            total += tl.load(rows_packed + (row * DIM + d))[:, None] * tl.load(codes_packed + (code * DIM + d))[None, :]
    elif row_block is not None:
        column = tl.arange(0, COLUMNS)
        others = tl.load(codes_packed + (code[None, :] * COLUMNS + column[:, None]))
        total = tl.dot(row_block, others, total, input_precision="ieee")
    else:
        for first in range(0, padded_dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            block = tl.load(rows_packed + (row[:, None] * padded_dim + column[None, :]))
            others = tl.load(codes_packed + (code[None, :] * padded_dim + column[:, None]))
            total = tl.dot(block, others, total, input_precision="ieee")
    return total


@triton.jit
def insert(value, code, smallest, nearest, second, next_nearest, third):
    """Inserts a value into the three smallest ones of each row, of which the first two have codes."""
    first, below = value < smallest, value < second
    third = tl.where(below, second, tl.minimum(third, value))
    next_nearest = tl.where(first, nearest, tl.where(below, code, next_nearest))
    second = tl.where(first, smallest, tl.where(below, value, second))
    return tl.where(first, value, smallest), tl.where(first, code, nearest), second, next_nearest, third


@triton.jit
def take_smallest(best, second, first_tile, MASK: tl.constexpr, CODES: tl.constexpr):
    """The smallest score of each row, its code, and the slots after its removal: its slot gets the second smallest score of that slot."""
    column = tl.arange(0, CODES)[None, :]
    smallest = tl.min(best, axis=1)
    slot = tl.min(tl.where(best == smallest[:, None], column, CODES), axis=1)
    tile = first_tile + (smallest.to(tl.int32, bitcast=True) & MASK)
    return smallest, tile * CODES + slot, tl.where(column == slot[:, None], second, best)


@triton.jit
def append(entries, count, step, flat, value, listed):
    """Appends (flat, value) of the listed rows to the entries of a worklist, which are ``step`` elements apart."""
    number = tl.where(listed, 1, 0)
    position = tl.atomic_add(count, tl.sum(number, axis=0)) + tl.cumsum(number, axis=0) - 1
    entry = entries + position.to(tl.int64) * step
    tl.store(entry, flat, mask=listed)
    tl.store(entry + 1, value.to(tl.int64), mask=listed)


@triton.jit(do_not_specialize=["rows", "codes"])
def codebook_screen_kernel(
    rows_packed, product_scale, row_error, codes_packed, half_norm, error_weight, indices, worklist, counts,
    rows, codes, padded_rows, padded_codes, padded_dim, half_norm_rounding,
    HALF: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, TILE_BITS: tl.constexpr,
):  # fmt: skip
    """Writes the code with the smallest lower bound of the score for each row, and lists the rows for which another code may be as near.
    Grid: (blocks of rows, heads).

    Pointers: the packed rows and codes with their bounds as :mod:`fastvae.kernels._codebook_pack` writes them; indices (heads, rows) int64;
    worklist (heads * rows, 2) int64, which has pairs at its beginning, the row's number over all heads and its other code, and open rows
    from its end backwards, the row's number and an upper bound of its smallest score, the bits of a float32; counts (2,) int32, the numbers
    of pairs and of open rows.

    The codes are screened in tiles of CODES. Each slot, a column of the tiles, keeps its two smallest scores, whose low TILE_BITS bits hold
    the number of the tile. Where the two smallest of all are in one slot, a third one there may have been lost, and the row is open.
    """
    MASK: tl.constexpr = (1 << TILE_BITS) - 1
    head, first_row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    lane, slot = tl.arange(0, ROWS), tl.arange(0, CODES)
    row = first_row + lane
    of_head = head * padded_rows + first_row
    scale, error = tl.load(product_scale + of_head + lane), tl.load(row_error + of_head + lane)
    screened = scale > 0.0
    minus_scale, minus_error = tl.where(screened, -scale, 0.0)[:, None], tl.where(screened, -error, 0.0)[:, None]
    rows_packed += of_head * padded_dim
    codes_packed += head * padded_codes * padded_dim
    half_norm += head * padded_codes
    error_weight += head * padded_codes
    if HALF and DIM == COLUMNS:  # noqa: SIM108 (Triton evaluates both sides of a conditional expression)
        row_block = tl.load(rows_packed + (lane[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]))
    else:
        row_block = None

    smallest, nearest = tl.full([ROWS], INFINITY, tl.float32), tl.zeros([ROWS], tl.int32)
    second_smallest, next_nearest = tl.full([ROWS], INFINITY, tl.float32), tl.zeros([ROWS], tl.int32)
    third = tl.full([ROWS], INFINITY, tl.float32)
    tiles = padded_codes // CODES
    for first_tile in range(0, tiles, MASK + 1):
        best, second = tl.full([ROWS, CODES], 2.0 * NEVER_NEAREST, tl.float32), tl.full([ROWS, CODES], 2.0 * NEVER_NEAREST, tl.float32)
        for tile in range(first_tile, tl.minimum(first_tile + MASK + 1, tiles)):
            first_code = tl.cast(tile, tl.int64) * CODES
            product = products(rows_packed, codes_packed + first_code * padded_dim, padded_dim, row_block, HALF, DIM, COLUMNS, ROWS, CODES)
            norms, weights = tl.load(half_norm + first_code + slot), tl.load(error_weight + first_code + slot)
            score = lower_bound(product, norms[None, :], weights[None, :], minus_scale, minus_error)
            score = ((score.to(tl.int32, bitcast=True) & ~MASK) | (tile - first_tile)).to(tl.float32, bitcast=True)
            second = tl.minimum(second, tl.maximum(best, score))
            best = tl.minimum(best, score)
        for _ in tl.static_range(2):
            value, code_of_value, best = take_smallest(best, second, first_tile, MASK, CODES)
            smallest, nearest, second_smallest, next_nearest, third = insert(
                value, code_of_value, smallest, nearest, second_smallest, next_nearest, third
            )
        third = tl.minimum(third, tl.min(best, axis=1))

    bound = upper_bound(smallest, tl.load(half_norm + nearest), tl.load(error_weight + nearest), error, half_norm_rounding)
    finite, too_large = (row < rows) & (scale != NOT_FINITE), scale == TOO_LARGE
    flat = head * rows + row
    tl.store(indices + flat, tl.where(finite, tl.minimum(nearest, codes - 1), 0).to(tl.int64), mask=row < rows)
    is_open = finite & (too_large | (third <= bound))
    append(worklist, counts, 2, flat, next_nearest, finite & (second_smallest <= bound) & (is_open == 0))
    last = worklist + (tl.num_programs(1).to(tl.int64) * rows - 1) * 2
    append(last, counts + 1, -2, flat, tl.where(too_large, INFINITY, bound).to(tl.int32, bitcast=True), is_open)


class Rows(NamedTuple):
    """Vectors (heads, rows, dim) whose elements are contiguous, with the strides of heads and rows."""

    tensor: Tensor
    head_stride: int
    stride: int


def rows_of(tensor: Tensor) -> Rows:
    """The vectors of a tensor (heads, rows, dim), copied where their elements are not contiguous."""
    dense = tensor if tensor.shape[2] == 1 or tensor.stride(2) == 1 else tensor.contiguous()
    return Rows(dense, dense.stride(0), dense.stride(1))


def nearest(x: Rows, codebook: Rows) -> Tensor:
    """The indices (heads, rows) int64 of the nearest codes; 0 for a row that is not finite."""
    heads, rows, dim = x.tensor.shape
    codes = codebook.tensor.shape[1]
    device, new = x.tensor.device, x.tensor.new_empty
    indices = new((heads, rows), dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    machine = _device.machine(device)
    plan = _launch.screen(heads, rows, codes, dim, machine)
    packed_dtype = torch.float16 if plan.half else torch.float32
    # Counters that the kernels add to: the pairs and the open rows of the worklist, max_quarter of each head, the tickets of the open rows.
    counters = torch.zeros((2 + heads + heads * rows,), dtype=torch.int32, device=device)
    counts, max_quarter, tickets = counters.split((2, heads, heads * rows))
    mean = codebook.tensor.mean(1, dtype=torch.float32)
    hashes = new((heads, codes), dtype=torch.int64)
    packed_rows, packed_codes = (new((heads, n, plan.dim), dtype=packed_dtype) for n in (plan.rows, plan.codes))
    product_scale, row_error = new((2, heads, plan.rows), dtype=torch.float32)
    half_norm, error_weight = new((2, heads, plan.codes), dtype=torch.float32)
    worklist = new((heads * rows, 2), dtype=torch.int64)
    winners = new((heads * rows, plan.recheck_splits), dtype=torch.int32)
    screened = packed_rows, product_scale, row_error, packed_codes, half_norm, error_weight
    block = {"ROWS": plan.pack_rows, "COLUMNS": plan.pack_columns, **_launch.OPTIONS}
    with _device.on(device):
        codebook_measure_kernel[triton.cdiv(codes, plan.pack_rows), heads](
            codebook.tensor, mean, max_quarter, hashes, *codebook[1:], codes, dim, **block
        )
        codebook_pack_codes_kernel[triton.cdiv(plan.codes, plan.pack_rows), heads](
            codebook.tensor, mean, max_quarter, hashes, packed_codes, half_norm, error_weight, *codebook[1:],
            codes, dim, plan.codes, plan.dim, plan.unit, plan.half_norm_rounding, HALF=plan.half, **block,
        )  # fmt: skip
        codebook_pack_rows_kernel[triton.cdiv(plan.rows, plan.pack_rows), heads](
            x.tensor, mean, max_quarter, packed_rows, product_scale, row_error, *x[1:], rows, dim, plan.rows, plan.dim, plan.rounding,
            HALF=plan.half, **block,
        )  # fmt: skip
        codebook_screen_kernel[plan.rows // plan.block_rows, heads](
            *screened, indices, worklist, counts, rows, codes, plan.rows, plan.codes, plan.dim, plan.half_norm_rounding,
            HALF=plan.half, DIM=plan.known_dim, COLUMNS=plan.columns, ROWS=plan.block_rows, CODES=plan.block_codes,
            TILE_BITS=plan.tile_bits, **_launch.screen_options(machine),
        )  # fmt: skip
        codebook_recheck_kernel[plan.recheck_groups, plan.recheck_splits](
            x.tensor, codebook.tensor, *screened, indices, worklist, counts, winners, tickets, *x[1:], *codebook[1:],
            heads, rows, dim, plan.rows, plan.codes, plan.dim, plan.half_norm_rounding, TILE_CODES=plan.block_codes,
            TILE_COLUMNS=plan.pack_columns, CODES=_launch.RECHECK_CODES, COLUMNS=_launch.RECHECK_COLUMNS,
            **_launch.recheck_options(machine),
        )  # fmt: skip
    return indices
