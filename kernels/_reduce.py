"""Sums over several programs in one launch: each program stores its partial sums in slots that no other program writes, and the last
program to arrive, which a ticket counter tells, adds the slots in their order."""

import torch
import triton
import triton.language as tl

# Whether the kernels run on AMD's GPUs.
ON_AMD = tl.constexpr(torch.version.hip is not None)


@triton.jit
def store_slots(pointers, values, mask):
    """Stores values of 32 bits that the last program reads, see :func:`is_last`; every kernel stores its slots with it.

    The barrier of is_last waits for the stores of all threads on NVIDIA's GPUs alone. On AMD's a wavefront passes it while its stores are
    under way, and only the wavefront that takes the ticket waits for its own. So an atomic operation follows that changes nothing: it
    releases, for which the wavefront has to wait for its stores, and acquires, for which it has to wait for the operation.
    """
    tl.store(pointers, values, mask=mask)
    if ON_AMD:
        bits = pointers.to(tl.pointer_type(tl.int32), bitcast=True)
        tl.atomic_or(bits, 0, mask=mask, sem="acq_rel", scope="gpu")


@triton.jit
def is_last(ticket, programs):
    """Whether this program is the last of ``programs`` to arrive. The last one resets the ticket counter to 0 for the next launch."""
    # The slots of all threads of this program have to be stored before it arrives.
    tl.debug_barrier()
    last = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == programs - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def sum_slots(slots, columns, mask, count, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums over ``count`` rows of slots, which are ``stride`` apart, at the block ``columns``. The order depends on ``count`` alone."""
    rows = tl.arange(0, ROWS)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, count, ROWS):
        pointers = slots + (first + rows).to(tl.int64) * stride + columns[None, :]
        # The load bypasses the L1 cache, which does not see what other multiprocessors write.
        total += tl.load(pointers, mask=(first + rows < count) & mask[None, :], other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def sum_programs(slots, programs):
    """The sum of ``programs`` slots."""
    column = tl.arange(0, 1)
    return tl.sum(sum_slots(slots, column, column == 0, programs, 1, 1024, 1), axis=0)


@triton.jit
def store_row_sums(sums, out, slots, ticket, row, rows, SPLIT: tl.constexpr):
    """Stores ``out[row] = sums``. With SPLIT the sums are partial sums, and those of all programs of grid axis 1 are added."""
    if not SPLIT:
        tl.store(out + row, sums, mask=row < rows)
    else:
        split, splits = tl.program_id(1), tl.num_programs(1)
        store_slots(slots + split.to(tl.int64) * rows + row, sums, row < rows)
        if is_last(ticket, tl.num_programs(0) * splits):
            store_slot_sums(out, slots, rows, splits)


@triton.jit
def store_slot_sums(out, slots, rows, splits):
    """Stores in ``out`` (rows,) the sum of the ``splits`` slots of each row; slots are (splits, rows)."""
    for first in range(0, rows, 16):
        column = first + tl.arange(0, 16)
        tl.store(out + column, sum_slots(slots, column, column < rows, splits, rows, 128, 16), mask=column < rows)
