"""Residual blocks of GroupNorm, activation and convolution, and an encoder and a decoder of them with a latent image."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._types import Memory, NormActivation
from fastvae.functional._modules import owns_output
from fastvae.models.networks.layers import SILU, Layers
from fastvae.nn import GroupNormSiLU, UpsampleConv2d
from fastvae.nn.norm_act_conv import norm_then_conv
from fastvae.ops.group_norm import NORM_ACTIVATIONS


def _activated_norm(channels: int, groups: int, layers: Layers, dropouts: Sequence[nn.Module] = ()) -> nn.Module:
    """GroupNorm and the activation, which are one module where the normalisation can do both, and what stands behind them."""
    if layers.activation in NORM_ACTIVATIONS:
        modules = [GroupNormSiLU(groups, channels, activation=cast("NormActivation", layers.activation)), *dropouts]
    else:
        modules = [GroupNormSiLU(groups, channels, activation="none"), *layers.activations(), *dropouts]
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)


def _convolve(norm: nn.Module, conv: nn.Module, x: Tensor, memory: Memory) -> Tensor:
    return norm_then_conv(norm, conv, x) if memory == "lean" else conv(norm(x))


class ResidualBlock(nn.Module):
    """Two convolutions of size 3, each behind GroupNorm and an activation, added to the input.

    Args:
        in_channels, out_channels: where they differ, a convolution of size 1 brings the input to ``out_channels``.
        groups: groups of the normalisations, a divisor of both.
        layers: the options of the layers; dropout acts before the second convolution.
        memory: ``"lean"`` keeps of a normalisation and the convolution behind it the input of the normalisation alone, where SiLU
            or ReLU and nothing else stands between them.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 32, layers: Layers = SILU, memory: Memory = "full"):
        super().__init__()
        self.memory = memory
        self.norm1 = _activated_norm(in_channels, groups, layers)
        # The activation stands before each convolution and not behind it. It is its gain that keeps the scale, all the same.
        self.conv1 = layers.prepare(nn.Conv2d(in_channels, out_channels, 3, padding=1), layers.activation)
        self.norm2 = _activated_norm(out_channels, groups, layers, layers.dropouts())
        self.conv2 = layers.prepare(nn.Conv2d(out_channels, out_channels, 3, padding=1), layers.activation)
        differ = in_channels != out_channels
        self.shortcut = layers.prepare(nn.Conv2d(in_channels, out_channels, 1)) if differ else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = _convolve(self.norm2, self.conv2, _convolve(self.norm1, self.conv1, x, self.memory), self.memory)
        shortcut = self.shortcut(x)
        # The sum is written to h where nobody else holds it. On a CPU the page faults of fresh memory cost a quarter of a convolution's
        # time: 3.5 ms of processor time beside 13 for (4, 32, 128, 128) in float32, and nothing in bfloat16.
        if h.dtype == shortcut.dtype and owns_output(self.conv2):
            return h.add_(shortcut)
        return h + shortcut


class Attention(nn.Module):
    """Self-attention with one head over the positions of an image, added to the input."""

    def __init__(self, channels: int, groups: int = 32, layers: Layers = SILU, memory: Memory = "full"):
        super().__init__()
        self.memory = memory
        self.norm = GroupNormSiLU(groups, channels, activation="none")
        self.qkv = layers.prepare(nn.Conv2d(channels, 3 * channels, 1))
        self.out = layers.prepare(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.flatten(2).mT for t in _convolve(self.norm, self.qkv, x, self.memory).chunk(3, dim=1))
        if torch.compiler.is_exporting():
            # The ONNX exporter takes attention with a dimension of heads alone.
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).reshape(query.shape[0], -1, x.shape[1])
        return x + self.out(attended.mT.unflatten(2, x.shape[2:]))


def _blocks(in_channels: int, out_channels: int, count: int, *options) -> list[nn.Module]:
    return [ResidualBlock(in_channels if i == 0 else out_channels, out_channels, *options) for i in range(count)]


def _middle(channels: int, *options) -> list[nn.Module]:
    block = [ResidualBlock(channels, channels, *options) for _ in range(2)]
    return [block[0], Attention(channels, *options), block[1]]


class _Stages(nn.Sequential):
    """Stages, the last of which are a normalisation and a convolution."""

    def __init__(self, stages: list[nn.Module], memory: Memory):
        super().__init__(*stages)
        self.memory = memory

    def forward(self, input: Tensor) -> Tensor:
        *stages, norm, conv = self
        for stage in stages:
            input = stage(input)
        return _convolve(norm, conv, input, self.memory)


class ResidualEncoder(_Stages):
    """From an image to mean and log variance at ``2 ** (len(channels) - 1)`` times less resolution.

    Args:
        in_channels: channels of the image.
        channels: of each level, from the finest to the coarsest.
        blocks: residual blocks a level.
        groups: groups of the normalisations, a divisor of every number of channels.
        latent_channels: channels of the latent.
        attention: two more residual blocks with self-attention between them at the coarsest level.
        code_channels: channels that come out: by default a mean and a log variance for each of the latent's.
        layers: the options of all layers.
        memory: what is kept for the backward pass, ``"full"`` or ``"lean"``, see :class:`ResidualBlock`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        groups: int = 32,
        latent_channels: int = 4,
        attention: bool = False,
        *,
        code_channels: int | None = None,
        layers: Layers = SILU,
        memory: Memory = "full",
    ):
        options = groups, layers, memory
        stages: list[nn.Module] = [layers.prepare(nn.Conv2d(in_channels, channels[0], 3, padding=1))]
        previous = channels[0]
        for level, width in enumerate(channels):
            if level > 0:
                stages.append(layers.prepare(nn.Conv2d(previous, previous, 3, stride=2, padding=1)))
            stages += _blocks(previous, width, blocks, *options)
            previous = width
        stages += _middle(previous, *options) if attention else []
        code_channels = 2 * latent_channels if code_channels is None else code_channels
        last = layers.prepare(nn.Conv2d(previous, code_channels, 3, padding=1), layers.activation)
        super().__init__([*stages, _activated_norm(previous, groups, layers), last], memory)


class ResidualDecoder(_Stages):
    """From a latent to an image: :class:`ResidualEncoder` the other way round, with the same arguments.

    ``out_channels`` come out, by default as many as the image has.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        groups: int = 32,
        latent_channels: int = 4,
        attention: bool = False,
        *,
        out_channels: int | None = None,
        layers: Layers = SILU,
        memory: Memory = "full",
    ):
        options = groups, layers, memory
        previous = channels[-1]
        stages: list[nn.Module] = [layers.prepare(nn.Conv2d(latent_channels, previous, 3, padding=1))]
        stages += _middle(previous, *options) if attention else []
        for level, width in enumerate(reversed(channels)):
            if level > 0:
                stages.append(layers.prepare(UpsampleConv2d(previous, previous)))
            stages += _blocks(previous, width, blocks, *options)
            previous = width
        out_channels = in_channels if out_channels is None else out_channels
        last = layers.prepare(nn.Conv2d(previous, out_channels, 3, padding=1), layers.activation)
        super().__init__([*stages, _activated_norm(previous, groups, layers), last], memory)
