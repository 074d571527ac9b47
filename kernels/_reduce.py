"""Two-stage sums in one launch: every program leaves its sums in slots of its own, and the last to arrive adds the slots in their order."""

import triton
import triton.language as tl


@triton.jit
def is_last(ticket, programs):
    """Whether all other programs have been here. The last one puts the ticket back to 0 for the next launch."""
    # What this program's threads wrote comes before its arrival.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_slots(slots, columns, mask, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over ``count`` rows of slots, ``stride`` apart, at the block ``columns``; the order depends on ``count`` alone."""
    rows = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        pointers = slots + (first + rows).to(tl.int64) * stride + columns[None, :]
        # Past the first-level cache, which does not see what other multiprocessors write.
        total += tl.load(pointers, mask=(first + rows < count) & mask[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def sum_programs(slots, programs):
    """The sum of one slot a program."""
    column = tl.arange(0, 1)
    return tl.sum(sum_slots(slots, column, column == 0, programs, 1, 1024, 1), axis=0)


@triton.jit
def store_row_sums(sums, out, slots, ticket, row, rows, SPLIT: tl.constexpr):
    """``out[row] = sums``; with SPLIT, summed over the programs of grid axis 1, each of which has a part of the row."""
    if not SPLIT:
        tl.store(out + row, sums, mask=row < rows)
    else:
        split, splits = tl.program_id(1), tl.num_programs(1)
        tl.store(slots + split.to(tl.int64) * rows + row, sums, mask=row < rows)
        if is_last(ticket, tl.num_programs(0) * splits):
            store_slot_sums(out, slots, rows, splits)


@triton.jit
def store_slot_sums(out, slots, rows, splits):
    """``out`` of each row is the sum of its ``splits`` slots, which lie ``rows`` apart."""
    for first in range(0, rows, 16):
        column = first + tl.arange(0, 16)
        tl.store(out + column, sum_slots(slots, column, column < rows, splits, rows, 128, 16), mask=column < rows)
