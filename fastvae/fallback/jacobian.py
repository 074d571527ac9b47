"""The contractive penalty block by block and the Gram form some samples at a time, in plain PyTorch."""

import torch
from torch import Tensor

from fastvae._ops import ACTIVATIONS, accumulation_dtype
from fastvae.fallback._blocks import Reduced, blocks, gradient_matrix, take
from fastvae.fallback._register import implements
from fastvae.reference._reduce import reduction_scale
from fastvae.reference.jacobian import derivatives, gram_in_chunks

_NAMES = {number: name for name, number in ACTIVATIONS.items()}


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

    def __init__(self, hidden: Tensor, weight: Tensor, norms: Tensor, scale: float | Tensor, with_hidden: bool, with_weight: bool):
        self.norms, self.scale, self.source = norms, scale, weight
        self.hidden = hidden.new_empty(hidden.shape if with_hidden else (0,))
        self.weight = weight.new_empty(weight.shape if with_weight else (0,))
        # The sums of the scaled squared slopes over the batch.
        self.columns = norms.new_zeros(norms.shape) if with_weight else None

    def write(self, block, slope: Tensor, change: Tensor, squares: Tensor) -> None:
        scale = self.scale if isinstance(self.scale, float) else take(self.scale, block)
        if self.hidden.numel():
            take(self.hidden, block).copy_((slope * change).mul_(self.norms[block[1]]).mul_(2.0).mul_(scale))
        if self.columns is not None:
            self.columns[block[1]].add_((squares * scale).sum(0))

    def results(self) -> tuple[Tensor, Tensor]:
        if self.columns is not None and self.weight.numel():
            twice = self.columns.mul_(2.0).unsqueeze(1)
            for rows, _ in blocks(self.weight.shape[0], 1, self.weight.device, self.weight.shape[1]):
                self.weight[rows].copy_(twice[rows] * self.source[rows])
        return self.hidden, self.weight


@implements("jacobian_forward")
def jacobian_forward(hidden, weight, activation, alpha, reduction, grad_scale, with_grad_hidden, with_grad_weight):
    dtype = accumulation_dtype(hidden.dtype)
    norms, reduced = _squared_norms(weight, dtype), Reduced(hidden, reduction)
    scale = grad_scale * reduction_scale(hidden.shape, reduction)
    gradients = _Gradients(hidden, weight, norms, scale, with_grad_hidden, with_grad_weight)
    for block in blocks(*hidden.shape, hidden.device):
        slope, change = derivatives(take(hidden, block).to(dtype), _NAMES[activation], alpha)
        squares = slope.square()
        reduced.add(block, squares * norms[block[1]])
        gradients.write(block, slope, change, squares)
    return reduced.result(), norms, *gradients.results()


@implements("jacobian_backward")
def jacobian_backward(grad_output, hidden, weight, squared_norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight):
    dtype = squared_norms.dtype
    scale = gradient_matrix(grad_output, hidden.shape, reduction, dtype)
    gradients = _Gradients(hidden, weight, squared_norms, scale, with_grad_hidden, with_grad_weight)
    for block in blocks(*hidden.shape, hidden.device):
        slope, change = derivatives(take(hidden, block).to(dtype), _NAMES[activation], alpha)
        gradients.write(block, slope, change, slope.square())
    return gradients.results()


@implements("jacobian_gram_scale")
def jacobian_gram_scale(left, inner, outer):
    return torch.mul(outer.unsqueeze(2), left).mul_(inner.unsqueeze(1)).flatten(0, 1)


@implements("jacobian_gram_reduce")
def jacobian_gram_reduce(left, inner, outer, product, with_grad):
    product = product.view(*outer.shape, inner.shape[1])
    with_left = product * left
    dots = torch.bmm(with_left, inner.unsqueeze(2)).squeeze(2)
    if not with_grad:
        return dots, inner.new_empty((0,)), left.new_empty((0,))
    grad_inner = torch.bmm(outer.unsqueeze(1), with_left).squeeze(1)
    grad_left = torch.mul(product, inner.unsqueeze(1), out=with_left).mul_(outer.unsqueeze(2))
    return dots, grad_inner, grad_left if left.ndim == 3 else grad_left.sum(0)


jacobian_gram = implements("jacobian_gram")(gram_in_chunks("fallback"))
