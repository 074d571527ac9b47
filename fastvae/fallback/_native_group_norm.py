"""Group normalisation and its activation of contiguous tensors by torch's own kernels for a CPU, block by block.

The kernels take the groups of all samples for those of one sample, with the parameters repeated: so a block is a run of groups, wherever
samples end, and blocks are few.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.fallback._blocks import Rooms, block_elements, even_step
from fastvae.fallback._norm_activations import write_activated
from fastvae.ops.group_norm import BackwardArguments, ForwardArguments, ForwardResults, torch_activation


class _Groups:
    """The groups of all samples in their order, and the blocks that they are cut into."""

    def __init__(self, input: Tensor, num_groups: int):
        self.samples, self.channels = input.shape[:2]
        self.width, self.positions = self.channels // num_groups, math.prod(input.shape[2:])
        # The kernels ask for the memory of their results anew, and larger pieces of it come as pages that the system clears first.
        limit = block_elements(input.device) // 2 // (self.width * self.positions)
        # The number of groups in a block.
        self.step = even_step(self.samples * num_groups, max(limit, 1))
        self.count = -(-self.samples * num_groups // self.step)

    def elements(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return self.split(tensor.reshape(1, self.samples * self.channels, self.positions), self.width)

    def statistics(self, table: Tensor) -> tuple[Tensor, ...]:
        """The blocks of a table (samples, groups)."""
        return self.split(table.view(1, -1))

    def columns(self, table: Tensor | None) -> tuple[Any, ...]:
        """The blocks of a table (samples, channels), which broadcast over the elements."""
        return self.none if table is None else self.split(table.reshape(1, -1, 1), self.width)

    def parameters(self, parameter: Tensor | None) -> tuple[Any, ...]:
        """The blocks of a parameter, a number for each channel, repeated for each sample."""
        if parameter is None:
            return self.none
        # The kernels read it as if it were contiguous, which reshape does not promise where a sample has one channel.
        repeated = parameter.expand(self.samples, -1).contiguous().view(-1)
        return self.split(repeated, self.width, dim=0)

    def split(self, table: Tensor, width: int = 1, dim: int = 1) -> tuple[Tensor, ...]:
        """The blocks of a table with ``width`` entries for each group."""
        return (table,) if self.count == 1 else table.split(self.step * width, dim)

    @property
    def none(self) -> tuple[None, ...]:
        """The blocks of what is absent."""
        return (None,) * self.count

    def sizes(self, elements: Tensor) -> tuple[int, int, int, int]:
        """The sizes of a block that the kernels take: samples, channels, positions, groups."""
        channels = elements.shape[1]
        return 1, channels, self.positions, channels // self.width


def normalise(arguments: ForwardArguments, results: ForwardResults, weight: Tensor | None, bias: Tensor | None, rooms: Rooms) -> None:
    """The forward pass. The kernel has no room for the digits of a large mean."""
    groups, eps = _Groups(arguments.input, arguments.num_groups), arguments.eps
    of_elements = zip(*(groups.elements(t) for t in (arguments.input, results.output)), strict=True)
    of_groups = zip(groups.statistics(results.mean), groups.statistics(results.rstd), strict=True)
    of_channels = zip(groups.parameters(weight), groups.parameters(bias), strict=True)
    for (piece, output), (mean, rstd), parameters in zip(of_elements, of_groups, of_channels, strict=True):
        wide = rooms["elements"].widened(piece)
        values, block_mean, block_rstd = torch.ops.aten.native_group_norm(wide, *parameters, *groups.sizes(wide), eps)
        mean.copy_(block_mean)
        rstd.copy_(block_rstd)
        write_activated(output, values, arguments.activation)


class Tables(NamedTuple):
    """Holds what the backward pass knows of groups, (samples, groups), and of channels, (samples, channels).

    ``scale`` and ``shift`` make the normalisation's result of the elements less ``center``.
    """

    mean: Tensor  # of the elements less the center
    rstd: Tensor
    scale: Tensor
    shift: Tensor
    center: Tensor | None


def backward(arguments: BackwardArguments, tables: Tables, weight: Tensor, grad_input: Tensor, rooms: Rooms) -> tuple[Tensor, Tensor]:
    """Writes the gradient of the input and returns those of weight and bias."""
    groups, activation = _Groups(arguments.input, arguments.num_groups), torch_activation(arguments.activation)
    of_elements = zip(*(groups.elements(t) for t in (arguments.input, arguments.grad_output, grad_input)), strict=True)
    of_groups = zip(groups.statistics(tables.mean), groups.statistics(tables.rstd), groups.parameters(weight), strict=True)
    of_channels = zip(groups.columns(tables.scale), groups.columns(tables.shift), groups.columns(tables.center), strict=True)
    of_parameters = []
    for (piece, incoming, result), statistics, (scale, shift, center) in zip(of_elements, of_groups, of_channels, strict=True):
        deviations, grad = rooms["elements"].widened(piece), rooms["incoming"].widened(incoming)
        if center is not None:
            deviations = torch.sub(deviations, center, out=rooms["elements"].like(piece))
        if activation is not None:
            u = torch.mul(deviations, scale, out=rooms["product"].like(piece)).add_(shift)
            grad = activation.backward(grad, u, grad_input=u)
        sizes = groups.sizes(deviations)
        of_piece, *gradients = torch.ops.aten.native_group_norm_backward(grad, deviations, *statistics, *sizes, [True] * 3)
        result.copy_(of_piece)
        of_parameters.append(gradients)
    shape = groups.samples, groups.channels
    grad_weight, grad_bias = (torch.cat(gradients).view(shape).sum(0) for gradients in zip(*of_parameters, strict=True))
    return grad_weight, grad_bias
