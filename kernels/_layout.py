"""Reads tensors of one shape without copies, as rows that are contiguous, where each tensor has its own stride from row to row."""

import math
from itertools import pairwise

from torch import Tensor


def row_stride(tensor: Tensor, dim: int) -> int | None:
    """The stride of the rows that the dimensions from ``dim`` on make up; None where they are not contiguous or their stride varies."""
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
    """``(tensors, inner, strides)``: the tensors, of which None stay None, with the longest rows of ``inner`` elements that all have. Where
    all are contiguous, ``inner`` and the strides are None.

    Slices of a dimension (``mu, logvar = h.chunk(2, 1)``) and an operand that is expanded over the batch are not copied. Where the tensors
    have no rows in common, those that are not contiguous are copied.
    """
    present = [t for t in tensors if t is not None]
    if all(t.is_contiguous() for t in present):
        return tensors, None, (None,) * len(tensors)
    for dim in range(1, present[0].ndim):
        if all(row_stride(t, dim) is not None for t in present):
            return tensors, math.prod(present[0].shape[dim:]), tuple(None if t is None else row_stride(t, dim) for t in tensors)
    return tuple(None if t is None else t.contiguous() for t in tensors), None, (None,) * len(tensors)


def matrix_rows(tensors):
    """``(tensors, strides, rows, columns)``: the tensors as matrices whose rows are the samples of a batch. A tensor that is none is
    copied."""
    first = tensors[0]
    rows = first.shape[0] if first.ndim else 1
    tensors = tuple(t if t is None or row_stride(t, min(1, t.ndim)) is not None else t.contiguous() for t in tensors)
    strides = tuple(None if t is None else row_stride(t, min(1, t.ndim)) for t in tensors)
    return tensors, strides, rows, first.numel() // rows


def shared_operand(value: Tensor | None, shape):
    """``(value, inner, period)`` for an operand that broadcasts to ``shape``: element e reads value ``(e // inner) % period``.

    The dimensions in which it is not broadcast have to be adjacent, which the public functions check. ``inner`` is None where there is a
    value for each element, ``period`` is None where there is one value for all.
    """
    if value is None:
        return None, None, None
    if value.numel() == 1:
        return value, 0, None
    value = value.contiguous()
    if value.shape == shape:
        return value, None, None
    dims = [d for d, size in enumerate(value.shape) if size != 1]
    return value, math.prod(shape[dims[-1] + 1 :]), value.numel()
