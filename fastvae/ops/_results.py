"""Shapes, dtypes and layouts of results, and the reductions that all families share."""

import math

import torch
from torch import Tensor

from fastvae._types import check_choice

# Mirrored by csrc/common/reduction.h and by the constexprs in kernels/.
REDUCTIONS = {"none": 0, "sample": 1, "batchmean": 2, "sum": 3, "mean": 4}


def reduction_number(reduction: str) -> int:
    """The number of a reduction in the operators; an error where there is none of that name."""
    return REDUCTIONS[check_choice("reduction", reduction, REDUCTIONS)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether a device has operations on float64: the GPUs of Apple and some of Intel have none."""
    if device.type == "xpu":
        return not torch.xpu.is_available() or torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float64 if has_float64(device) else torch.float32


def reduced_shape(shape: torch.Size, reduction: int) -> tuple:
    if reduction == REDUCTIONS["none"]:
        return tuple(shape)
    if reduction == REDUCTIONS["sample"]:
        return tuple(shape[:1])
    return ()


def reduced_count(shape: torch.Size, reduction: int) -> int:
    """The divisor of the sum over all elements. It is 1 for an empty batch, which has the loss 0 and not the NaN of 0 / 0."""
    if reduction == REDUCTIONS["mean"]:
        # Size.numel() of a symbolic shape would be a constant.
        return _at_least_one(math.prod(shape))
    if reduction == REDUCTIONS["batchmean"]:
        return _at_least_one(shape[0] if len(shape) else 1)
    return 1


def _at_least_one(count: int | torch.SymInt) -> int:
    # Python's max would make a constant of a size that varies; torch.compile of torch 2.10 and 2.11 refuses sym_max of one that does not.
    return torch.sym_max(count, 1) if isinstance(count, torch.SymInt) else max(count, 1)


def reduction_scale(shape: torch.Size, reduction: int) -> float:
    """The factor of the sum over all elements."""
    return 1.0 / reduced_count(shape, reduction)


def empty_reduced(like: Tensor, reduction: int) -> Tensor:
    """Room for a loss of the elements of ``like``: in its dtype where nothing is reduced, else in the dtype of sums."""
    dtype = like.dtype if reduction == REDUCTIONS["none"] else accumulation_dtype(like.dtype)
    return like.new_empty(reduced_shape(like.shape, reduction), dtype=dtype)


def empty_like(tensor: Tensor) -> Tensor:
    """A contiguous tensor in the shape and dtype of ``tensor``."""
    return tensor.new_empty(tensor.shape)


def empty_if(condition: bool, tensor: Tensor) -> Tensor:
    """A contiguous tensor like ``tensor`` where the operator returns one, a tensor without elements where it does not."""
    return tensor.new_empty(tensor.shape if condition else (0,))


def channels_are_last(tensor: Tensor) -> bool:
    """Whether the channels (dimension 1) lie side by side and the rest is dense: ``torch.channels_last``, in any number of dimensions."""
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def in_layout(values: Tensor, like: Tensor) -> Tensor:
    """``values`` in the dtype and the memory layout of ``like``."""
    values = values.to(like.dtype)
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if channels_are_last(like) else values.contiguous()


def empty_in_layout(like: Tensor) -> Tensor:
    """An empty tensor with the channels last where those of ``like`` are, contiguous otherwise."""
    if channels_are_last(like):
        return like.new_empty(like.movedim(1, -1).shape).movedim(-1, 1)
    return like.new_empty(like.shape)
