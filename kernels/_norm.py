"""What the kernels of the normalisations share: the layout of their input, activation, parameters, and the block of a program.

Throughout, u is the normalised input times the weight plus the bias, and du the gradient with respect to it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastvae.kernels import _device, _launch
from fastvae.kernels._math import standard_normal
from fastvae.ops._results import channels_are_last, empty_in_layout
from fastvae.ops.group_norm import NORM_ACTIVATIONS

SILU, RELU = tl.constexpr(NORM_ACTIVATIONS["silu"]), tl.constexpr(NORM_ACTIVATIONS["relu"])
GELU = tl.constexpr(NORM_ACTIVATIONS["gelu"])

# Memory delivers sectors of 32 bytes. A program that reads fewer adjacent bytes wastes the rest of a sector.
SECTOR_BYTES = 32


@dataclass(frozen=True)
class NormCall:
    """The input of a call, contiguous or channels-last, with its sizes."""

    input: torch.Tensor
    channels_last: bool

    @property
    def batch(self) -> int:
        return self.input.shape[0]

    @property
    def channels(self) -> int:
        return self.input.shape[1]

    @property
    def positions(self) -> int:
        return self.input.shape[2:].numel()

    @property
    def machine(self) -> _launch.Machine:
        return _device.machine(self.input.device)

    def in_same_layout(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor`` in the layout of the input, copied only where it has another one."""
        fits = tensor.movedim(1, -1).is_contiguous() if self.channels_last else tensor.is_contiguous()
        return tensor if fits else empty_in_layout(self.input).copy_(tensor)


def dense(input: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """The input as the kernels read it, copied only where it is neither contiguous nor channels-last, and whether its channels are last."""
    channels_last = channels_are_last(input)
    return input if channels_last else input.contiguous(), channels_last


def contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """Parameters that may be absent, as the kernels read them."""
    return tuple(t if t is None else t.contiguous() for t in tensors)


def split_evenly(positions: int, rows: int, max_splits: int) -> tuple[int, int]:
    """(split_positions, splits): at most ``max_splits`` splits of the positions, but at least one, of whole blocks of ``rows``."""
    splits = max(1, min(triton.cdiv(positions, rows), max_splits))
    split_positions = triton.cdiv(triton.cdiv(positions, splits), rows) * rows
    return split_positions, triton.cdiv(positions, split_positions)


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        return u / (1.0 + tl.exp(-u))
    elif ACTIVATION == RELU:
        # The comparison is false for NaN, which stays.
        return tl.where(u <= 0, 0.0, u)
    elif ACTIVATION == GELU:
        _, distribution = standard_normal(u)
        return u * distribution
    else:
        return u


@triton.jit
def differentiate(u, grad_output, ACTIVATION: tl.constexpr):
    """du = act'(u) * grad_output."""
    if ACTIVATION == SILU:
        decay = tl.exp(-u)
        sigmoid = 1.0 / (1.0 + decay)
        # decay * sigmoid is 1 - sigmoid without a difference. Where decay overflows, that would be inf * 0, and the value is 1.
        complement = tl.where(u < -80.0, 1.0, decay * sigmoid)
        return grad_output * sigmoid * tl.fma(u, complement, 1.0)
    elif ACTIVATION == RELU:
        return tl.where(u <= 0, 0.0, grad_output)
    elif ACTIVATION == GELU:
        density, distribution = standard_normal(u)
        return grad_output * tl.fma(u, density, distribution)
    else:
        return grad_output


@triton.jit
def load_parameter(pointer, channel, mask, DEFAULT: tl.constexpr):
    """The weight or the bias of the channels in float32; DEFAULT where there is none."""
    if pointer is None:
        return tl.full(channel.shape, DEFAULT, tl.float32)
    else:
        return tl.load(pointer + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def program_split(positions, split_positions, tiles, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The part of the tensor that this program handles: sample, split, first channel, first position, end position.

    Program numbers count tiles first, then splits, then samples.
    """
    program = tl.program_id(0)
    sample, split = (program // tiles // splits).to(tl.int64), (program // tiles % splits).to(tl.int64)
    first = tl.multiple_of(split * split_positions, ROWS)
    return sample, split, (program % tiles).to(tl.int64) * COLUMNS, first, tl.minimum(first + split_positions, positions)


@triton.jit
def offset_in_sample(position, channel, positions, channels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return position[:, None] * channels + channel[None, :]
    else:
        return channel[None, :] * positions + position[:, None]


@triton.jit
def block_offsets(start, sample, channel, end_channel, channels, positions, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr):
    """The offsets of a block of elements, ROWS positions from ``start`` on by the channels ``channel``, and the mask of those that exist.

    The mask compares with all positions of the sample, not with the end of the split: a split ends with a whole block, and whether
    ``positions`` is a multiple of 16 is known at compile time, which makes accesses wider.
    """
    position = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
    mask = (position < positions)[:, None] & (channel < end_channel)[None, :]
    return sample * channels * positions + offset_in_sample(position, channel, positions, channels, CHANNELS_LAST), mask
