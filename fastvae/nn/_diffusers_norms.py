"""What the normalisations of diffusers compute, by the names of their classes, so that diffusers need not be installed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from fastvae import functional as FV
from fastvae._types import NormActivation

# The eps of torch.nn.functional.normalize.
_NORMALIZE_EPS = 1e-12


def _l2_norm(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    """``F.normalize(input) * sqrt(channels) * gamma + bias``."""
    bias = getattr(norm, "bias", None)
    bias = bias.flatten() if isinstance(bias, Tensor) else None
    dim = 1 if getattr(norm, "channel_first", True) else -1
    return FV.rms_norm_silu(input, norm.gamma.flatten(), bias, _NORMALIZE_EPS, dim=dim, eps_mode="clamp", activation=activation)


def _l2_obstacle(norm: Any) -> str | None:
    channels = norm.gamma.numel()
    if max(norm.gamma.shape) != channels or norm.scale != channels**0.5:
        return f"has a gamma of shape {tuple(norm.gamma.shape)} and a scale of {norm.scale:.6g}"
    return None


def _rms_norm(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    return FV.rms_norm_silu(input, norm.weight, norm.bias, norm.eps, dim=-1, activation=activation)


def _rms_obstacle(norm: Any) -> str | None:
    return None if len(norm.dim) == 1 else f"has a weight of {len(norm.dim)} dimensions"


def _pixel_dim(norm: Any) -> object:
    return getattr(norm, "channel_dim", getattr(norm, "dim", None))


def _pixel_norm(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    return FV.rms_norm_silu(input, None, None, norm.eps, dim=cast("int", _pixel_dim(norm)), activation=activation)


def _pixel_obstacle(norm: Any) -> str | None:
    dim = _pixel_dim(norm)
    return None if dim == -1 or (isinstance(dim, int) and dim > 0) else f"normalizes dimension {dim}"


def _group_norm(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    return FV.group_norm_silu(input, norm.num_groups, norm.weight, norm.bias, norm.eps, activation)


def _of_frames(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    """GroupNorm of each frame of ``(batch, channels, frames, height, width)``. Where the channels are last in memory nothing is copied."""
    frames = input.movedim(2, 1)
    return _group_norm(norm, frames.flatten(0, 1), activation).unflatten(0, frames.shape[:2]).movedim(1, 2)


def _mochi_norm(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    return _of_frames(norm.norm_layer, input, activation)


def _cosmos_norm(norm: Any, input: Tensor, activation: NormActivation) -> Tensor:
    return (_of_frames if norm.num_groups == 1 else _group_norm)(norm.norm, input, activation)


def _cached_norm(norm: Any, input: Tensor, activation: NormActivation, cache: dict | None = None) -> Tensor:
    # A spatial norm around it reads there whether a video has begun.
    if cache is not None and cache.get("mean") is None and cache.get("var") is None:
        cache.update(mean=1, var=1)
    return _group_norm(norm.norm_layer, input, activation)


@dataclass(frozen=True)
class NormKind:
    """What a class of norms computes.

    Args:
        normalize: called with a norm, its input, the activation and what else the norm is called with.
        obstacle: why a norm of the class is another one, to stand behind "it".
        inside: the name of the GroupNorm in it whose parameters are used, where there is one.
    """

    normalize: Callable[..., Tensor]
    obstacle: Callable[[Any], str | None] = lambda norm: None
    inside: str | None = None


_L2, _PIXEL = NormKind(_l2_norm, _l2_obstacle), NormKind(_pixel_norm, _pixel_obstacle)

NORM_KINDS = {
    "WanRMS_norm": _L2,
    "QwenImageRMS_norm": _L2,
    "QwenImage21RMS_norm": _L2,
    "HunyuanVideo15RMS_norm": _L2,
    "HunyuanImageRefinerRMS_norm": _L2,
    "Kandinsky6VAERMSNorm": _L2,
    "RMSNorm": NormKind(_rms_norm, _rms_obstacle),
    "PerChannelRMSNorm": _PIXEL,
    "LTX2AudioPixelNorm": _PIXEL,
    "MiniMaxH3VideoGroupNorm": NormKind(_of_frames),
    "MochiChunkedGroupNorm3D": NormKind(_mochi_norm, inside="norm_layer"),
    "CosmosCausalGroupNorm": NormKind(_cosmos_norm, inside="norm"),
    "KVAECachedGroupNorm": NormKind(_cached_norm, inside="norm_layer"),
}
