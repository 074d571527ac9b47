"""The partition of a tensor for the RMS norm kernels, and the device functions that their forward and backward passes share.

Throughout, rrms is 1 / RMS of the channels of a position, n = x * rrms the normalised input, u = n * weight + bias the pre-activation and
du the gradient with respect to it.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvae.kernels import _launch
from fastvae.kernels._norm import SECTOR_BYTES, differentiate, load, load_parameter, split_evenly
from fastvae.ops.rms_norm import EPS_MODES

CLAMP = tl.constexpr(EPS_MODES["clamp"])

# The elements of a block at most, those of 512 threads in float32 and of 256 in 16 bits, unless MIN_RUN positions have more.
MAX_ELEMENTS = 4096

# The most channels that a program keeps on chip, by whether they are last. In contiguous memory they come with MIN_RUN positions, for which
# a program has 1024 threads in float32.
MAX_CHANNELS = {True: 4096, False: 1024}

# In contiguous memory a block reads a run of adjacent positions of each channel: two sectors, which memory delivers together, where the
# channels leave room for that, and MIN_RUN positions or more, which are a sector of float32 and one access of a thread in 16 bits.
RUN_BYTES, MIN_RUN = 2 * SECTOR_BYTES, 8

# Positions of a block that does not hold all channels. In 16 bits the partial sums of the backward pass, two float32 for each channel of a
# block, are then 1/24 of what it moves.
TILE_ROWS = 32

# The registers of a thread of the backward kernel that keeps all channels, by the bytes of an element and whether the channels are last. In
# 16 bits a thread has twice the elements, and in channels-last memory it keeps sums of each. NVIDIA's assembler keeps to that for sm_80 and
# sm_90. For other architectures, and in the kernels that read tiles, it would spill some, also on its own account to make room for more
# programs; it does not where it may use MAX_REGISTERS.
BACKWARD_REGISTERS = {(4, False): 64, (4, True): 96, (2, False): 128, (2, True): 128}
LIMITED_ARCHITECTURES, MAX_REGISTERS = ("sm_80", "sm_90"), 160
# The registers of a multiprocessor, which all threads of a program share.
REGISTER_FILE = 65_536


@dataclass(frozen=True)
class PositionBlocks:
    """The blocks of (``rows``, ``columns``) positions and channels that a program loads, and its warps.

    ``whole`` says whether a block has all channels of its positions. Where it has not, a program reads the tiles of ``columns`` channels
    one after the other, twice.
    """

    rows: int
    columns: int
    warps: int
    whole: bool


def position_blocks(channels: int, positions: int, channels_last: bool, itemsize: int, machine: _launch.Machine) -> PositionBlocks:
    """Blocks of all channels where they fit on chip, with as many positions as fill a program or a run of contiguous memory."""
    all_rows, columns = triton.next_power_of_2(positions), triton.next_power_of_2(channels)
    thread_elements = _launch.elements_per_thread(itemsize)
    elements = thread_elements * machine.threads
    if columns > MAX_CHANNELS[channels_last]:
        rows = min(all_rows, TILE_ROWS)
        return PositionBlocks(rows, elements // rows, _launch.WARPS, whole=False)
    run, min_run = (1, 1) if channels_last else (RUN_BYTES // itemsize, MIN_RUN)
    rows = min(all_rows, max(min(max(run * columns, elements), MAX_ELEMENTS) // columns, min_run))
    threads = max(rows * columns // thread_elements, machine.threads)
    return PositionBlocks(rows, columns, threads // machine.warp_size, whole=True)


def backward_splits(batch: int, positions: int, blocks: PositionBlocks, registers: int, machine: _launch.Machine) -> tuple[int, int]:
    """(split_positions, splits) of each sample for the backward pass, where each split has partial sums of its own.

    A program that keeps all channels handles several blocks, so that there are few partial sums. There are as many programs as run at once:
    a few more would wait for the others, and then take as long as those. A program that does not keep them handles one block.
    """
    if not blocks.whole:
        return split_evenly(positions, blocks.rows, positions)
    # _launch.PROGRAMS counts eight programs of four warps with 64 registers a thread on each multiprocessor.
    programs = machine.programs // 8 * max(8 * _launch.WARPS * 64 // (blocks.warps * registers), 1)
    return split_evenly(positions, blocks.rows, programs // batch)


def register_limit(blocks: PositionBlocks, registers: int, machine: _launch.Machine) -> dict:
    """The option that limits a kernel to so many registers a thread, or to more where that would spill. AMD's assembler takes none."""
    if not machine.architecture.startswith("sm_"):
        return {}
    most = registers if blocks.whole and machine.architecture in LIMITED_ARCHITECTURES else MAX_REGISTERS
    return {"maxnreg": min(most, REGISTER_FILE // (blocks.warps * machine.warp_size))}


@triton.jit
def reciprocal_rms(mean_square, bound, EPS_MODE: tl.constexpr):
    """rrms of positions; ``bound`` is eps, or in the mode "clamp" the largest rrms."""
    if EPS_MODE == CLAMP:
        rrms = 1.0 / tl.sqrt(mean_square)
        # The comparison keeps NaN.
        return tl.where(rrms > bound, bound, rrms)
    else:
        return 1.0 / tl.sqrt(mean_square + bound)


@triton.jit
def gradient_through_rrms(sum_wdu_n, channels, rrms, bound, EPS_MODE: tl.constexpr):
    """The mean over the channels of w * du * n, which times n is the part of the gradient that flows through rrms.

    Where the bound of the mode "clamp" decides, rrms is a constant, through which nothing flows.
    """
    mean = sum_wdu_n / channels
    if EPS_MODE == CLAMP:
        return tl.where(rrms >= bound, 0.0, mean)
    else:
        return mean


@triton.jit
def position_offsets(start, sample, positions, ROWS: tl.constexpr):
    """The offsets of ROWS positions from ``start`` on in a tensor with a value for each position, and the mask of those that exist."""
    position = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
    return sample * positions + position, position < positions


@triton.jit
def load_parameters(parameters, strides, sample, channel, mask):
    """The weight and the bias of the channels. A stride is the distance from sample to sample, 0 for a parameter that all samples share."""
    weight = load_parameter(parameters[0], sample * strides[0] + channel, mask, 1.0)
    return weight, load_parameter(parameters[1], sample * strides[1] + channel, mask, 0.0)


@triton.jit
def affine(normal, parameters):
    """u of a block."""
    return normal * parameters[0][None, :] + parameters[1][None, :]


@triton.jit
def load_normal_and_du(input, grad_output, offsets, mask, rrms, parameters, ACTIVATION: tl.constexpr):
    """n and du of a block. Both are 0 outside the mask, where x and grad_output are."""
    normal = load(input + offsets, mask) * rrms[:, None]
    return normal, differentiate(affine(normal, parameters), load(grad_output + offsets, mask), ACTIVATION)


@triton.jit
def summed_rows(terms, CHANNELS_LAST: tl.constexpr):
    """The terms of a block as the sums over blocks keep them. In channels-last memory a thread has its elements in many channels and few
    positions, so that sums of each element take no more registers, and no exchange among threads for every block."""
    if CHANNELS_LAST:
        return terms
    else:
        return tl.sum(terms, axis=0, keep_dims=True)
