"""The blocks of diffusers in whose ``forward`` a norm and its activation stand among branches and loops, which cannot be traced."""

from typing import Any

from torch import nn

from fastvae.nn._activation_calls import act_behind, plain_activation
from fastvae.nn._forward_code import NotUnderstood, rewritten
from fastvae.nn._forward_source import with_activations_asked_for
from fastvae.nn._fused_norms import fuse
from fastvae.nn._plan import Plan

# The names of the norms, and what the source of the forward calls behind each of them with nothing but a change of layout in between;
# the classes of which that is so.
_BLOCKS: dict[tuple[tuple[str, ...], str], tuple[str, ...]] = {
    (("norm1", "norm2"), "self.nonlinearity"): (
        "ResnetBlock2D", "TemporalResnetBlock", "CogVideoXResnetBlock3D", "EasyAnimateResidualBlock3D", "HunyuanImageResnetBlock",
        "HunyuanImageRefinerResnetBlock", "HunyuanVideo15ResnetBlock", "HunyuanVideoResnetBlockCausal3D", "KVAEResnetBlock2D",
        "LTX2VideoResnetBlock3d", "LTXVideoResnetBlock3d", "MochiResnetBlock3D", "QwenImage21ResidualBlock", "QwenImageResidualBlock",
        "WanResidualBlock",
    ),
    (("norm1", "norm2"), "self.non_linearity"): ("LTX2AudioResnetBlock",),
    (("norm1", "norm2"), "F.silu"): (
        "CosmosResnetBlock3d", "KVAECachedResnetBlock3D", "Kandinsky6SRResnetBlock3D", "MiniMaxH3VideoResnetBlock3d",
    ),
    (("conv_norm_out",), "self.conv_act"): (
        "Encoder", "Decoder", "MaskConditionDecoder", "TemporalDecoder", "UNet2DModel", "AllegroEncoder3D", "AllegroDecoder3D",
        "EasyAnimateEncoder", "EasyAnimateDecoder", "HunyuanVideoEncoder3D", "HunyuanVideoDecoder3D",
    ),
    (("norm_out",), "self.conv_act"): (
        "Decoder", "CogVideoXEncoder3D", "HunyuanImageRefinerEncoder3D", "HunyuanImageRefinerDecoder3D", "HunyuanVideo15Encoder3D",
        "HunyuanVideo15Decoder3D", "LTX2VideoEncoder3d", "LTX2VideoDecoder3d", "LTXVideoEncoder3d", "LTXVideoDecoder3d",
    ),
    (("norm_out",), "self.nonlinearity"): (
        "HunyuanImageEncoder2D", "HunyuanImageDecoder2D", "KVAEEncoder2D", "MochiEncoder3D", "QwenImage21Encoder3d",
        "QwenImage21Decoder3d", "QwenImageEncoder3d", "QwenImageDecoder3d", "WanEncoder3d", "WanDecoder3d",
    ),
    (("norm_out",), "self.non_linearity"): ("LTX2AudioEncoder", "LTX2AudioDecoder"),
    (("norm_out",), "F.silu"): ("CosmosEncoder3d", "CosmosDecoder3d", "Kandinsky6SREncoder3D", "MiniMaxH3VideoEncoder3d"),
    (("norm_out",), "nonlinearity"): ("KVAECachedEncoder3D",),
}  # fmt: skip

# Parts of the names of classes whose norms no activation follows, and what does.
_NO_ACTIVATION = {
    "Attention": "attention follows it",
    "Attn": "attention follows it",
    "SpatialNorm": "a scale and a shift that depend on the latents follow it",
}


def is_of_diffusers(module: nn.Module, *names: str) -> bool:
    """Whether ``module`` is of one of these classes of diffusers, and its ``forward`` is that of the class."""
    known = type(module).__module__.startswith("diffusers.") and type(module).__name__ in names
    return known and "forward" not in module.__dict__


def plan_of_diffusers(parent: nn.Module, free: set[str]) -> Plan | None:
    """The change of a block of diffusers that is known, of whose norms those in ``free`` may be swapped; None where it is not known."""
    name = type(parent).__name__
    for part, reason in _NO_ACTIVATION.items():
        if part in name and is_of_diffusers(parent, name):
            raise NotUnderstood(reason)
    for (norms, activation), classes in _BLOCKS.items():
        if is_of_diffusers(parent, *classes) and all(hasattr(parent, name) for name in norms):
            return _plan(parent, norms, activation, free)
    return None


def _plan(parent: Any, norms: tuple[str, ...], activation: str, free: set[str]) -> Plan:
    left = {name: "a scale and a shift come between it and its activation" for name in norms if _is_modulated(parent, name)}
    followed = [name for name in norms if name in free and name not in left]
    if not followed:
        return Plan({}, lambda: None, left)
    module = activation.removeprefix("self.") if activation.startswith("self.") else None
    # The functions that the source of these classes calls are SiLU.
    name = "silu" if module is None else plain_activation(getattr(parent, module, None))
    if name is None:
        raise NotUnderstood(f"{module} is not SiLU, ReLU or GELU alone")
    source, functions = None, ((act_behind.__name__, act_behind),)
    if module is None or len(followed) < len(norms) or _embeds_time(parent):
        source = with_activations_asked_for(type(parent), norms, activation)

    def apply():
        for norm in followed:
            fuse(parent, norm, name)
        if source is None:
            parent.set_submodule(module, nn.Identity())
        else:
            parent.__class__ = rewritten(type(parent), source, functions)

    return Plan(dict.fromkeys(followed, module or activation), apply, left)


def _is_modulated(parent: Any, norm: str) -> bool:
    """Whether a scale and a shift come between a norm and its activation."""
    if getattr(parent, "scale_shift_table", None) is not None:
        return True
    return norm == "norm2" and getattr(parent, "time_embedding_norm", None) == "scale_shift"


def _embeds_time(parent: Any) -> bool:
    """Whether a time embedding goes through the activation of the norms too."""
    return any(getattr(parent, name, None) is not None for name in ("time_emb_proj", "temb_proj"))
