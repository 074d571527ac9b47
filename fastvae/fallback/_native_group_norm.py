"""Group normalisation and its activation of contiguous tensors by torch's own kernels for a CPU, block by block.

The kernels take the groups of all samples for those of one sample, with the parameters repeated: so a block is a run of groups, wherever
samples end, and blocks are few.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.fallback._blocks import Room, block_elements, even_step
from fastvae.fallback._norm_activations import write_activated
from fastvae.ops._results import accumulation_dtype
from fastvae.ops.group_norm import ForwardResults, TorchActivation


class Groups:
    """The groups of all samples in their order, and the blocks that they are cut into."""

    def __init__(self, input: Tensor, num_groups: int):
        self.samples, self.channels = input.shape[:2]
        self.width, self.positions = self.channels // num_groups, math.prod(input.shape[2:])
        limit = block_elements(input.device) // (self.width * self.positions)
        # The number of groups in a block.
        self.step = even_step(self.samples * num_groups, max(limit, 1))
        self.count = -(-self.samples * num_groups // self.step)

    def elements(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.reshape(1, self.samples * self.channels, self.positions).split(self.step * self.width, dim=1)

    def statistics(self, table: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a table (samples, groups)."""
        return table.view(1, -1).split(self.step, dim=1)

    def columns(self, table: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a table (samples, channels), which broadcast over the elements."""
        return table.reshape(1, -1, 1).split(self.step * self.width, dim=1)

    def parameters(self, parameter: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a parameter, a number for each channel."""
        return parameter.repeat(self.samples).split(self.step * self.width)

    def sizes(self, elements: Tensor) -> tuple[int, int, int, int]:
        """The sizes of a block that the kernels take: samples, channels, positions, groups."""
        channels = elements.shape[1]
        return 1, channels, self.positions, channels // self.width


def normalise(groups: Groups, input: Tensor, results: ForwardResults, weight: Tensor | None, bias: Tensor | None, eps, activation) -> None:
    """The forward pass. The kernel has no room for the digits of a large mean."""
    room = Room(accumulation_dtype(input.dtype))
    elements, outputs = groups.elements(input), groups.elements(results.output)
    tables = zip(groups.statistics(results.mean), groups.statistics(results.rstd), strict=True)
    parameters = zip(*([None] * groups.count if p is None else groups.parameters(p) for p in (weight, bias)), strict=True)
    for piece, output, (mean, rstd), parameters_of_block in zip(elements, outputs, tables, parameters, strict=True):
        wide = room.widened(piece)
        values, block_mean, block_rstd = torch.ops.aten.native_group_norm(wide, *parameters_of_block, *groups.sizes(wide), eps)
        mean.copy_(block_mean)
        rstd.copy_(block_rstd)
        write_activated(output, values, activation)


class Tables(NamedTuple):
    """Holds what the backward pass knows of groups, (samples, groups), and of channels, (samples, channels).

    ``scale`` and ``shift`` make the normalisation's result of the elements less ``center``.
    """

    mean: Tensor  # of the elements less the center
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    center: Tensor | None


def backward(
    groups: Groups,
    tables: Tables,
    weight: Tensor,
    activation: TorchActivation | None,
    input: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes the gradient of the input and returns those of weight and bias."""
    rooms, of_parameters = [Room(accumulation_dtype(input.dtype)) for _ in range(3)], []
    of_groups = zip(*(groups.statistics(t) for t in tables[:2]), groups.parameters(weight), strict=True)
    of_channels = zip(*([None] * groups.count if t is None else groups.columns(t) for t in tables[2:]), strict=True)
    of_elements = zip(*(groups.elements(t) for t in (input, grad_output, grad_input)), strict=True)
    for (piece, incoming, result), (scale, shift, center), statistics in zip(of_elements, of_channels, of_groups, strict=True):
        deviations, grad, u = rooms[0].widened(piece), rooms[1].widened(incoming), rooms[2].like(piece)
        if center is not None:
            deviations = torch.sub(deviations, center, out=rooms[0].like(piece))
        if activation is not None:
            torch.mul(deviations, scale, out=u).add_(shift)
            grad = activation.backward(grad, u, grad_input=u)
        sizes = groups.sizes(deviations)
        of_piece, *gradients = torch.ops.aten.native_group_norm_backward(grad, deviations, *statistics, *sizes, [True] * 3)
        result.copy_(of_piece)
        of_parameters.append(gradients)
    shape = groups.samples, groups.channels
    grad_weight, grad_bias = (torch.cat(gradients).view(shape).sum(0) for gradients in zip(*of_parameters, strict=True))
    return grad_weight, grad_bias
