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

THREAD_ELEMENTS, MAX_ELEMENTS = 16, 4096
MAX_CHANNELS = {True: 8192, False: 1024}
RUN_BYTES, MIN_RUN = 2 * SECTOR_BYTES, 8

# Positions of a block that does not hold all channels: the partial sums of a block, two float32 for each channel, are 1/24 of what it moves
# in 16 bits.
TILE_ROWS = 32


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
    """Blocks of all channels where they fit on chip, with as many positions as memory takes to be read well."""
    all_rows, columns = triton.next_power_of_2(positions), triton.next_power_of_2(channels)
    if columns > MAX_CHANNELS[channels_last]:
        rows = min(all_rows, TILE_ROWS)
        return PositionBlocks(rows, THREAD_ELEMENTS * machine.threads // rows, _launch.WARPS, False)
    run, min_run = (1, 1) if channels_last else (RUN_BYTES // itemsize, MIN_RUN)
    elements = min(max(run * columns, THREAD_ELEMENTS * machine.threads), MAX_ELEMENTS)
    rows = min(all_rows, max(elements // columns, min_run))
    threads = max(rows * columns // THREAD_ELEMENTS, machine.threads)
    return PositionBlocks(rows, columns, threads // machine.warp_size, True)


def backward_splits(batch: int, positions: int, blocks: PositionBlocks, machine: _launch.Machine) -> tuple[int, int]:
    """(split_positions, splits) of each sample for the backward pass, where each split has partial sums of its own.

    The programs that keep all channels handle several blocks each, so that there are few partial sums: as many programs as have the threads
    of ``machine.programs`` programs of the usual size. The others handle one block each.
    """
    max_splits = triton.cdiv(machine.programs * _launch.WARPS // blocks.warps, batch) if blocks.whole else positions
    return split_evenly(positions, blocks.rows, max_splits)


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
def sum_rows(terms, CHANNELS_LAST: tl.constexpr):
    """The terms of a block as they are added to those of other blocks."""
    if CHANNELS_LAST:
        return terms
    else:
        return tl.sum(terms, axis=0, keep_dims=True)
