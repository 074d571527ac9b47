"""Group normalisation and its activation in plain PyTorch, block by block, for contiguous tensors and for channels that are last in memory.

A tensor is seen as (samples, channels, positions), or as (samples, positions, channels) where its channels are last. Sums are taken over
positions first, so every operation on elements runs along contiguous memory, and what belongs to a group is a table (samples, groups).

float32 holds the difference of an element and its group's mean only where the mean is not much larger than the standard deviation. On a
CPU, which knows the statistics when they are computed, the elements are used as they are where that holds; elsewhere, and always on
another device, the mean is subtracted first.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastvae.fallback import _device
from fastvae.fallback._blocks import Block, block_elements, blocks, widen, written
from fastvae.fallback._norm_activations import write_activated
from fastvae.fallback._register import implements
from fastvae.ops import group_norm as ops
from fastvae.ops._results import accumulation_dtype, channels_are_last, empty_in_layout
from fastvae.ops.group_norm import torch_activation

# torch's own kernels pass over a block less often than formulas do, so that blocks that are larger, and fewer, take less time.
_LARGER_NATIVE_BLOCKS = 8
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
        self.is_native = _device.is_cpu(self.device) and not self.last

    def matrices(self, tensor: Tensor) -> Tensor:
        if self.last:
            return tensor.movedim(1, -1).reshape(self.samples, self.positions, self.channels)
        return tensor.reshape(self.samples, self.channels, self.positions)

    def blocks(self) -> Iterator[Block]:
        """Slices of samples and of groups. Memory where channels are last is contiguous for all groups together only."""
        columns, width = (1, self.count * self.num_groups) if self.last else (self.num_groups, self.count)
        if self.is_native:
            width = -(-width // _LARGER_NATIVE_BLOCKS)
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
        return elements.sum(self.axis)

    def group_means(self, sums: Tensor) -> Tensor:
        """The means of the groups whose sums by channel are given, (samples, groups)."""
        return sums.view(sums.shape[0], -1, self.width).sum(2).div_(self.count)

    def by_channel(self, groups: Tensor) -> Tensor:
        """A table by group as one by channel."""
        return groups.unsqueeze(2).expand(*groups.shape, self.width).reshape(groups.shape[0], groups.shape[1] * self.width)

    def spread(self, channels: Tensor) -> Tensor:
        """A table by channel as one that broadcasts over the elements."""
        return channels.unsqueeze(self.axis)

    def affine(self, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and shift by channel of ``weight * (x - mean) * rstd + bias``; the mean is small beside the deviations from it."""
        scale = self.by_channel(rstd) if weight is None else self.by_channel(rstd) * weight
        shift = self.by_channel(mean).mul(scale).neg_()
        return scale, shift if bias is None else shift.add_(bias)

    def subtract(self, elements: Tensor, center: Tensor | None) -> Tensor:
        """The elements less a number of each channel."""
        return elements if center is None else elements - self.spread(center)

    def native(self, elements: Tensor) -> tuple[int, int, int, int]:
        """The sizes of a contiguous block that torch's operators take: samples, channels, positions, groups."""
        samples, channels, positions = elements.shape
        return samples, channels, positions, channels // self.width


def _is_small(mean: Tensor, rstd: Tensor) -> bool:
    """Whether the elements may be used as they are: not where a mean is NaN, a variance infinite, or the device would have to wait."""
    if not _device.is_cpu(mean.device):
        return False
    return not mean.numel() or (bool((mean * rstd).abs_().max() <= _LARGEST_MEAN) and bool(rstd.min() > 0.0))


@implements(ops.forward)
def group_norm_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, eps, activation = arguments.input, arguments.eps, arguments.activation
    layout, dtype = _Layout(input, arguments.num_groups), accumulation_dtype(input.dtype)
    output, mean, rstd = results = arguments.allocate()
    if not input.numel():
        mean.zero_()
        rstd.zero_()
    elements, outputs = layout.matrices(input), layout.matrices(output)
    # torch's own kernel reads them as if they were contiguous.
    parameters = [None if p is None else p.to(dtype).contiguous() for p in (arguments.weight, arguments.bias)]
    if layout.is_native:
        _normalise_natively(layout, elements, outputs, mean, rstd, parameters, eps, activation)
    if not layout.is_native or not _is_small(mean, rstd):
        for block in layout.blocks():
            tables = mean[block], rstd[block]
            _normalise(layout, layout.pieces(elements, block), layout.pieces(outputs, block), *tables, block, parameters, eps, activation)
    return results


def _normalise_natively(layout: _Layout, elements, results, mean, rstd, parameters, eps: float, activation: int) -> None:
    """By torch's own kernel, which has no room for the digits of a large mean."""
    for block in layout.blocks():
        channels = layout.channels_of(block)
        wide = widen(elements[channels], accumulation_dtype(elements.dtype))
        weight, bias = (None if p is None else p[channels[1]] for p in parameters)
        values, *statistics = torch.native_group_norm(wide, weight, bias, *layout.native(wide), eps)
        for table, groups in zip((mean, rstd), statistics, strict=True):
            table[block] = groups.view(wide.shape[0], -1)
        write_activated(results[channels], values, activation)


def _normalise(layout: _Layout, pieces, results, mean, rstd, block: Block, parameters, eps: float, activation: int) -> None:
    """A block by formulas; ``mean`` and ``rstd`` are its parts of the statistics, and written."""
    dtype, center = accumulation_dtype(pieces[0].dtype), None
    rest = _write_statistics(layout, pieces, dtype, None, mean, rstd, eps)
    if not _is_small(mean, rstd):
        center, rest = layout.by_channel(rest), _write_statistics(layout, pieces, dtype, rest, mean, rstd, eps)
    channels = layout.channels_of(block)[1]
    scale, shift = layout.affine(rest, rstd.to(dtype), *(None if p is None else p[channels] for p in parameters))
    for piece, result in zip(pieces, results, strict=True):
        values = layout.subtract(widen(piece, dtype), center)
        write_activated(result, torch.mul(values, layout.spread(scale)).add_(layout.spread(shift)), activation)


def _write_statistics(layout: _Layout, pieces, dtype: torch.dtype, center: Tensor | None, mean: Tensor, rstd: Tensor, eps: float) -> Tensor:
    """Writes the statistics of a block from its deviations from ``center``, a number a group, and returns the mean of these."""
    spread = None if center is None else layout.by_channel(center)
    sums, squares = (torch.zeros((mean.shape[0], mean.shape[1] * layout.width), dtype=dtype, device=mean.device) for _ in range(2))
    for piece in pieces:
        deviations = layout.subtract(widen(piece, dtype), spread)
        sums.add_(layout.sums(deviations))
        squares.add_(layout.sums(deviations.square()))
    rest = layout.group_means(sums)
    rstd.copy_(layout.group_means(squares).sub_(rest.square()).clamp_(min=0.0)).add_(eps).rsqrt_()
    mean.copy_(rest if center is None else center.to(mean.dtype) + rest)
    return rest


@implements(ops.recompute)
def group_norm_recompute(arguments: ops.RecomputeArguments) -> Tensor:
    # torch's own kernel computes statistics and output in one.
    return group_norm_forward(arguments.forward).output


@implements(ops.backward)
def group_norm_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input, backward = arguments.input, _Backward(arguments)
    grad_input = empty_in_layout(input)
    matrices = [backward.layout.matrices(t) for t in (input, arguments.grad_output, grad_input)]
    for block in backward.layout.blocks():
        pieces = (backward.layout.pieces(t, block) for t in matrices)
        if backward.layout.is_native:
            backward.natively(block, *pieces)
        else:
            backward.by_formulas(block, *pieces)
    parameters = ((arguments.weight, backward.grad_weight), (arguments.bias, backward.grad_bias))
    grads = (input.new_empty((0,)) if p is None else gradient.to(p.dtype) for p, gradient in parameters)
    return ops.BackwardResults(grad_input, *grads)


@implements(ops.restoring_backward)
def group_norm_restoring_backward(arguments: ops.RestoringBackwardArguments) -> ops.BackwardResults:
    results = group_norm_backward(arguments.backward)
    arguments.grad_output.copy_(group_norm_recompute(arguments.recompute))
    return results


class _Backward:
    """The backward pass: each way writes the gradient of a block's elements and adds to those of weight and bias."""

    def __init__(self, arguments: ops.BackwardArguments):
        input, mean, rstd, weight, bias = arguments[1:6]
        self.layout, self.dtype = _Layout(input, arguments.num_groups), accumulation_dtype(input.dtype)
        # Without what its dtype holds of a large mean an element keeps its digits.
        center = None if _is_small(mean, rstd) else mean.to(self.dtype)
        self.center = None if center is None else self.layout.by_channel(center)
        self.mean, self.rstd = (mean if center is None else mean - center).to(self.dtype), rstd.to(self.dtype)
        # torch's own kernel reads it as if it were contiguous.
        self.weight = input.new_ones(input.shape[1], dtype=self.dtype) if weight is None else weight.to(self.dtype).contiguous()
        self.scale, self.shift = self.layout.affine(self.mean, self.rstd, self.weight, None if bias is None else bias.to(self.dtype))
        self.grad_weight, self.grad_bias = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.activation = torch_activation(arguments.activation)

    def deviations(self, piece: Tensor, channels: Block) -> Tensor:
        return self.layout.subtract(widen(piece, self.dtype), None if self.center is None else self.center[channels])

    def grad_affine(self, grad_output: Tensor, deviations: Tensor, channels: Block) -> Tensor:
        """The gradient of the affine map's result."""
        grad_output = widen(grad_output, self.dtype)
        if self.activation is None:
            return grad_output
        scale, shift = (self.layout.spread(t[channels]) for t in (self.scale, self.shift))
        return self.activation.backward(grad_output, torch.mul(deviations, scale).add_(shift))

    def add_parameters(self, channels: Block, of_weight: Tensor, of_bias: Tensor) -> None:
        self.grad_weight[channels[1]].add_(of_weight)
        self.grad_bias[channels[1]].add_(of_bias)

    def natively(self, block: Block, pieces, grad_outputs, results) -> None:
        """By torch's own kernel."""
        channels = self.layout.channels_of(block)
        deviations = self.deviations(pieces[0], channels)
        grad = self.grad_affine(grad_outputs[0], deviations, channels)
        arguments = self.mean[block], self.rstd[block], self.weight[channels[1]], *self.layout.native(deviations), [True, True, True]
        grad_input, *of_parameters = torch.ops.aten.native_group_norm_backward(grad, deviations, *arguments)
        results[0].copy_(grad_input)
        self.add_parameters(channels, *of_parameters)

    def by_formulas(self, block: Block, pieces, grad_outputs, results) -> None:
        """rstd (g - mean(g) - n mean(g n)) for g = weight * grad and the normalised elements n = (deviations - mean) rstd."""
        layout, channels = self.layout, self.layout.channels_of(block)
        weight, scale, rstd = self.weight[channels[1]], self.scale[channels], layout.by_channel(self.rstd[block])
        mean, grads = layout.by_channel(self.mean[block]), []
        plain, with_normal = torch.zeros_like(scale), torch.zeros_like(scale)
        for piece, grad_output in zip(pieces, grad_outputs, strict=True):
            deviations = self.deviations(piece, channels)
            grads.append(self.grad_affine(grad_output, deviations, channels))
            plain.add_(layout.sums(grads[-1]))
            with_normal.add_(layout.sums(grads[-1] * deviations))
        with_normal.addcmul_(plain, mean, value=-1.0).mul_(rstd)
        self.add_parameters(channels, with_normal.sum(0), plain.sum(0))
        mean_grad, projection = (layout.by_channel(layout.group_means(t * weight)) * rstd for t in (plain, with_normal))
        slope = projection.mul_(rstd)
        scale, slope, shift = (layout.spread(t) for t in (scale, slope, (mean * slope).sub_(mean_grad)))
        for piece, grad, result in zip(pieces, grads, results, strict=True):
            with written(result, self.dtype) as out:
                torch.mul(grad, scale, out=out).addcmul_(self.deviations(piece, channels), slope, value=-1.0).add_(shift)
