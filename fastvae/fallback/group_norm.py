"""Group normalisation and its activation in plain PyTorch, block by block: contiguous tensors on a CPU by torch's own kernels, others by
formulas.

A tensor is seen as (samples, channels, positions), or as (samples, positions, channels) where its channels are last. Sums are taken over
positions first, so every operation on elements runs along contiguous memory, and what belongs to a group is a table (samples, groups).

float32 holds the difference of an element and its group's mean only where the mean is not much larger than the standard deviation. On a
CPU, which knows the statistics when they are computed, the elements are used as they are where that holds; elsewhere, and always on
another device, the mean is subtracted first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.fallback import _device, _native_group_norm
from fastvae.fallback._blocks import Block, Room, Rooms, block_elements, blocks
from fastvae.fallback._norm_activations import write_activated
from fastvae.fallback._register import implements
from fastvae.ops import group_norm as ops
from fastvae.ops._results import accumulation_dtype, channels_are_last, empty_in_layout
from fastvae.ops.group_norm import torch_activation

# The largest mean, in standard deviations, whose elements are used as they are: they lose two of float32's 24 bits at most.
_LARGEST_MEAN = 4.0


class _Layout:
    """How the elements of an input lie in memory, and the blocks of whole groups that they are cut into."""

    def __init__(self, input: Tensor, num_groups: int):
        self.last, self.num_groups, self.device = channels_are_last(input), num_groups, input.device
        self.samples, self.channels = input.shape[:2]
        self.width = self.channels // num_groups
        self.positions = input[0:1].numel() // max(self.channels, 1) if self.samples else 0
        # The number of elements of a group.
        self.count = self.width * self.positions
        self.axis = 1 if self.last else 2
        # torch's own kernel for channels that are last takes the variance as E[x^2] - E[x]^2, and its backward pass is slow.
        self.is_native = _device.is_cpu(self.device) and not self.last and input.numel() > 0

    def matrices(self, tensor: Tensor) -> Tensor:
        if self.last:
            return tensor.movedim(1, -1).reshape(self.samples, self.positions, self.channels)
        return tensor.reshape(self.samples, self.channels, self.positions)

    def blocks(self) -> Iterator[Block]:
        """Slices of samples and of groups. Memory where channels are last is contiguous for all groups together only."""
        columns, width = (1, self.count * self.num_groups) if self.last else (self.num_groups, self.count)
        for samples, groups in blocks(self.samples, columns, self.device, width):
            yield samples, slice(0, self.num_groups) if self.last or groups == slice(None) else groups

    def channels_of(self, block: Block) -> Block:
        samples, groups = block
        return samples, slice(groups.start * self.width, groups.stop * self.width)

    def pieces(self, matrices: Tensor, block: Block) -> tuple[Tensor, ...]:
        """A block in pieces that fit into the cache; only a sample whose channels are last may have several, along its positions."""
        if not self.last:
            return (matrices[self.channels_of(block)],)
        return matrices[block[0]].split(max(block_elements(self.device) // self.channels, 1), dim=1)

    def sums(self, elements: Tensor) -> Tensor:
        """Sums over positions, (samples, channels)."""
        samples, positions, threads = *elements.shape[:2], torch.get_num_threads()
        if not self.last or not _device.is_cpu(self.device) or samples >= threads or positions < threads:
            return elements.sum(self.axis)
        # So each thread sums what it wrote and will read. torch would split the channels, and move elements between the caches of cores.
        length = positions // threads
        parts = elements[:, : threads * length].unflatten(1, (threads, length)).sum(2).sum(1)
        return parts if threads * length == positions else parts.add_(elements[:, threads * length :].sum(1))

    def group_means(self, sums: Tensor) -> Tensor:
        """The means of the groups whose sums by channel are given, (samples, groups)."""
        return sums.view(sums.shape[0], -1, self.width).sum(2).div_(self.count)

    def by_channel(self, groups: Tensor) -> Tensor:
        """A table by group as one by channel."""
        return groups.repeat_interleave(self.width, dim=1)

    def spread(self, channels: Tensor) -> Tensor:
        """A table by channel as one that broadcasts over the elements."""
        return channels.unsqueeze(self.axis)

    def affine(self, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift by channel of ``weight * (x - mean) * rstd + bias``; the mean is small beside the deviations from it."""
        scale = self.by_channel(rstd) if weight is None else self.by_channel(rstd) * weight
        mean = self.by_channel(mean)
        return scale, (mean * scale).neg_() if bias is None else torch.addcmul(bias, mean, scale, value=-1.0)

    def apply(self, scale: Tensor, shift: Tensor, elements: Tensor, out: Tensor) -> Tensor:
        """``elements * scale + shift``, in ``out``, for a scale that :meth:`spread` gives and a shift that broadcasts over the elements."""
        if self.last:
            return torch.addcmul(shift, elements, scale, out=out)
        # One operation for both is slow where numbers repeat along memory.
        return torch.mul(elements, scale, out=out).add_(shift)

    def deviations(self, piece: Tensor, center: Tensor | None, room: Room) -> Tensor:
        """The elements of a piece less a number of each channel."""
        elements = room.widened(piece)
        return elements if center is None else torch.sub(elements, self.spread(center), out=room.like(piece))


def _total(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _is_small(mean: Tensor, rstd: Tensor) -> bool:
    """Whether the elements may be used as they are: not where a mean is NaN, a variance infinite, or the device would have to wait."""
    if not _device.is_cpu(mean.device):
        return False
    return not mean.numel() or (float((mean * rstd).abs_().max()) <= _LARGEST_MEAN and float(rstd.min()) > 0.0)


@implements(ops.forward)
def group_norm_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, dtype = arguments.input, accumulation_dtype(arguments.input.dtype)
    layout = _Layout(input, arguments.num_groups)
    output, mean, rstd = results = arguments.allocate()
    if not input.numel():
        mean.zero_()
        rstd.zero_()
    elements, outputs = layout.matrices(input), layout.matrices(output)
    # torch's own kernel reads them as if they were contiguous.
    weight, bias = (None if p is None else p.to(dtype).contiguous() for p in (arguments.weight, arguments.bias))
    with Rooms(dtype) as rooms:
        if layout.is_native:
            _native_group_norm.normalise(arguments, results, weight, bias, rooms)
        if not layout.is_native or not _is_small(mean, rstd):
            for block in layout.blocks():
                pieces, results_of_block = (layout.pieces(t, block) for t in (elements, outputs))
                channels = layout.channels_of(block)[1]
                block_weight, block_bias = (None if p is None else p[channels] for p in (weight, bias))
                tables = mean[block], rstd[block], block_weight, block_bias
                _normalise(layout, pieces, results_of_block, *tables, arguments.eps, arguments.activation, rooms)
    return results


def _normalise(layout: _Layout, pieces, results, mean, rstd, weight, bias, eps: float, activation: int, rooms: Rooms) -> None:
    """A block by formulas; ``mean`` and ``rstd`` are its parts of the statistics, and written."""
    center, rest = None, _write_statistics(layout, pieces, None, mean, rstd, eps, rooms)
    if not _is_small(mean, rstd):
        center, rest = layout.by_channel(rest), _write_statistics(layout, pieces, rest, mean, rstd, eps, rooms)
    scale, shift = (layout.spread(t) for t in layout.affine(rest, rstd.to(rest.dtype), weight, bias))
    for piece, result in zip(pieces, results, strict=True):
        values = layout.deviations(piece, center, rooms["elements"])
        write_activated(result, layout.apply(scale, shift, values, out=rooms["product"].like(piece)), activation)


def _write_statistics(layout: _Layout, pieces, center: Tensor | None, mean, rstd, eps: float, rooms: Rooms) -> Tensor:
    """Writes the statistics of a block from its deviations from ``center``, a number a group, and returns the mean of these."""
    spread, sums, squares = None if center is None else layout.by_channel(center), [], []
    for piece in pieces:
        deviations = layout.deviations(piece, spread, rooms["elements"])
        sums.append(layout.sums(deviations))
        squares.append(layout.sums(torch.mul(deviations, deviations, out=rooms["product"].like(piece))))
    rest = layout.group_means(_total(sums))
    rstd.copy_(layout.group_means(_total(squares)).sub_(rest.square()).clamp_(min=0.0)).add_(eps).rsqrt_()
    mean.copy_(rest if center is None else center.to(mean.dtype) + rest)
    return rest


@implements(ops.recompute)
def group_norm_recompute(arguments: ops.RecomputeArguments) -> Tensor:
    # torch's own kernel computes statistics and output in one.
    return group_norm_forward(arguments.forward).output


@implements(ops.backward)
def group_norm_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input = arguments.input
    grad_input = empty_in_layout(input)
    with Rooms(accumulation_dtype(input.dtype)) as rooms:
        backward = _Backward(arguments, rooms)
        if backward.layout.is_native:
            backward.natively(arguments, grad_input)
        else:
            matrices = [backward.layout.matrices(t) for t in (input, arguments.grad_output, grad_input)]
            for block in backward.layout.blocks():
                backward.by_formulas(block, *(backward.layout.pieces(t, block) for t in matrices))
    parameters = ((arguments.weight, backward.grad_weight), (arguments.bias, backward.grad_bias))
    grads = (input.new_empty((0,)) if p is None else gradient.to(p.dtype) for p, gradient in parameters)
    return ops.BackwardResults(grad_input, *grads)


@implements(ops.restoring_backward)
def group_norm_restoring_backward(arguments: ops.RestoringBackwardArguments) -> ops.BackwardResults:
    results = group_norm_backward(arguments.backward)
    arguments.grad_output.copy_(group_norm_recompute(arguments.recompute))
    return results


class _Backward:
    """The backward pass: each way writes the gradient of the elements and those of weight and bias."""

    def __init__(self, arguments: ops.BackwardArguments, rooms: Rooms):
        input, mean, rstd, weight, bias = arguments[1:6]
        self.layout, self.rooms, self.dtype = _Layout(input, arguments.num_groups), rooms, rooms.dtype
        # Without what its dtype holds of a large mean an element keeps its digits.
        center = None if _is_small(mean, rstd) else mean.to(self.dtype)
        self.center = None if center is None else self.layout.by_channel(center)
        self.mean, self.rstd = (mean if center is None else mean - center).to(self.dtype), rstd.to(self.dtype)
        # torch's own kernel reads it as if it were contiguous.
        self.weight = input.new_ones(input.shape[1], dtype=self.dtype) if weight is None else weight.to(self.dtype).contiguous()
        self.scale, self.shift = self.layout.affine(self.mean, self.rstd, self.weight, None if bias is None else bias.to(self.dtype))
        self.grad_weight, self.grad_bias = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.activation = torch_activation(arguments.activation)

    def natively(self, arguments: ops.BackwardArguments, grad_input: Tensor) -> None:
        """All blocks by torch's own kernel."""
        tables = _native_group_norm.Tables(self.mean, self.rstd, self.scale, self.shift, self.center)
        self.grad_weight, self.grad_bias = _native_group_norm.backward(arguments, tables, self.weight, grad_input, self.rooms)

    def by_formulas(self, block: Block, pieces, grad_outputs, results) -> None:
        """rstd (g - mean(g) - n mean(g n)) for g = weight * grad and the normalised elements n = (deviations - mean) rstd."""
        layout, channels = self.layout, self.layout.channels_of(block)
        weight, scale, rstd = self.weight[channels[1]], self.scale[channels], layout.by_channel(self.rstd[block])
        mean, center = layout.by_channel(self.mean[block]), None if self.center is None else self.center[channels]
        spread = layout.spread(scale)
        sums, products, grads = [], [], self.memory(results)
        for piece, grad_output, grad in zip(pieces, grad_outputs, grads, strict=True):
            deviations = layout.deviations(piece, center, self.rooms["elements"])
            self.write_grad_affine(grad, grad_output, deviations, spread, layout.spread(self.shift[channels]))
            sums.append(layout.sums(grad))
            products.append(layout.sums(torch.mul(grad, deviations, out=self.rooms["product"].like(piece))))
        plain = _total(sums)
        with_normal = _total(products).addcmul_(plain, mean, value=-1.0).mul_(rstd)
        self.grad_weight[channels[1]].add_(with_normal.sum(0))
        self.grad_bias[channels[1]].add_(plain.sum(0))
        mean_grad, projection = (layout.by_channel(layout.group_means(t * weight)) * rstd for t in (plain, with_normal))
        slope = projection.mul_(rstd).neg_()
        shift = layout.spread((mean * slope).add_(mean_grad).neg_())
        for piece, grad, result in zip(pieces, grads, results, strict=True):
            deviations = layout.deviations(piece, center, self.rooms["elements"])
            of_deviations = layout.apply(layout.spread(slope), shift, deviations, out=self.rooms["product"].like(piece))
            layout.apply(spread, of_deviations, grad, out=grad)
            if grad is not result:
                result.copy_(grad)

    def memory(self, results: tuple[Tensor, ...]) -> list[Tensor]:
        """Memory for the gradients of a block's pieces: that of the results, where it is of the dtype."""
        return [t if t.dtype == self.dtype else self.rooms["gradient", i].like(t) for i, t in enumerate(results)]

    def write_grad_affine(self, grad: Tensor, grad_output: Tensor, deviations: Tensor, scale: Tensor, shift: Tensor) -> None:
        """Writes the gradient of the affine map's result."""
        if self.activation is None:
            grad.copy_(grad_output)
        else:
            u = self.layout.apply(scale, shift, deviations, out=self.rooms["product"].like(deviations))
            self.activation.backward(self.rooms["incoming"].widened(grad_output), u, grad_input=grad)
