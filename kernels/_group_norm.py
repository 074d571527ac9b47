"""The partition of a tensor for the group norm kernels, and the device functions that their forward and backward passes share.

Throughout, u = (x - mean) * rstd * weight + bias is the pre-activation, du the gradient with respect to it, and
xhat = (x - mean) * rstd the normalised input.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvae.kernels import _launch
from fastvae.kernels._norm import SECTOR_BYTES, differentiate, load, load_parameter, split_evenly


@dataclass(frozen=True)
class GroupNormBlocks:
    """The partition for groups that are read in splits. A program loads blocks of (``rows``, ``columns``) positions and channels.

    The channels of a sample are cut into ``tiles`` of ``columns`` channels, its positions into ``splits`` of ``split_positions``.
    """

    rows: int
    columns: int
    tiles: int
    split_positions: int
    splits: int


def blocks(batch: int, channels: int, positions: int, channels_last: bool, itemsize: int, machine: _launch.Machine) -> GroupNormBlocks:
    """Blocks that are long in the dimension in which memory is contiguous, and enough splits for two waves of programs."""
    elements = _launch.elements_per_thread(itemsize) * machine.threads
    if channels_last:
        columns = min(triton.next_power_of_2(channels), 128)
        rows = min(triton.next_power_of_2(positions), elements // columns)
    else:
        rows = min(triton.next_power_of_2(positions), elements)
        columns = min(triton.next_power_of_2(channels), elements // rows)
    tiles = triton.cdiv(channels, columns)
    return GroupNormBlocks(rows, columns, tiles, *split_evenly(positions, rows, triton.cdiv(2 * machine.programs, batch * tiles)))


@dataclass(frozen=True)
class GroupLimits:
    """The elements of a group that one program keeps on chip, and the threads of such a program at most."""

    elements: int
    threads: int


# Elements of a group for each thread of its program, below the limit of threads.
GROUP_THREAD_ELEMENTS = 16
# Of the largest groups a thread of the forward pass has 32 elements, which leaves a multiprocessor room for two programs in 16 bits. Of the
# backward pass it has 16 of each operand; more would spill. So would 1024 threads, which have 64 registers each, in float32, and in
# channels-last memory, where a thread keeps the weight and the bias of several channels.
FORWARD_LIMITS = GroupLimits(16_384, 512)
BACKWARD_LIMITS, WIDE_BACKWARD_LIMITS = GroupLimits(8192, 512), GroupLimits(16_384, 1024)


def backward_limits(channels_last: bool, itemsize: int) -> GroupLimits:
    return BACKWARD_LIMITS if channels_last or itemsize > 2 else WIDE_BACKWARD_LIMITS


@dataclass(frozen=True)
class WholeGroup:
    """The block of a program that keeps a whole group, (``rows``, ``columns``) positions and channels, and the warps of the program."""

    rows: int
    columns: int
    warps: int


def whole_group(
    width: int, positions: int, channels_last: bool, itemsize: int, limits: GroupLimits, machine: _launch.Machine
) -> WholeGroup | None:
    """The configuration for groups of ``width`` channels that one program each keeps on chip, so that they are read once a pass; None where
    they are too large for that, or so narrow that a program would waste most of each sector."""
    rows, columns = triton.next_power_of_2(positions), triton.next_power_of_2(width)
    fills_sectors = not channels_last or positions == 1 or width * itemsize >= SECTOR_BYTES
    if not fills_sectors or rows * columns > limits.elements:
        return None
    threads = min(max(rows * columns // GROUP_THREAD_ELEMENTS, machine.threads), limits.threads)
    return WholeGroup(rows, columns, threads // machine.warp_size)


@triton.jit
def two_floats(mean):
    """A float64 as the sum of two float32: the rounded value, which is the `centre` of the kernels, and the rounding error."""
    high = mean.to(tl.float32)
    return high, (mean - high.to(tl.float64)).to(tl.float32)


@triton.jit
def program_group(groups):
    """The group that this program handles: its index in (batch, groups), its sample, and its index in the sample."""
    program = tl.program_id(0)
    return program.to(tl.int64), (program // groups).to(tl.int64), (program % groups).to(tl.int64)


@triton.jit
def load_affine(moments, parameters, group, channel, mask):
    """(centre, scale, offset) of each channel, with u = (x - centre) * scale + offset.

    ``centre`` is the mean rounded to float32; the offset contains its rounding error.
    """
    centre, rest = two_floats(tl.load(moments[0] + group, mask=mask, other=0.0))
    scale = tl.load(moments[1] + group, mask=mask, other=0.0).to(tl.float32) * load_parameter(parameters[0], channel, mask, 1.0)
    return centre, scale, load_parameter(parameters[1], channel, mask, 0.0) - rest * scale


@triton.jit
def load_gradients(input, grad_output, offsets, mask, affine, ACTIVATION: tl.constexpr):
    """x - centre and du of a block of elements."""
    centre, scale, offset = affine
    difference = load(input + offsets, mask) - centre[None, :]
    return difference, differentiate(difference * scale[None, :] + offset[None, :], load(grad_output + offsets, mask), ACTIVATION)


@triton.jit
def load_moments(partial_moments, index, mask, first, channels, positions, split_positions, splits, width):
    """(elements, mean, sum of squared deviations) of the partial moments ``index`` of a group, in float64.

    Index i is channel i % width of the group in split i // width; ``first`` is the index of the group's first channel in split 0.
    """
    split = index // width
    slot = partial_moments + (first + split.to(tl.int64) * channels + index % width) * 3
    elements = tl.minimum(positions - split.to(tl.int64) * split_positions, split_positions).to(tl.float64)
    shift, total = tl.load(slot, mask=mask, other=0.0).to(tl.float64), tl.load(slot + 1, mask=mask, other=0.0).to(tl.float64)
    mean = shift + total / elements
    return tl.where(mask, elements, 0.0), tl.where(mask, mean, 0.0), tl.load(slot + 2, mask=mask, other=0.0).to(tl.float64)
