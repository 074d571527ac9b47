"""Blocks of whole positions, for the families whose parameters are one value for each channel."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.fallback._blocks import Block, blocks
from fastvae.ops._results import channels_are_last


class ChannelLayout:
    """How the elements of an input lie in memory, and the blocks of whole positions that they are cut into."""

    def __init__(self, input: Tensor):
        self.last, self.device = channels_are_last(input), input.device
        self.samples, self.channels = input.shape[:2]
        self.positions = math.prod(input.shape[2:])
        # The dimension of the channels in a block, and that of the positions.
        self.axis = 2 if self.last else 1
        self.position_axis = 3 - self.axis

    def matrices(self, tensor: Tensor) -> Tensor:
        if self.last:
            return tensor.movedim(1, -1).reshape(self.samples, self.positions, self.channels)
        return tensor.reshape(self.samples, self.channels, self.positions)

    def blocks(self) -> Iterator[Block]:
        return blocks(self.samples, self.positions, self.device, self.channels)

    def part(self, matrices: Tensor, block: Block) -> Tensor:
        """A block of samples and positions."""
        samples, positions = block
        return matrices[samples, positions] if self.last else matrices[samples, :, positions]

    def per_channel(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        """A parameter as (samples or 1, channels) with a dimension for the positions."""
        return (parameter if parameter.ndim == 2 else parameter.unsqueeze(0)).to(dtype).unsqueeze(self.position_axis)
