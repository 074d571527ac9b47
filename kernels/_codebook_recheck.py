"""The last kernel of the exact search decides the rows that the screen lists.

=======================  ================  =======================================================  =============================
kernel                   grid              reads                                                    writes
=======================  ================  =======================================================  =============================
codebook_recheck_kernel  (groups, splits)  x, codebook, the packed vectors with bounds, worklist    indices, winners, tickets
=======================  ================  =======================================================  =============================

The worklist contains pairs, rows for which the screen left two codes, and open rows, for which it left more or cannot say how many. One
program decides a pair. The codes of an open row are split among the programs of a group: each computes the bounds of the scores of its
codes again, compares those exactly whose lower bound is at most the smallest upper bound so far, and stores the nearest of them; the last
program of the group decides between these. The result does not depend on the order, because the nearest code is exact, ties included.
"""

import triton
import triton.language as tl

from fastvae.kernels._codebook_exact import NO_CODE, nearest_exactly
from fastvae.kernels._codebook_pack import INFINITY, NEVER_NEAREST, TOO_LARGE, lower_bound, upper_bound
from fastvae.kernels._reduce import is_last, store_slots


@triton.jit
def decide_pair(row, codebook, half_norm, one, other, code_stride, dim, COLUMNS: tl.constexpr):
    """Returns the nearer of two codes."""
    code = tl.where(tl.arange(0, 2) == 0, one, other)
    return nearest_exactly(row, codebook, code, tl.load(half_norm + code) < NEVER_NEAREST, code_stride, dim, 2, COLUMNS)


@triton.jit
def decide_candidates(
    nearest, row, codebook, code, candidate, code_stride, dim, CODES: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Returns the nearest of the candidates among ``code`` and of the code ``nearest``, which may be NO_CODE. The candidates move to the
    first lanes of blocks of CODES, whose last lane has ``nearest``, so that nothing is computed for the other codes."""
    lane = tl.arange(0, CODES)
    number = tl.cumsum(candidate.to(tl.int32), axis=0)
    for first in range(0, tl.max(number, axis=0), CODES - 1):
        moved = candidate[None, :] & (number[None, :] == first + 1 + lane[:, None])
        block = tl.max(tl.where(moved, code[None, :], NO_CODE), axis=1)
        block = tl.where(lane == CODES - 1, nearest, block)
        nearest = nearest_exactly(row, codebook, block, block >= 0, code_stride, dim, CODES, COLUMNS)
    return nearest


@triton.jit
def packed_products(row_packed, codes_packed, padded_dim, CODES: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the products (CODES,) of a packed row and the packed codes that begin at the pointer."""
    code = tl.arange(0, CODES)
    total = tl.zeros([CODES], tl.float32)
    for first in range(0, padded_dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = column < padded_dim
        values = tl.load(row_packed + column, mask=mask, other=0.0).to(tl.float32)
        codes = tl.load(codes_packed + (code[:, None] * padded_dim + column[None, :]), mask=mask[None, :], other=0.0).to(tl.float32)
        total += tl.sum(values[None, :] * codes, axis=1)
    return total


@triton.jit
def nearest_of_split(
    row, codebook, row_packed, codes_packed, half_norm, error_weight, scale, error, bound, split, splits,
    code_stride, dim, padded_codes, padded_dim, half_norm_rounding,
    TILE_CODES: tl.constexpr, TILE_COLUMNS: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Returns the nearest code of one split, which has every ``splits``-th tile of codes, or NO_CODE where none is a candidate. ``bound``
    is an upper bound of the smallest score, infinite where the row has no scores."""
    lane = tl.arange(0, TILE_CODES)
    nearest = tl.cast(NO_CODE, tl.int64)
    no_scores = tl.where(scale == TOO_LARGE, INFINITY, 0.0)
    for tile in range(split, padded_codes // TILE_CODES, splits):
        first_code = tl.cast(tile, tl.int64) * TILE_CODES
        product = packed_products(row_packed, codes_packed + first_code * padded_dim, padded_dim, TILE_CODES, TILE_COLUMNS)
        norms, weights = tl.load(half_norm + first_code + lane), tl.load(error_weight + first_code + lane)
        used = norms < NEVER_NEAREST
        lower = lower_bound(product, norms, weights, -scale, -error)
        upper = upper_bound(lower, norms, weights, error, half_norm_rounding) + no_scores
        bound = tl.minimum(bound, tl.min(tl.where(used, upper, INFINITY), axis=0))
        nearest = decide_candidates(
            nearest, row, codebook, first_code + lane, used & (lower <= bound), code_stride, dim, CODES, COLUMNS
        )  # fmt: skip
    return nearest


@triton.jit(do_not_specialize=["heads", "rows"])
def codebook_recheck_kernel(
    x, codebook, rows_packed, product_scale, row_error, codes_packed, half_norm, error_weight, indices, worklist, counts, winners, tickets,
    x_head_stride, x_stride, code_head_stride, code_stride, heads, rows, dim, padded_rows, padded_codes, padded_dim, half_norm_rounding,
    TILE_CODES: tl.constexpr, TILE_COLUMNS: tl.constexpr, CODES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Decides the rows of the worklist. Grid: (groups, splits); a program takes pairs in turn, a group takes open rows in turn.

    Pointers: x (heads, rows, dim); codebook (heads, codes, dim); the packed vectors, their bounds, indices, worklist and counts as in
    :mod:`fastvae.kernels._codebook_search`; winners (heads * rows, splits) int32, the nearest code of each split of an open row; tickets
    (heads * rows,) int32, the ticket counters of the open rows, which are 0.
    """
    group, groups, split, splits = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    for entry in range(group * splits + split, tl.load(counts), groups * splits):
        record = worklist + tl.cast(entry, tl.int64) * 2
        flat, other = tl.load(record), tl.load(record + 1)
        head, number = flat // rows, flat % rows
        row, codes = x + head * x_head_stride + number * x_stride, codebook + head * code_head_stride
        norms = half_norm + head * padded_codes
        nearest = decide_pair(row, codes, norms, tl.load(indices + flat), other, code_stride, dim, TILE_COLUMNS)
        tl.store(indices + flat, tl.maximum(nearest, 0))
    last = tl.cast(heads, tl.int64) * rows - 1
    for entry in range(group, tl.load(counts + 1), groups):
        record = worklist + (last - entry) * 2
        flat, bound = tl.load(record), tl.load(record + 1).to(tl.int32).to(tl.float32, bitcast=True)
        head, number = flat // rows, flat % rows
        row, codes = x + head * x_head_stride + number * x_stride, codebook + head * code_head_stride
        packed, first_code = head * padded_rows + number, head * padded_codes
        winner = nearest_of_split(
            row, codes, rows_packed + packed * padded_dim, codes_packed + first_code * padded_dim,
            half_norm + first_code, error_weight + first_code, tl.load(product_scale + packed), tl.load(row_error + packed), bound,
            split, splits, code_stride, dim, padded_codes, padded_dim, half_norm_rounding, TILE_CODES, TILE_COLUMNS, CODES, COLUMNS,
        )  # fmt: skip
        slots = winners + tl.cast(entry, tl.int64) * splits
        store_slots(slots + split, winner.to(tl.int32), None)
        if is_last(tickets + entry, splits):
            lane = tl.arange(0, CODES)
            # The load bypasses the L1 cache, which does not see what other multiprocessors write.
            code = tl.load(slots + lane, mask=lane < splits, other=NO_CODE, cache_modifier=".cg").to(tl.int64)
            nearest = nearest_exactly(row, codes, code, code >= 0, code_stride, dim, CODES, COLUMNS)
            tl.store(indices + flat, tl.maximum(nearest, 0))
