"""Argument checks: an error names the argument, what it got and what it takes."""

import math

import torch
from torch import Tensor

from fastvae._backend import FLOATS
from fastvae._torch_private import is_fake


def check_tensor(name: str, value, dtypes: tuple[torch.dtype, ...] = FLOATS) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a tensor")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: got {value.dtype}, takes {_join(dtypes)}")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got a tensor of layout {value.layout}, takes a dense one")


def check_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, takes the device of {like_name}, {like.device}")


def check_channel_parameter(name: str, value, input: Tensor) -> None:
    """``value`` is a tensor of parameters of the channels of ``input``; its shape is checked elsewhere."""
    check_tensor(name, value)
    check_device(name, value, "input", input)
    if value.dtype not in (input.dtype, torch.float32):
        raise TypeError(f"{name}: got {value.dtype}, takes the dtype of input, {input.dtype}, or torch.float32")


def check_eps(eps) -> float:
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps!r}, takes a finite number >= 0")
    return float(eps)


def check_like(name: str, value, like_name: str, like: Tensor) -> None:
    """``value`` has the shape, dtype and device of ``like``."""
    check_tensor(name, value)
    check_device(name, value, like_name, like)
    if value.dtype != like.dtype:
        raise TypeError(f"{name}: got {value.dtype}, takes the dtype of {like_name}, {like.dtype}")
    check_shape(name, value, like.shape, f"the shape of {like_name}")


def check_posterior(mu_name: str, mu, logvar_name: str, logvar) -> None:
    check_tensor(mu_name, mu)
    check_like(logvar_name, logvar, mu_name, mu)


def check_shape(name: str, value: Tensor, shape, what: str) -> None:
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes {what}, {tuple(shape)}")


def check_nonnegative(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise ValueError(f"{name}: got {value!r}, takes a number >= 0")
    return float(value)


def check_scale(grad_scale) -> float:
    if isinstance(grad_scale, bool) or not isinstance(grad_scale, int | float) or not 0 < abs(grad_scale) < math.inf:
        raise ValueError(f"grad_scale: got {grad_scale!r}, takes a finite number other than 0")
    return float(grad_scale)


def check_interval(name: str, values: Tensor, low: float, high: float) -> None:
    """Raises where a tensor has values outside an interval (NaN is), with how many and where the first are: a device synchronisation."""
    if values.is_meta or is_fake(values):
        return
    outside = ~((values >= low) & (values <= high))
    if count := int(outside.sum()):
        places = [tuple(index) for index in outside.nonzero()[:5].tolist()]
        allowed, got = f"[{low:g}, {high:g}]", f"{count} of {values.numel()} values"
        raise ValueError(f"{name}: got {got} outside {allowed}, the first at {places}, takes values in {allowed}")


def check_expands(name: str, value: Tensor, like_name: str, shape: torch.Size) -> None:
    """``value`` broadcasts to exactly ``shape``."""
    sizes = value.shape
    fits = len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(reversed(sizes), reversed(shape), strict=False))
    if not fits:
        raise ValueError(f"{name}: got shape {tuple(sizes)}, takes one that broadcasts to that of {like_name}, {tuple(shape)}")


def _join(values) -> str:
    return ", ".join(str(v) for v in values)
