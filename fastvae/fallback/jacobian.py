"""The contractive penalty block by block and the Gram form some samples at a time, in plain PyTorch."""

import torch
from torch import Tensor

from fastvae.fallback._blocks import Reduced, blocks, gradient_matrix, take
from fastvae.fallback._register import implements
from fastvae.ops import jacobian as ops
from fastvae.ops._gram_chunks import gram_in_chunks
from fastvae.ops._results import accumulation_dtype, empty_if, reduction_scale
from fastvae.reference.jacobian import derivatives


def _squared_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The squared norms of the rows."""
    if not weight.numel():
        return weight.new_zeros(weight.shape[:1], dtype=dtype)
    norms = weight.new_empty(weight.shape[:1], dtype=dtype)
    for rows, _ in blocks(weight.shape[0], 1, weight.device, weight.shape[1]):
        norms[rows] = weight[rows].to(dtype).square().sum(1)
    return norms


class _Gradients:
    """Fills the gradients block by block; ``scale`` is a number or a matrix that broadcasts to ``hidden``."""

    def __init__(self, arguments: ops.ForwardArguments | ops.BackwardArguments, norms: Tensor, scale: float | Tensor):
        self.norms, self.scale, self.source = norms, scale, arguments.weight
        self.hidden = empty_if(arguments.with_grad_hidden, arguments.hidden)
        self.weight = empty_if(arguments.with_grad_weight, arguments.weight)
        # The sums of the scaled squared slopes over the batch.
        self.columns = norms.new_zeros(norms.shape) if arguments.with_grad_weight else None

    def write(self, block, slope: Tensor, change: Tensor, squares: Tensor) -> None:
        scale = self.scale if isinstance(self.scale, float) else take(self.scale, block)
        if self.hidden.numel():
            take(self.hidden, block).copy_((slope * change).mul_(self.norms[block[1]]).mul_(2.0).mul_(scale))
        if self.columns is not None:
            self.columns[block[1]].add_((squares * scale).sum(0))

    def results(self) -> ops.BackwardResults:
        if self.columns is not None and self.weight.numel():
            twice = self.columns.mul_(2.0).unsqueeze(1)
            for rows, _ in blocks(self.weight.shape[0], 1, self.weight.device, self.weight.shape[1]):
                self.weight[rows].copy_(twice[rows] * self.source[rows])
        return ops.BackwardResults(self.hidden, self.weight)


@implements(ops.forward)
def jacobian_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    hidden, reduction = arguments.hidden, arguments.reduction
    dtype = accumulation_dtype(hidden.dtype)
    norms, reduced = _squared_norms(arguments.weight, dtype), Reduced(hidden, reduction)
    gradients = _Gradients(arguments, norms, arguments.grad_scale * reduction_scale(hidden.shape, reduction))
    rows, columns = hidden.shape
    for block in blocks(rows, columns, hidden.device):
        slope, change = derivatives(take(hidden, block).to(dtype), ops.ACTIVATION_NAMES[arguments.activation], arguments.alpha)
        squares = slope.square()
        reduced.add(block, squares * norms[block[1]])
        gradients.write(block, slope, change, squares)
    return ops.ForwardResults(reduced.result(), norms, *gradients.results())


@implements(ops.backward)
def jacobian_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    hidden, norms = arguments.hidden, arguments.squared_norms
    gradients = _Gradients(arguments, norms, gradient_matrix(arguments.grad_output, hidden.shape, arguments.reduction, norms.dtype))
    rows, columns = hidden.shape
    for block in blocks(rows, columns, hidden.device):
        slope, change = derivatives(take(hidden, block).to(norms.dtype), ops.ACTIVATION_NAMES[arguments.activation], arguments.alpha)
        gradients.write(block, slope, change, slope.square())
    return gradients.results()


@implements(ops.gram_scale)
def jacobian_gram_scale(arguments: ops.GramScaleArguments) -> Tensor:
    left, inner, outer = arguments
    return torch.mul(outer.unsqueeze(2), left).mul_(inner.unsqueeze(1)).flatten(0, 1)


@implements(ops.gram_reduce)
def jacobian_gram_reduce(arguments: ops.GramReduceArguments) -> ops.GramReduceResults:
    left, inner, outer, product, with_grad = arguments
    product = product.view(*outer.shape, inner.shape[1])
    with_left = product * left
    dots = torch.bmm(with_left, inner.unsqueeze(2)).squeeze(2)
    if not with_grad:
        return ops.GramReduceResults(dots, inner.new_empty((0,)), left.new_empty((0,)))
    grad_inner = torch.bmm(outer.unsqueeze(1), with_left).squeeze(1)
    grad_left = torch.mul(product, inner.unsqueeze(1), out=with_left).mul_(outer.unsqueeze(2))
    return ops.GramReduceResults(dots, grad_inner, grad_left if left.ndim == 3 else grad_left.sum(0))


implements(ops.gram)(gram_in_chunks("fallback"))
