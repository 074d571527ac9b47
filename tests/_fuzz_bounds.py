"""Shapes and bounds that the cases of several families share."""

import torch
from _fuzz import Draw, Size
from torch import Tensor

from fastvae.ops._results import REDUCTIONS
from fastvae.reference._reduce import expand_gradient, reduce_elements

ELEMENTS = 400


def loss_weights(incoming: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    """The absolute gradient of each element of a loss."""
    return expand_gradient(incoming.double(), shape, REDUCTIONS[reduction]).abs()


def reduced(elements: Tensor, reduction: str) -> Tensor:
    return reduce_elements(elements, REDUCTIONS[reduction], torch.float64)


def size_of_argument(full: Tensor, argument: Tensor, dtype: torch.dtype) -> Size:
    """The size of the gradient of an argument that was broadcast: torch rounds each term to the argument's ``dtype``, and the sum."""
    if argument.shape == full.shape:
        return Size(full)
    summed = full.sum_to_size(argument.shape)
    # The last place of a denormal number, for each term.
    return Size(summed, summed + torch.finfo(dtype).tiny * torch.ones_like(full).sum_to_size(argument.shape), 2)


def any_shape(draw: Draw) -> tuple[int, ...]:
    return draw.sizes(draw.choice((0, 1, 2, 2, 3, 4)), draw.choice((20, ELEMENTS, ELEMENTS, 4 * ELEMENTS)))


def as_tuple(outputs) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def largest(tensor: Tensor) -> float:
    """The largest finite absolute value."""
    return float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).max()) if tensor.numel() else 0.0
