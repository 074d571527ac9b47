"""RMS normalisation and its activation in plain PyTorch, block by block, for contiguous tensors and for channels that are last in memory.

A tensor is seen as (samples, channels, positions), or as (samples, positions, channels) where its channels are last. A block holds all
channels of some positions, so that one of samples whose positions are few holds several samples.
"""

import torch
from torch import Tensor

from fastvae.fallback._blocks import Block, Rooms, written
from fastvae.fallback._layout import ChannelLayout
from fastvae.fallback._norm_activations import write_activated
from fastvae.fallback._register import implements
from fastvae.ops import rms_norm as ops
from fastvae.ops._results import accumulation_dtype, empty_in_layout
from fastvae.ops.group_norm import torch_activation
from fastvae.ops.rms_norm import EPS_MODES


def _of_samples(parameter: Tensor, block: Block) -> Tensor:
    """The part of a parameter, (samples or 1, ...), that belongs to a block."""
    return parameter if parameter.shape[0] == 1 else parameter[block[0]]


class _Affine:
    """Weight and bias, either of which may be absent, as (samples or 1, channels) with a dimension for the positions."""

    def __init__(self, layout: ChannelLayout, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype):
        self.weight, self.bias = (None if p is None else layout.per_channel(p, dtype) for p in (weight, bias))

    def scale(self, values: Tensor, block: Block) -> Tensor:
        """``values * weight`` in new memory, or ``values``."""
        return values if self.weight is None else values * _of_samples(self.weight, block)

    def apply(self, normal: Tensor, block: Block) -> Tensor:
        """``normal * weight + bias`` in new memory, or ``normal``."""
        scaled = self.scale(normal, block)
        return scaled if self.bias is None else scaled + _of_samples(self.bias, block)


@implements(ops.forward)
def rms_norm_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, dtype = arguments.input, accumulation_dtype(arguments.input.dtype)
    layout, results = ChannelLayout(input), arguments.allocate()
    if not input.numel():
        results.rrms.zero_()
    elements, outputs = layout.matrices(input), layout.matrices(results.output)
    table = results.rrms.view(layout.samples, layout.positions).unsqueeze(layout.axis)
    affine = _Affine(layout, arguments.weight, arguments.bias, dtype)
    with Rooms(dtype) as rooms:
        for block in layout.blocks():
            values = rooms["elements"].widened(layout.part(elements, block))
            rrms = layout.part(table, block)
            _write_rrms(rrms, torch.linalg.vector_norm(values, dim=layout.axis, keepdim=True), arguments)
            normal = torch.mul(values, rrms, out=rooms["normal"].like(values))
            write_activated(layout.part(outputs, block), affine.apply(normal, block), arguments.activation)
    return results


def _write_rrms(rrms: Tensor, norms: Tensor, arguments: ops.ForwardArguments) -> None:
    channels = max(arguments.input.shape[1], 1)
    if arguments.eps_mode == EPS_MODES["add"]:
        rrms.copy_(norms.square_().div_(channels).add_(arguments.eps).rsqrt_())
    else:
        # The root is multiplied first, so that where eps bounds the norm the result is the limit to the last bit.
        rrms.copy_(norms.div_(channels**0.5).reciprocal_().clamp_(max=ops.limit_of_rrms(channels, arguments.eps)))


@implements(ops.backward)
def rms_norm_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input = arguments.input
    grad_input = empty_in_layout(input)
    with Rooms(accumulation_dtype(input.dtype)) as rooms:
        backward = _Backward(arguments, rooms)
        matrices = [backward.layout.matrices(t) for t in (input, arguments.grad_output, grad_input)]
        for block in backward.layout.blocks():
            backward.write(block, *(backward.layout.part(t, block) for t in matrices))
    return ops.BackwardResults(grad_input, *(backward.gradient(name) for name in ("weight", "bias")))


class _Backward:
    """The backward pass: writes the gradient of a block's elements, and adds to those of weight and bias."""

    def __init__(self, arguments: ops.BackwardArguments, rooms: Rooms):
        self.arguments, self.rooms, self.dtype = arguments, rooms, rooms.dtype
        self.activation = torch_activation(arguments.activation)
        self.layout = layout = ChannelLayout(arguments.input)
        self.rrms = arguments.rrms.reshape(layout.samples, layout.positions).unsqueeze(layout.axis)
        self.affine = _Affine(layout, arguments.weight, arguments.bias, self.dtype)
        parameters = {"weight": self.affine.weight, "bias": self.affine.bias}
        self.sums = {name: torch.zeros_like(parameter) for name, parameter in parameters.items() if parameter is not None}

    def write(self, block: Block, elements: Tensor, grad_output: Tensor, result: Tensor) -> None:
        """(weight du - n mean(weight du n)) rrms for the normalised elements n = x rrms."""
        rrms = self.layout.part(self.rrms, block)
        values, grad = self.rooms["elements"].widened(elements), self.rooms["incoming"].widened(grad_output)
        normal = torch.mul(values, rrms, out=self.rooms["normal"].like(values))
        if self.activation is not None:
            grad = self.activation.backward(grad, self.affine.apply(normal, block))
        self._add("weight", block, grad * normal)
        self._add("bias", block, grad)
        grad = self.affine.scale(grad, block)
        projection = (grad * normal).mean(self.layout.axis, keepdim=True)
        if self.arguments.eps_mode == EPS_MODES["clamp"]:
            # Where the bound decides, 1 / RMS is a constant.
            projection.masked_fill_(rrms >= ops.limit_of_rrms(self.layout.channels, self.arguments.eps), 0.0)
        with written(result, self.rooms["result"]) as out:
            torch.addcmul(grad, normal, projection, value=-1.0, out=out).mul_(rrms)

    def gradient(self, name: str) -> Tensor:
        """The gradient of a parameter, without elements where it is absent."""
        parameter = getattr(self.arguments, name)
        if parameter is None:
            return self.arguments.input.new_empty((0,))
        return self.sums[name].reshape(parameter.shape).to(parameter.dtype)

    def _add(self, name: str, block: Block, terms: Tensor) -> None:
        if name in self.sums:
            part = _of_samples(self.sums[name], block)
            part.add_(terms.sum_to_size(part.shape))
