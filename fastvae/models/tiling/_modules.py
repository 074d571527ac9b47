"""The steps of the modules that are known.

Each class has a function that gives its steps, from its submodules in the order in which its ``forward`` calls them. torch.fx would find
that order by itself for the package's own networks, but it traces none of diffusers' blocks, whose code branches on its arguments; and
either way a layer's halo follows from its class alone. So there is one table for all, and a module that is not in it is an error, not a
guess. Classes of diffusers are known by their names, because diffusers need not be installed.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch.nn.functional as F
from torch import nn

from fastvae.functional._modules import call_obstacle, describe
from fastvae.models.networks import residual, vq_convolutional
from fastvae.models.tiling._steps import Attention, Axis, GroupNormalisation, Layer, Residual, Step
from fastvae.nn import GroupNormSiLU, NormActConv2d, RMSNormSiLU, UpsampleConv2d
from fastvae.nn._lean_modules import LeanSequential, has_lean_forward

Handler = Callable[[Any, str], list[Step]]
_HANDLERS: dict[type | str, Handler] = {}

# In evaluation mode each position of their output depends on that position of their input alone.
_POINTWISE = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d),
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Sigmoid, nn.Tanh, nn.Hardtanh),
)


def steps_of(module: Any, path: str) -> list[Step]:
    """The steps of a module, whose name in the model is ``path``.

    Raises:
        ValueError: for a module that is not known, or is more than its class says.
    """
    handler = _handler(type(module))
    if handler is None:
        _refuse(module, path, f"is not known, tiled decoding takes {supported()}")
    if reason := call_obstacle(module):
        _refuse(module, path, f"{reason}, which may look beyond a tile")
    return handler(module, path)


def supported() -> str:
    """The names of the classes that are known."""
    return ", ".join(sorted({kind.split(".")[-1] if isinstance(kind, str) else kind.__name__ for kind in _HANDLERS}))


def _handler(cls: type) -> Handler | None:
    """That of the class itself, or of the base whose ``forward`` it has."""
    if _name(cls) == _name(cls.__base__):
        # optimize() has written its forward anew. A lean one computes what the base does.
        return _handler(cls.__base__) if has_lean_forward(cls) else None  # type: ignore[arg-type]
    for base in cls.__mro__:
        handler = _HANDLERS.get(base) or _HANDLERS.get(_name(base))
        if handler is not None:
            return handler if cls.forward is base.forward else None  # type: ignore[attr-defined]
    return None


def _name(cls: type | None) -> str:
    return "" if cls is None else f"{cls.__module__}.{cls.__qualname__}"


def _refuse(module: Any, path: str, reason: str) -> NoReturn:
    raise ValueError(f"vae: {path}, {describe(module)}, {reason}")


def _handles(*kinds: type | str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(kinds, handler))
        return handler

    return register


def _in_turn(module: nn.Module, path: str, names: Iterable[str]) -> list[Step]:
    """The steps of submodules that are called one after the other."""
    return [step for name in names for step in steps_of(module.get_submodule(name), f"{path}.{name}")]


# Layers of torch and of this package.


@_handles(*_POINTWISE)
def _pointwise(module: nn.Module, path: str) -> list[Step]:
    return [Layer(module)]


@_handles(RMSNormSiLU)
def _rms_norm(module: RMSNormSiLU, path: str) -> list[Step]:
    if module.dim != 1:
        _refuse(module, path, f"normalises dimension {module.dim}, takes 1")
    return [Layer(module)]


@_handles(nn.BatchNorm2d)
def _batch_norm(module: nn.BatchNorm2d, path: str) -> list[Step]:
    if module.running_mean is None:
        _refuse(module, path, "has no running statistics, takes track_running_stats=True")
    return [Layer(module)]


@_handles(nn.GroupNorm, GroupNormSiLU)
def _group_norm(module: nn.GroupNorm, path: str) -> list[Step]:
    return [GroupNormalisation(module)]


@_handles(nn.Conv2d)
def _convolution(module: nn.Conv2d, path: str) -> list[Step]:
    if module.stride != (1, 1):
        _refuse(module, path, "makes the image smaller, takes stride 1")
    if module.padding_mode != "zeros":
        _refuse(module, path, f"pads by padding_mode {module.padding_mode!r}, takes 'zeros'")
    return [Layer(module, (_convolution_axis(module, 0), _convolution_axis(module, 1)), module.out_channels)]


def _convolution_axis(conv: nn.Conv2d, dim: int) -> Axis:
    reach = conv.dilation[dim] * (conv.kernel_size[dim] - 1)
    if conv.padding == "same":
        # An odd padding has its larger half at the end.
        before, both = reach // 2, reach
    else:
        before = 0 if isinstance(conv.padding, str) else conv.padding[dim]
        both = 2 * before
    return Axis(before=before, after=reach - before, growth=both - reach)


@_handles(nn.ConvTranspose2d)
def _transposed_convolution(module: nn.ConvTranspose2d, path: str) -> list[Step]:
    return [Layer(module, (_transposed_axis(module, 0), _transposed_axis(module, 1)), module.out_channels)]


def _transposed_axis(conv: nn.ConvTranspose2d, dim: int) -> Axis:
    """Input ``j`` adds to the outputs ``stride * j - padding`` and the ``reach`` that follow.

    Of a tile too the layer leaves out ``padding`` outputs at both ends, so the tile also has the inputs whose outputs would be left out.
    """
    stride, padding = conv.stride[dim], int(conv.padding[dim])
    reach = conv.dilation[dim] * (conv.kernel_size[dim] - 1)
    growth = reach + 1 + conv.output_padding[dim] - 2 * padding - stride
    return Axis(scale=stride, before=max(reach - padding - stride + 1, 0), after=max(padding, -growth), growth=growth)


@_handles(UpsampleConv2d)
def _upsample_conv(module: UpsampleConv2d, path: str) -> list[Step]:
    axis = Axis(scale=2, before=1, after=1)
    return [Layer(module, (axis, axis), module.out_channels)]


@_handles(nn.Upsample, nn.UpsamplingNearest2d)
def _upsample(module: nn.Upsample, path: str) -> list[Step]:
    factor: Any = module.scale_factor
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    if module.mode != "nearest" or None in factors or any(each % 1 for each in factors):
        _refuse(module, path, "interpolates, takes mode 'nearest' with an integer scale_factor")
    rows, columns = (Axis(scale=int(each)) for each in factors)
    return [Layer(module, (rows, columns))]


@_handles(NormActConv2d)
def _norm_act_conv(module: NormActConv2d, path: str) -> list[Step]:
    return _in_turn(module, path, ("norm", "conv"))


@_handles(nn.Sequential, LeanSequential, residual.ResidualDecoder)
def _sequence(module: nn.Sequential, path: str) -> list[Step]:
    return _in_turn(module, path, module._modules)


# Blocks of the package's networks.


@_handles(residual.ResidualBlock)
def _residual_block(module: residual.ResidualBlock, path: str) -> list[Step]:
    main = _in_turn(module, path, ("norm1", "conv1", "norm2", "conv2"))
    return [Residual(main, _in_turn(module, path, ("shortcut",)))]


@_handles(vq_convolutional.ResidualBlock)
def _vq_residual_block(module: vq_convolutional.ResidualBlock, path: str) -> list[Step]:
    return [Residual(_in_turn(module, path, ("layers",)))]


@_handles(residual.Attention, "diffusers.models.attention_processor.Attention")
def _attention(module: nn.Module, path: str) -> list[Step]:
    return [Attention(module)]


# Blocks of diffusers.


@_handles("diffusers.models.autoencoders.vae.Decoder")
def _decoder(module: Any, path: str) -> list[Step]:
    blocks = (f"up_blocks.{i}" for i in range(len(module.up_blocks)))
    return _in_turn(module, path, ("conv_in", "mid_block", *blocks, "conv_norm_out", "conv_act", "conv_out"))


@_handles("diffusers.models.unets.unet_2d_blocks.UNetMidBlock2D")
def _mid_block(module: Any, path: str) -> list[Step]:
    names = ["resnets.0"]
    for i, attention in enumerate(module.attentions):
        names += [f"attentions.{i}"] if attention is not None else []
        names.append(f"resnets.{i + 1}")
    return _in_turn(module, path, names)


@_handles("diffusers.models.unets.unet_2d_blocks.UpDecoderBlock2D")
def _up_block(module: Any, path: str) -> list[Step]:
    upsamplers = () if module.upsamplers is None else module.upsamplers
    names = *(f"resnets.{i}" for i in range(len(module.resnets))), *(f"upsamplers.{i}" for i in range(len(upsamplers)))
    return _in_turn(module, path, names)


@_handles("diffusers.models.resnet.ResnetBlock2D")
def _resnet_block(module: Any, path: str) -> list[Step]:
    if module.time_emb_proj is not None or module.time_embedding_norm == "scale_shift":
        _refuse(module, path, "takes a time embedding")
    if module.upsample is not None or module.downsample is not None:
        _refuse(module, path, "changes the size of the image")
    main = _in_turn(module, path, ("norm1", "nonlinearity", "conv1", "norm2", "nonlinearity", "dropout", "conv2"))
    shortcut = [] if module.conv_shortcut is None else _in_turn(module, path, ("conv_shortcut",))
    return [Residual(main, shortcut, module.output_scale_factor)]


@_handles("diffusers.models.upsampling.Upsample2D")
def _upsample_2d(module: Any, path: str) -> list[Step]:
    if module.norm is not None or module.use_conv_transpose or not module.use_conv:
        _refuse(module, path, "is not an upsampling by repetition and a convolution")
    double = Layer(partial(F.interpolate, scale_factor=2.0, mode="nearest"), (Axis(scale=2), Axis(scale=2)))
    conv = _in_turn(module, path, ("conv" if module.name == "conv" else "Conv2d_0",))
    return [double, *conv] if module.interpolate else conv
