"""Finds in any module what the package computes faster, and swaps it in place."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import nn

from fastvae._types import Memory, check_choice
from fastvae.functional._modules import wrapped_tensor
from fastvae.nn._diffusers_blocks import is_of_diffusers
from fastvae.nn._finding import Finding
from fastvae.nn._forward_code import NotUnderstood, rewritten
from fastvae.nn._forward_source import with_norm_delayed
from fastvae.nn._lean_modules import (
    RESIDUAL_BLOCK_FORWARD,
    LeanSequential,
    conv_of_delayed,
    delayed_norm,
    has_lean_forward,
    is_delayed_pair,
    lean_pairs,
    residual_block,
    residual_block_obstacle,
)
from fastvae.nn._norm_sites import walk_norms
from fastvae.nn._trial import refusals
from fastvae.nn._upsampling_sites import walk_upsamplings
from fastvae.nn.upsampling import UpsampleConv2d

# The classes of diffusers whose forward ends with a norm, an activation and a convolution, and the names of the three.
_WITH_LAST_NORM = ("Encoder", "Decoder")
_LAST_MODULES = ("conv_norm_out", "conv_act", "conv_out")

MEMORY_FORMATS = {
    nn.Conv2d: torch.channels_last,
    UpsampleConv2d: torch.channels_last,
    nn.ConvTranspose2d: torch.channels_last,
    nn.Conv3d: torch.channels_last_3d,
    nn.ConvTranspose3d: torch.channels_last_3d,
}


def optimize(
    module: nn.Module,
    *,
    channels_last: bool = False,
    memory: Memory = "full",
    report: Callable[[str], None] | None = print,
    example_inputs: tuple | dict[str, Any] | None = None,
) -> nn.Module:
    """Swaps, in place, each normalisation that SiLU, ReLU or GELU follows for one operator that does both, and each upsampling by
    repetition that a convolution of size 3 follows for one :class:`UpsampleConv2d`.

    Normalisations are :class:`torch.nn.GroupNorm`, which becomes a :class:`GroupNormSiLU`, and the RMS, L2, pixel and per-frame group norms
    of diffusers, each of which becomes one of a subclass. Found are pairs in an :class:`torch.nn.Sequential`; pairs in the code of a
    ``forward`` that torch.fx can trace and that has no branches but on whether a submodule is there; and the residual blocks, encoders and
    decoders of diffusers. What is not understood with certainty is left alone, and so is a module that is more than its class says: one
    with hooks, a subclass, a parametrized or a sharded one. The modules of an ``nn.Sequential`` are taken to be called by it alone.

    Parameters are the same objects under the same names: the ``state_dict`` and an optimizer stay valid. A module whose ``forward`` changes
    becomes one of a subclass of the same name. Its ``forward`` takes everything from the module at each call, so submodules, parameters and
    buffers may be replaced, hooked and parametrized as before; where it was traced, norm and activation are called one after the other
    again if somebody replaces the norm by one without the activation, or the activation by another. In an ``nn.Sequential`` and in the
    blocks of diffusers that hold it as a module, an identity takes the place of the activation. GELU is the exact one: its approximation by
    tanh is left alone.

    Args:
        module: any module; it is changed.
        channels_last: also puts the weights of convolutions into ``torch.channels_last`` (``channels_last_3d``); their outputs follow.
            Sharded weights stay as they are, and FSDP does not shard weights in this layout.
        memory: ``"lean"`` also lets a GroupNorm with an activation and the convolution behind it keep one input for the backward pass, see
            :func:`fastvae.functional.norm_act_conv`: in an :class:`torch.nn.Sequential`, in the residual blocks of diffusers and at the
            ends of its encoders and decoders of images. Results and gradients are the same to the last bit.
        report: called with one line for each normalisation and each upsampling, what was done or why nothing was; ``None`` for silence.
            :func:`examine` gives the same without a change.
        example_inputs: what ``module`` may be called with: a tuple of arguments, or a dict of keyword arguments. Copies of the module as it
            is and as it would be, in their mode and from the same state of torch's random generators, are then called with it, and what
            changes outputs or gradients by more than rounding is left alone. This takes two copies and some calls, and leaves the module,
            its buffers and gradients, and the generators as they are.

    Returns:
        ``module``.

    Raises:
        TypeError: where ``example_inputs`` is neither a tuple nor a dict.
        ValueError: where ``memory`` has another value, or ``module`` gives no tensors for ``example_inputs``, or others in each call.
    """
    check_choice("memory", memory, get_args(Memory))
    change = partial(_change, channels_last=channels_last, memory=memory)
    refused = {} if example_inputs is None else refusals(module, change, example_inputs)
    for finding in change(module, refused):
        if report is not None:
            report(str(finding))
    return module


def examine(module: nn.Module) -> list[Finding]:
    """The findings of :func:`optimize`, without changing anything."""
    return list(_walk(module, change=False, refused={}))


def to_channels_last(module: nn.Module) -> None:
    """Puts the weights of convolutions into ``torch.channels_last`` or ``channels_last_3d``, in place; sharded ones stay as they are."""
    for layer in module.modules():
        if type(layer) in MEMORY_FORMATS and wrapped_tensor(layer) is None:
            layer.to(memory_format=MEMORY_FORMATS[type(layer)])  # type: ignore[call-overload]  # not in the annotations of torch


def _change(module: nn.Module, refused: Mapping[str, str], *, channels_last: bool, memory: Memory) -> list[Finding]:
    """Changes all but what is in ``refused``, whose names have reasons there."""
    findings = list(_walk(module, change=True, refused=refused))
    if memory == "lean":
        findings += _make_lean(module)
    if channels_last:
        to_channels_last(module)
    return findings


def _walk(root: nn.Module, change: bool, refused: Mapping[str, str]) -> Iterator[Finding]:
    uses = Counter(id(child) for parent in root.modules() for child in parent._modules.values())
    yield from walk_norms(root, uses, change, refused)
    yield from walk_upsamplings(root, uses, change, refused)


def _make_lean(root: nn.Module) -> Iterator[Finding]:
    """Changes the modules of a tree whose norms are fused already."""
    for prefix, parent in list(root.named_modules()):
        pairs = _lean_pairs(parent)
        if pairs and not has_lean_forward(type(parent)):
            try:
                parent.__class__ = _lean_class(parent)
            except NotUnderstood:
                # Another release of diffusers: the norm is fused, and the convolution keeps its input.
                continue
        for norm, conv in pairs.items():
            yield Finding(f"{prefix}.{norm}".removeprefix("."), conv, lean=True)


def _lean_class(parent: nn.Module) -> type[nn.Module]:
    cls: Any = type(parent)
    if cls is nn.Sequential:
        return LeanSequential
    if is_of_diffusers(parent, *_WITH_LAST_NORM):
        functions = (("delayed_norm", delayed_norm), ("conv_of_delayed", conv_of_delayed))
        return rewritten(cls, with_norm_delayed(cls, *_LAST_MODULES), functions)
    return rewritten(cls, RESIDUAL_BLOCK_FORWARD, (("residual_block", residual_block), ("original", cls.forward)))


def _lean_pairs(parent: nn.Module) -> dict[str, str]:
    if type(parent) in (nn.Sequential, LeanSequential):
        return lean_pairs(cast("nn.Sequential", parent))
    if is_of_diffusers(parent, "ResnetBlock2D") and residual_block_obstacle(parent) is None:
        return {"norm1": "conv1", "norm2": "conv2"}
    if is_of_diffusers(parent, *_WITH_LAST_NORM) and is_delayed_pair(parent, *_LAST_MODULES):
        return {"conv_norm_out": "conv_out"}
    return {}
