"""The reductions of section "Losses" in the documentation, over elementwise values."""

import torch
from torch import Tensor

from fastvae._ops import REDUCTIONS, accumulation_dtype, reduced_shape


def reduce_elements(elements: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    """``elements`` (in the accumulation dtype) reduced; ``dtype`` is that of the result where nothing is reduced."""
    if reduction == REDUCTIONS["none"]:
        return elements.to(dtype)
    if reduction == REDUCTIONS["sample"]:
        return elements.sum(tuple(range(1, elements.ndim))) if elements.ndim > 1 else elements.clone()
    # By an integer: in forward mode torch gives the product of a 0-dim tensor and a Python float a tangent in float64.
    return elements.sum() / _count(elements.shape, reduction)


def reduction_scale(shape: torch.Size, reduction: int) -> float:
    """What the sum over all elements is multiplied with."""
    return 1.0 / _count(shape, reduction)


def _count(shape: torch.Size, reduction: int) -> int:
    """How many the sum over all elements is a mean of. An empty batch has the loss 0, not the NaN of 0 / 0."""
    if reduction == REDUCTIONS["mean"]:
        return max(shape.numel(), 1)
    if reduction == REDUCTIONS["batchmean"]:
        return max(shape[0] if len(shape) else 1, 1)
    return 1


def expand_gradient(grad_output: Tensor, shape: torch.Size, reduction: int) -> Tensor:
    """The gradient of the reduction: ``grad_output`` spread over the elements, in the accumulation dtype."""
    grad = grad_output.to(accumulation_dtype(grad_output.dtype))
    trailing = (1,) * (len(shape) - grad.ndim)
    return grad.reshape((*reduced_shape(shape, reduction), *trailing)).expand(shape) * reduction_scale(shape, reduction)
