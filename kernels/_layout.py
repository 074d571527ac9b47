"""How tensors of one shape are read without copying them: as rows that are contiguous in themselves, with a stride of each tensor's own."""

import math
from itertools import pairwise

from torch import Tensor


def row_stride(tensor: Tensor, dim: int) -> int | None:
    """How far apart the rows lie that the dimensions from ``dim`` on make up; None where they are not contiguous or not evenly apart."""
    expected = 1
    for size, stride in zip(reversed(tensor.shape[dim:]), reversed(tensor.stride()[dim:]), strict=True):
        if size != 1 and stride != expected:
            return None
        expected *= size
    leading = [(size, stride) for size, stride in zip(tensor.shape[:dim], tensor.stride()[:dim], strict=True) if size != 1]
    for (_, outer), (size, stride) in pairwise(leading):
        if outer != size * stride:
            return None
    return leading[-1][1] if leading else expected


def shared_rows(tensors):
    """``(tensors, inner, strides)``: all in rows of ``inner`` elements, as long as they go, or contiguous, where the others are None.

    A slice of a dimension (``mu, logvar = h.chunk(2, 1)``) and an operand expanded over the batch stay where they are; what fits nothing
    is copied.
    """
    present = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in present):
        return tensors, None, (None,) * len(tensors)
    for dim in range(1, present[0].ndim):
        if all(row_stride(t, dim) is not None for t in present):
            return tensors, math.prod(present[0].shape[dim:]), tuple(None if t is None else row_stride(t, dim) for t in tensors)
    return tuple(None if t is None else t.contiguous() for t in tensors), None, (None,) * len(tensors)


def matrix_rows(tensors):
    """``(tensors, strides, rows, columns)``: as matrices whose rows are the samples of a batch; what does not fit is copied."""
    first = tensors[0]
    rows = first.shape[0] if first.ndim else 1
    tensors = tuple(t if t is None or row_stride(t, min(1, t.ndim)) is not None else t.contiguous() for t in tensors)
    strides = tuple(None if t is None else row_stride(t, min(1, t.ndim)) for t in tensors)
    return tensors, strides, rows, first.numel() // rows


def shared_operand(value: Tensor | None, shape):
    """``(value, inner, period)`` for an operand that broadcasts to ``shape``: element e reads value ``(e // inner) % period``.

    The dimensions in which it is not broadcast stand side by side (see fastvae/functional/reconstruction.py). ``inner`` is None where it
    has a value for every element, ``period`` is None where it has one for all.
    """
    if value is None:
        return None, None, None
    if value.numel() == 1:
        return value, 0, None
    value = value.contiguous()
    if value.shape == shape:
        return value, None, None
    own = [d for d, size in enumerate(value.shape) if size != 1]
    return value, math.prod(shape[own[-1] + 1 :]), value.numel()
