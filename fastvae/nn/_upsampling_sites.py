"""Finds the upsamplings by repetition that a convolution of size 3 follows."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

from torch import nn

from fastvae.functional._modules import call_obstacle
from fastvae.nn._diffusers_blocks import is_of_diffusers
from fastvae.nn._finding import Finding
from fastvae.nn._norm_sites import is_sequential
from fastvae.nn.upsampling import UpsampleConv2d, conv_obstacle


@dataclass(frozen=True)
class _Upsampling:
    """An upsampling to twice the size: its name, the module that has what follows it and under which name, and how to turn it off."""

    name: str
    owner: nn.Module
    conv: str
    turn_off: Callable[[], None]


def walk_upsamplings(root: nn.Module, uses: Counter, change: bool, refused: Mapping[str, str]) -> Iterator[Finding]:
    """Finds, and changes where ``change`` is true, all but those in ``refused``, whose names have reasons there."""
    for found in _upsamplings(root):
        reason = refused.get(found.name) or _obstacle(found, uses)
        if reason:
            yield Finding(found.name, reason=reason)
            continue
        if change:
            conv = found.owner.get_submodule(found.conv)
            found.owner.set_submodule(found.conv, UpsampleConv2d.sharing(cast("nn.Conv2d", conv)))
            found.turn_off()
        yield Finding(found.name, found.conv)


def _obstacle(found: _Upsampling, uses: Counter) -> str | None:
    conv = found.owner.get_submodule(found.conv)
    reason = conv_obstacle(conv) or ("is used in more than one place" if uses[id(conv)] > 1 else None)
    return f"what follows it, {found.conv}, {reason}" if reason else None


def _upsamplings(root: nn.Module) -> Iterator[_Upsampling]:
    for prefix, parent in list(root.named_modules()):
        if is_sequential(parent):
            for name, follower in pairwise(list(parent._modules)):
                if _doubles(parent.get_submodule(name)):
                    turn_off = partial(parent.set_submodule, name, nn.Identity())
                    yield _Upsampling(f"{prefix}.{name}".removeprefix("."), parent, follower, turn_off)
        elif is_of_diffusers(parent, "UpDecoderBlock2D", "UpBlockTemporalDecoder"):
            # These ask their upsamplers for twice the size; others may ask for a size of their own.
            for name, upsampler in parent.named_modules():
                if is_of_diffusers(upsampler, "Upsample2D") and _interpolates(upsampler):
                    turn_off = partial(setattr, upsampler, "interpolate", False)
                    yield _Upsampling(f"{prefix}.{name}".removeprefix("."), upsampler, "conv", turn_off)


def _interpolates(upsampler: nn.Module) -> bool:
    # Versions without the attribute cannot be told not to.
    return bool(getattr(upsampler, "interpolate", False) and upsampler.use_conv and upsampler.name == "conv")


def _doubles(module: nn.Module) -> bool:
    if type(module) not in (nn.Upsample, nn.UpsamplingNearest2d) or call_obstacle(module):
        return False
    return module.mode == "nearest" and module.size is None and module.scale_factor in (2, (2, 2))
