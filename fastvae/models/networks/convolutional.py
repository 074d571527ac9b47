"""Convolutions of stride 2, with linear layers between them and the code."""

import itertools
import math
from collections.abc import Sequence

from torch import nn

from fastvae._types import LayerActivation
from fastvae.models.networks.layers import RELU, Layers, Pair, height_and_width
from fastvae.models.networks.mlp import flattened, linear_stages


def conv(latent_dim: int, *, code_dim: int | None = None, out_channels: int = 1, output: LayerActivation = "identity") -> Pair:
    """The convolutional networks of many tutorials for images of 1 x 28 x 28.

    Conv(1, 32) ReLU Conv(32, 64) ReLU Linear(3136, 256) ReLU Linear(256, code_dim); Linear(latent_dim, 256) ReLU Linear(256, 3136) ReLU
    ConvT(64, 32) ReLU ConvT(32, out_channels). Convolutions of size 3, stride 2, padding 1.

    Args:
        latent_dim: units that the decoder takes.
        code_dim: units that the encoder gives, ``latent_dim`` by default.
        out_channels: channels of what the decoder gives.
        output: activation of the decoder's last layer.
    """
    return strided_conv(28, 1, (32, 64), (256,), latent_dim, code_dim=code_dim, out_channels=out_channels, output=output)


def strided_conv(
    image_size: int | tuple[int, int],
    in_channels: int,
    channels: Sequence[int],
    hidden: Sequence[int],
    latent_dim: int,
    *,
    code_dim: int | None = None,
    out_channels: int | None = None,
    code: LayerActivation = "identity",
    output: LayerActivation = "identity",
    layers: Layers = RELU,
) -> Pair:
    """Convolutions of size 3, stride 2 and padding 1, each of which halves height and width, rounded up; then linear layers; and their
    mirror image with transposed convolutions.

    Args:
        image_size: height and width of the images, one number for both.
        in_channels: channels of the images.
        channels: channels behind each convolution.
        hidden: units of the hidden linear layers; none for a single linear layer.
        latent_dim: units that the decoder takes.
        code_dim: units that the encoder gives, ``latent_dim`` by default.
        out_channels: channels of what the decoder gives, by default those of the images.
        code, output: activations of the encoder's last layer and of the decoder's last one.
        layers: the options of all layers.
    """
    if not channels:
        raise ValueError("channels: got none, takes the channels of at least one convolution")
    sizes = [height_and_width(image_size)]
    for _ in channels:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    widths = (in_channels, *channels)
    shape = (widths[-1], *sizes[-1])

    down = [layers.hidden(nn.Conv2d(*pair, 3, stride=2, padding=1)) for pair in itertools.pairwise(widths)]
    backwards = (in_channels if out_channels is None else out_channels, *channels)
    ups = [_upward(backwards[level + 1], backwards[level], sizes[level]) for level in reversed(range(len(channels)))]
    up = [*(layers.hidden(layer) for layer in ups[:-1]), layers.last(ups[-1], "output", output)]
    linear, linear_back = flattened(
        linear_stages((math.prod(shape), *hidden, latent_dim if code_dim is None else code_dim), layers, last=("code", code)),
        linear_stages((latent_dim, *reversed(hidden), math.prod(shape)), layers, last=None),
        shape,
    )
    encoder = nn.Sequential(*(nn.Sequential(*stage) for stage in down), *linear)
    decoder = nn.Sequential(*linear_back, *(nn.Sequential(*stage) for stage in up))
    return encoder, decoder


def _upward(in_channels: int, out_channels: int, size: tuple[int, int]) -> nn.ConvTranspose2d:
    """The transposed convolution that gives images of ``size``: of the two sizes that halve to the same one, the even one takes a padding
    of its output."""
    even = (1 - size[0] % 2, 1 - size[1] % 2)
    return nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=even)
