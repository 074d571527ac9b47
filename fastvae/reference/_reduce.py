"""The reductions of section "Losses" in the documentation, over elementwise values."""

import torch
from torch import Tensor

from fastvae.ops._results import REDUCTIONS, accumulation_dtype, reduced_count, reduced_shape, reduction_scale


def reduce_elements(elements: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    """``elements`` (in the accumulation dtype) reduced; ``dtype`` is that of the result where nothing is reduced."""
    if reduction == REDUCTIONS["none"]:
        return elements.to(dtype)
    if reduction == REDUCTIONS["sample"]:
        return elements.sum(tuple(range(1, elements.ndim))) if elements.ndim > 1 else elements.clone()
    # The divisor is an integer because in forward mode the product of a 0-dim tensor and a Python float gets a tangent in float64.
    return elements.sum() / reduced_count(elements.shape, reduction)


def expand_gradient(grad_output: Tensor, shape: torch.Size, reduction: int) -> Tensor:
    """The gradient of the reduction: ``grad_output`` spread over the elements, in the accumulation dtype."""
    grad = grad_output.to(accumulation_dtype(grad_output.dtype))
    trailing = (1,) * (len(shape) - grad.ndim)
    return grad.reshape((*reduced_shape(shape, reduction), *trailing)).expand(shape) * reduction_scale(shape, reduction)
