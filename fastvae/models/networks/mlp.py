"""Multilayer perceptrons."""

import itertools
import math
from collections.abc import Sequence
from typing import cast

from torch import nn

from fastvae._types import LayerActivation
from fastvae.models.networks.layers import RELU, Layers, Pair


def mlp(
    data_shape: int | Sequence[int],
    hidden: Sequence[int],
    latent_dim: int,
    *,
    code_dim: int | None = None,
    out_channels: int | None = None,
    code: LayerActivation = "identity",
    output: LayerActivation = "identity",
    layers: Layers = RELU,
) -> Pair:
    """An MLP and its mirror image.

    Args:
        data_shape: shape of one ``x``, an integer for a vector.
        hidden: units of the hidden layers; none for a single layer.
        latent_dim: units that the decoder takes.
        code_dim: units that the encoder gives, ``latent_dim`` by default.
        out_channels: size of dimension 1 of what the decoder gives, by default that of ``x``.
        code, output: activations of the encoder's last layer and of the decoder's last one.
        layers: the options of all layers.
    """
    shape = (data_shape,) if isinstance(data_shape, int) else tuple(data_shape)
    sizes = (math.prod(shape), *hidden)
    encoder = linear_stages((*sizes, latent_dim if code_dim is None else code_dim), layers, last=("code", code))
    out_shape = (shape[0] if out_channels is None else out_channels, *shape[1:])
    decoder = linear_stages((latent_dim, *reversed(sizes[1:]), math.prod(out_shape)), layers, last=("output", output))
    return flattened(encoder, decoder, out_shape)


def linear_stages(sizes: Sequence[int], layers: Layers, last: tuple[str, LayerActivation] | None) -> nn.Sequential:
    """Linear layers from each size to the next, each with its activation a stage.

    Args:
        sizes: units, from the input's to the output's.
        layers: the options of all layers.
        last: option and activation of the last layer; None where it is a hidden layer like the others.
    """
    *below, final = (nn.Linear(*pair) for pair in itertools.pairwise(sizes))
    stages = [layers.hidden(layer) for layer in below]
    return nn.Sequential(
        *(nn.Sequential(*stage) for stage in (*stages, layers.hidden(final) if last is None else layers.last(final, *last)))
    )


def flattened(encoder: nn.Sequential, decoder: nn.Sequential, shape: Sequence[int]) -> Pair:
    """The two with a flattening in the encoder's first stage and its inverse in the decoder's last one."""
    cast("nn.Sequential", encoder[0]).insert(0, nn.Flatten())
    cast("nn.Sequential", decoder[-1]).append(nn.Unflatten(1, tuple(shape)))
    return encoder, decoder
