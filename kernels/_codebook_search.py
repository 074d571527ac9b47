"""This module searches for the nearest codes exactly.

=======================  =======================  ===========================================  ==============================
kernel                   grid                     reads                                        writes
=======================  =======================  ===========================================  ==============================
codebook_screen_kernel   (blocks of rows, heads)  packed rows and codes, their error bounds    indices, worklist, counts
=======================  =======================  ===========================================  ==============================

The kernels that pack are in :mod:`fastvae.kernels._codebook_pack`, the one that decides the worklist's rows is in
:mod:`fastvae.kernels._codebook_recheck`.

A score |c|^2 / 2 - x.c orders the codes as their distances do. The screen computes it with a product in float16, or in float32 for short
vectors. The packing kernels measure the norms of what rounding takes from a row and from a code. Those norms bound the error of a score,
so the screen leaves few codes that can be the nearest, mostly one. Rows for which it leaves more go on a worklist in device memory: as a
pair, where it leaves two codes and knows both, otherwise as an open row. The recheck kernel decides them in float64, and where that is too
close, by exact sums. Which rows are on the worklist follows from the data alone, and no result depends on their order.

No value is read on the host, so a codebook is not checked. A code that is not finite is never the nearest; where no code is finite, the
index is 0.
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
    """Returns the products (ROWS, CODES) of the packed rows and codes that begin at the pointers, whose vectors are ``padded_dim`` apart.
    DIM is ``padded_dim`` as a constant, or 0, see :attr:`fastvae.kernels._launch.Screen.known_dim`. With HALF, where COLUMNS elements are
    whole vectors, ``row_block`` contains the rows, which stay in registers for all tiles of codes; otherwise it is None. No load needs a
    mask, because packed vectors are padded to whole blocks."""
    row, code = tl.arange(0, ROWS), tl.arange(0, CODES)
    total = tl.zeros([ROWS, CODES], tl.float32)
    if not HALF:
        # The strides are the constant DIM, but the loop ends at the argument, which has the same value. With a constant end the compiler
        # would unroll the loop, and the operands of all its iterations do not fit into registers.
        for d in range(padded_dim):
            total += tl.load(rows_packed + (row * DIM + d))[:, None] * tl.load(codes_packed + (code * DIM + d))[None, :]
    elif row_block is not None:
        column = tl.arange(0, COLUMNS)
        code_block = tl.load(codes_packed + (code[None, :] * COLUMNS + column[:, None]))
        # Triton ignores input_precision for float16, whose products are exact in float32.
        total = tl.dot(row_block, code_block, total, input_precision="ieee")
    else:
        for first in range(0, padded_dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            row_columns = tl.load(rows_packed + (row[:, None] * padded_dim + column[None, :]))
            code_columns = tl.load(codes_packed + (code[None, :] * padded_dim + column[:, None]))
            total = tl.dot(row_columns, code_columns, total, input_precision="ieee")
    return total


@triton.jit
def insert(score, code, smallest, smallest_code, second, second_code, third):
    """Inserts a score into the three smallest ones of each row, of which the first two have codes."""
    is_first, is_second = score < smallest, score < second
    third = tl.where(is_second, second, tl.minimum(third, score))
    second_code = tl.where(is_first, smallest_code, tl.where(is_second, code, second_code))
    second = tl.where(is_first, smallest, tl.where(is_second, score, second))
    return tl.where(is_first, score, smallest), tl.where(is_first, code, smallest_code), second, second_code, third


@triton.jit
def take_smallest(slot_smallest, slot_second, first_tile, MASK: tl.constexpr, CODES: tl.constexpr):
    """Returns the smallest score of each row, its code, and the slots without it: its slot gets the second smallest score of that slot.
    A slot from which two scores are taken keeps the second, as a lower bound of the third, which is not known."""
    slots = tl.arange(0, CODES)[None, :]
    smallest = tl.min(slot_smallest, axis=1)
    slot = tl.min(tl.where(slot_smallest == smallest[:, None], slots, CODES), axis=1)
    tile = first_tile + (smallest.to(tl.int32, bitcast=True) & MASK)
    return smallest, tile * CODES + slot, tl.where(slots == slot[:, None], slot_second, slot_smallest)


@triton.jit
def append(entries, count, stride, flat, value, listed):
    """Appends (flat, value) of the listed rows to the entries of a worklist, which are ``stride`` elements apart, and adds their number to
    ``count``."""
    ones = tl.where(listed, 1, 0)
    position = tl.atomic_add(count, tl.sum(ones, axis=0)) + tl.cumsum(ones, axis=0) - 1
    entry = entries + position.to(tl.int64) * stride
    tl.store(entry, flat, mask=listed)
    tl.store(entry + 1, value.to(tl.int64), mask=listed)


# Triton would compile the kernel again for sizes that are 1 or multiples of 16. Only masks and indices depend on these two.
@triton.jit(do_not_specialize=["rows", "codes"])
def codebook_screen_kernel(
    rows_packed, product_scale, row_error, codes_packed, half_norm, error_weight, indices, worklist, counts,
    rows, codes, padded_rows, padded_codes, padded_dim, half_norm_rounding,
    HALF: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr, TILE_BITS: tl.constexpr,
):  # fmt: skip
    """Writes the code with the smallest lower bound of the score for each row, and lists the rows for which another code may be as near.
    Grid: (blocks of rows, heads).

    Pointers: the packed rows and codes with their bounds are those that :mod:`fastvae.kernels._codebook_pack` writes; indices (heads, rows)
    int64; worklist (heads * rows, 2) int64; counts (2,) int32, the numbers of pairs and of open rows. An entry of the worklist begins with
    the index of its row, head * rows + row. Pairs follow one another from the beginning; their second element is the other code. Open rows
    follow one another from the end backwards; their second element has the bits of a float32, an upper bound of the row's smallest score,
    infinite where the row is too large for scores.

    ``half_norm_rounding`` and the error bounds are described at :class:`fastvae.kernels._launch.Screen`, DIM and COLUMNS at
    :func:`products`. The codes are screened in tiles of CODES, the j-th code of each in slot j. A slot keeps its two smallest scores, whose
    low TILE_BITS bits hold the number of the tile. Where the two smallest scores of a row come from one slot, a third one there may have
    been lost. It is not below the second, so the row is open where the second is not above the upper bound.
    """
    MASK: tl.constexpr = (1 << TILE_BITS) - 1
    head, first_row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    lane, slot = tl.arange(0, ROWS), tl.arange(0, CODES)
    row = first_row + lane
    first_packed_row = head * padded_rows + first_row
    scale, error = tl.load(product_scale + first_packed_row + lane), tl.load(row_error + first_packed_row + lane)
    # NOT_FINITE and TOO_LARGE are not positive. Such rows get the half norms as scores, which nothing below relies on.
    screened = scale > 0.0
    minus_scale, minus_error = tl.where(screened, -scale, 0.0)[:, None], tl.where(screened, -error, 0.0)[:, None]
    rows_packed += first_packed_row * padded_dim
    codes_packed += head * padded_codes * padded_dim
    half_norm += head * padded_codes
    error_weight += head * padded_codes
    if HALF and DIM == COLUMNS:  # noqa: SIM108 (Triton evaluates both sides of a conditional expression)
        row_block = tl.load(rows_packed + (lane[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]))
    else:
        row_block = None

    smallest, smallest_code = tl.full([ROWS], INFINITY, tl.float32), tl.zeros([ROWS], tl.int32)
    second, second_code = tl.full([ROWS], INFINITY, tl.float32), tl.zeros([ROWS], tl.int32)
    third = tl.full([ROWS], INFINITY, tl.float32)
    tiles = padded_codes // CODES
    for first_tile in range(0, tiles, MASK + 1):
        # The initial value is above every score, also those of codes that are never the nearest.
        slot_smallest = tl.full([ROWS, CODES], 2.0 * NEVER_NEAREST, tl.float32)
        slot_second = tl.full([ROWS, CODES], 2.0 * NEVER_NEAREST, tl.float32)
        for tile in range(first_tile, tl.minimum(first_tile + MASK + 1, tiles)):
            first_code = tl.cast(tile, tl.int64) * CODES
            product = products(rows_packed, codes_packed + first_code * padded_dim, padded_dim, row_block, HALF, DIM, COLUMNS, ROWS, CODES)
            norms, weights = tl.load(half_norm + first_code + slot), tl.load(error_weight + first_code + slot)
            score = lower_bound(product, norms[None, :], weights[None, :], minus_scale, minus_error)
            # It stays a lower bound: half_norm_rounding and ROW_ERROR_SLACK have room for a change of the low bits.
            score = ((score.to(tl.int32, bitcast=True) & ~MASK) | (tile - first_tile)).to(tl.float32, bitcast=True)
            slot_second = tl.minimum(slot_second, tl.maximum(slot_smallest, score))
            slot_smallest = tl.minimum(slot_smallest, score)
        for _ in tl.static_range(2):
            taken, taken_code, slot_smallest = take_smallest(slot_smallest, slot_second, first_tile, MASK, CODES)
            smallest, smallest_code, second, second_code, third = insert(
                taken, taken_code, smallest, smallest_code, second, second_code, third
            )
        third = tl.minimum(third, tl.min(slot_smallest, axis=1))

    # Rows that were not screened get a bound too, which is replaced or not used.
    bound = upper_bound(smallest, tl.load(half_norm + smallest_code), tl.load(error_weight + smallest_code), error, half_norm_rounding)
    searched, too_large = (row < rows) & (scale != NOT_FINITE), scale == TOO_LARGE
    flat = head * rows + row
    # Where no code can be the nearest, the smallest score may be that of padding, whose index is not below `codes`.
    tl.store(indices + flat, tl.where(searched, tl.minimum(smallest_code, codes - 1), 0).to(tl.int64), mask=row < rows)
    is_open = searched & (too_large | (third <= bound))
    append(worklist, counts, 2, flat, second_code, searched & (second <= bound) & (is_open == 0))
    last = worklist + (tl.num_programs(1).to(tl.int64) * rows - 1) * 2
    append(last, counts + 1, -2, flat, tl.where(too_large, INFINITY, bound).to(tl.int32, bitcast=True), is_open)


class Rows(NamedTuple):
    """Rows are the vectors of a tensor (heads, rows, dim) with contiguous elements, and the strides of its heads and rows."""

    tensor: Tensor
    head_stride: int
    stride: int


def rows_of(tensor: Tensor) -> Rows:
    """Returns the vectors of a tensor (heads, rows, dim). It copies them where their elements are not contiguous."""
    dense = tensor if tensor.shape[2] == 1 or tensor.stride(2) == 1 else tensor.contiguous()
    return Rows(dense, dense.stride(0), dense.stride(1))


def nearest(x: Rows, codebook: Rows) -> Tensor:
    """Returns the indices (heads, rows) int64 of the nearest codes, which are 0 for rows that are not finite."""
    heads, rows, dim = x.tensor.shape
    codes = codebook.tensor.shape[1]
    device, new = x.tensor.device, x.tensor.new_empty
    indices = new((heads, rows), dtype=torch.int64)
    if indices.numel() == 0:
        return indices
    machine = _device.machine(device)
    plan = _launch.screen(heads, rows, codes, dim, machine)
    packed_dtype = torch.float16 if plan.half else torch.float32
    # All begin at 0: the numbers of pairs and of open rows, the maximum max_quarter of each head, the ticket counter of each open row.
    counters = torch.zeros((2 + heads + heads * rows,), dtype=torch.int32, device=device)
    counts, max_quarter, tickets = counters.split((2, heads, heads * rows))
    # Rows and codes are packed minus the mean of the codes; hashes find repeated codes, see fastvae.kernels._codebook_pack.
    mean = codebook.tensor.mean(1, dtype=torch.float32)
    hashes = new((heads, codes), dtype=torch.int64)
    packed_rows, packed_codes = (new((heads, n, plan.dim), dtype=packed_dtype) for n in (plan.rows, plan.codes))
    product_scale, row_error = new((2, heads, plan.rows), dtype=torch.float32)
    half_norm, error_weight = new((2, heads, plan.codes), dtype=torch.float32)
    worklist = new((heads * rows, 2), dtype=torch.int64)
    # The recheck stores the nearest code of each split of an open row here.
    winners = new((heads * rows, plan.recheck_splits), dtype=torch.int32)
    screened = packed_rows, product_scale, row_error, packed_codes, half_norm, error_weight
    pack_options = {"ROWS": plan.pack_rows, "COLUMNS": plan.pack_columns, **_launch.OPTIONS}
    with _device.on(device):
        codebook_measure_kernel[triton.cdiv(codes, plan.pack_rows), heads](
            codebook.tensor, mean, max_quarter, hashes, *codebook[1:], codes, dim, **pack_options
        )
        codebook_pack_codes_kernel[triton.cdiv(plan.codes, plan.pack_rows), heads](
            codebook.tensor, mean, max_quarter, hashes, packed_codes, half_norm, error_weight, *codebook[1:],
            codes, dim, plan.codes, plan.dim, plan.unit, plan.half_norm_rounding, HALF=plan.half, **pack_options,
        )  # fmt: skip
        codebook_pack_rows_kernel[triton.cdiv(plan.rows, plan.pack_rows), heads](
            x.tensor, mean, max_quarter, packed_rows, product_scale, row_error, *x[1:], rows, dim, plan.rows, plan.dim, plan.rounding,
            HALF=plan.half, **pack_options,
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
