"""The ready-made encoders and decoders of small images and vectors.

Each is a sequence of stages, each a sequence of layers; the decoder's stages undo the encoder's from the last to the first, so that a stage
and its counterpart are an autoencoder of their own.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, cast, get_args

from torch import nn

from fastvae._types import LayerActivation, check_choice

Pair = tuple[nn.Sequential, nn.Sequential]

_ACTIVATIONS = dict(zip(get_args(LayerActivation), (nn.Identity, nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.SiLU), strict=True))


def _activation(name: str, value: str) -> type[nn.Module]:
    check_choice(name, value, _ACTIVATIONS)
    return _ACTIVATIONS[value]


def mlp(
    data_shape: int | Sequence[int],
    hidden: Sequence[int],
    latent_dim: int,
    *,
    code_dim: int | None = None,
    outputs: int = 1,
    activation: LayerActivation,
    code: LayerActivation = "identity",
    output: LayerActivation = "identity",
) -> Pair:
    """An MLP and its mirror image.

    Args:
        data_shape: shape of one ``x``, an integer for a vector.
        hidden: units of the hidden layers; none for a single layer.
        latent_dim: units that the decoder takes.
        code_dim: units that the encoder gives, ``latent_dim`` by default.
        outputs: numbers that the decoder gives for each element of ``x``, on dimension 1.
        activation, code, output: of the hidden layers, of the encoder's last one and of the decoder's last one.
    """
    shape = (data_shape,) if isinstance(data_shape, int) else tuple(data_shape)
    makes = _activation("activation", activation), _activation("code", code), _activation("output", output)
    sizes = (math.prod(shape), *hidden)
    encoder = _linear_stages((*sizes, latent_dim if code_dim is None else code_dim), makes[0], makes[1])
    decoder = _linear_stages((latent_dim, *reversed(sizes[1:]), outputs * sizes[0]), makes[0], makes[2])
    cast("nn.Sequential", encoder[0]).insert(0, nn.Flatten())
    cast("nn.Sequential", decoder[-1]).append(nn.Unflatten(1, (outputs * shape[0], *shape[1:])))
    return encoder, decoder


def _linear_stages(sizes: Sequence[int], activation: type[nn.Module], last: type[nn.Module]) -> nn.Sequential:
    pairs = list(itertools.pairwise(sizes))
    makes = [*[activation] * (len(pairs) - 1), last]
    return nn.Sequential(*(_stage(nn.Linear(below, above), make) for (below, above), make in zip(pairs, makes, strict=True)))


def _stage(layer: nn.Module, activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(layer) if activation is nn.Identity else nn.Sequential(layer, activation())


def conv(latent_dim: int, *, code_dim: int | None = None, outputs: int = 1, output: LayerActivation = "identity") -> Pair:
    """The convolutional networks of many tutorials for images of 1 x 28 x 28.

    Conv(1, 32) ReLU Conv(32, 64) ReLU Linear(3136, 256) ReLU Linear(256, code_dim); Linear(latent_dim, 256) ReLU Linear(256, 3136) ReLU
    ConvT(64, 32) ReLU ConvT(32, outputs). Convolutions of size 3, stride 2, padding 1.

    Args:
        latent_dim: units that the decoder takes.
        code_dim: units that the encoder gives, ``latent_dim`` by default.
        outputs: numbers that the decoder gives for each pixel, on dimension 1.
        output: activation of the decoder's last layer.
    """
    make_output = _activation("output", output)
    down: dict[str, Any] = {"stride": 2, "padding": 1}
    up = {**down, "output_padding": 1}
    encoder = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 32, 3, **down), nn.ReLU()),
        nn.Sequential(nn.Conv2d(32, 64, 3, **down), nn.ReLU()),
        nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, latent_dim if code_dim is None else code_dim)),
    )
    decoder = nn.Sequential(
        nn.Sequential(nn.Linear(latent_dim, 256), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 64 * 7 * 7), nn.ReLU(), nn.Unflatten(1, (64, 7, 7))),
        nn.Sequential(nn.ConvTranspose2d(64, 32, 3, **up), nn.ReLU()),
        _stage(nn.ConvTranspose2d(32, outputs, 3, **up), make_output),
    )
    return encoder, decoder
