"""Transformers: a block for sequences, and an encoder and a decoder of patches of images."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._types import LayerActivation, Pooling, check_choice
from fastvae.models.networks.layers import SILU, Layers, Pair, height_and_width

# The standard deviation of learned positions before training. With 0.02, that of Dosovitskiy et al., the vectors of a decoder that adds its
# code to all positions begin almost equal: on 64 pictures of 8 x 8 the squared error after 120 steps was 0.16, with 0.3 it was 0.02.
POSITION_STD = 0.3


class KeyValueCache:
    """The keys and values of the positions that a causal block has seen.

    Args:
        max_length: positions that it can hold.
    """

    def __init__(self, max_length: int):
        self.max_length, self.length = max_length, 0
        self._stored: tuple[Tensor, Tensor] | None = None

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of the next position, ``(batch, heads, 1, width / heads)``; gives those of all positions so far."""
        if self._stored is None:
            shape = (*key.shape[:2], self.max_length, key.shape[3])
            self._stored = key.new_empty(shape), value.new_empty(shape)
        for stored, new in zip(self._stored, (key, value), strict=True):
            stored[:, :, self.length] = new[:, :, 0]
        self.length += 1
        return self._stored[0][:, :, : self.length], self._stored[1][:, :, : self.length]


class TransformerBlock(nn.Module):
    """Self-attention and an MLP of 4 times the width, each behind a layer normalisation and added to its input (Xiong et al., *On Layer
    Normalization in the Transformer Architecture*, 2020).

    Args:
        width: units of a position.
        heads: of the attention, a divisor of ``width``.
        causal: a position sees itself and those before it.
        layers: the options of the linear layers; dropout acts inside the MLP and on what is added to the input.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False, layers: Layers = SILU):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads: got {heads}, takes a divisor of width, {width}")
        self.width, self.heads, self.causal = width, heads, causal
        self.norm1 = nn.LayerNorm(width)
        self.qkv = layers.prepare(nn.Linear(width, 3 * width))
        self.out = nn.Sequential(layers.prepare(nn.Linear(width, width)), *layers.dropouts())
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            *layers.hidden(nn.Linear(width, 4 * width)), layers.prepare(nn.Linear(4 * width, width)), *layers.dropouts()
        )

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """A sequence ``(batch, positions, width)``, or with the cache of the positions before it the next one, ``(batch, 1, width)``."""
        x = x + self.out(self._attend(self.norm1(x), cache))
        return x + self.mlp(self.norm2(x))

    def _attend(self, x: Tensor, cache: KeyValueCache | None) -> Tensor:
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            key, value = cache.append(key, value)
        # The one position that goes with a cache is the last one, which sees all others.
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal and cache is None)
        return attended.transpose(1, 2).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, causal={self.causal}"


class _Positions(nn.Module):
    """The learned vectors of positions, added to a sequence. With a token there is one more position, before the others."""

    def __init__(self, count: int, width: int, pooling: Pooling):
        super().__init__()
        self.positions = nn.Parameter(POSITION_STD * torch.randn(count + (pooling == "token"), width))
        self.width, self.pooling = width, pooling


class Patches(_Positions):
    """From an image to the sequence of its patches: a linear map of each patch, plus the vector of its position.

    Args:
        size: height and width in patches.
        in_channels: channels of the image.
        patch_size: height and width of a patch.
        width: units of a position.
        pooling: with ``"token"`` the sequence begins with one more vector, which is learned.
        layers: the options of the linear map.
    """

    def __init__(self, size: tuple[int, int], in_channels: int, patch_size: int, width: int, pooling: Pooling, layers: Layers):
        super().__init__(size[0] * size[1], width, pooling)
        self.project = layers.prepare(nn.Conv2d(in_channels, width, patch_size, stride=patch_size))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.project(x).flatten(2).mT
        return (F.pad(tokens, (0, 0, 1, 0)) if self.pooling == "token" else tokens) + self.positions


class Pool(nn.Module):
    """From a sequence to a code: a linear map of its first vector with ``"token"``, of the mean of all vectors with ``"mean"``."""

    def __init__(self, width: int, code_dim: int, pooling: Pooling, code: LayerActivation, layers: Layers):
        super().__init__()
        self.pooling = pooling
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(*layers.last(nn.Linear(width, code_dim), "code", code))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(tokens)
        return self.project(tokens[:, 0] if self.pooling == "token" else tokens.mean(1))


class Spread(_Positions):
    """From a code to a sequence of learned vectors of positions, to which a linear map of the code is added: to the first of them with
    ``"token"``, from which the others take it by attention, and to all of them with ``"mean"``."""

    def __init__(self, count: int, latent_dim: int, width: int, pooling: Pooling, layers: Layers):
        super().__init__(count, width, pooling)
        self.project = layers.prepare(nn.Linear(latent_dim, width))

    def forward(self, z: Tensor) -> Tensor:
        token = self.project(z).unsqueeze(1)
        return (F.pad(token, (0, 0, 0, len(self.positions) - 1)) if self.pooling == "token" else token) + self.positions


class Unpatch(nn.Module):
    """From a sequence to the image whose patches are linear maps of its vectors; the first one is left out with ``"token"``."""

    def __init__(
        self,
        size: tuple[int, int],
        out_channels: int,
        patch_size: int,
        width: int,
        pooling: Pooling,
        output: LayerActivation,
        layers: Layers,
    ):
        super().__init__()
        self.size, self.patch_size, self.pooling = size, patch_size, pooling
        self.norm = nn.LayerNorm(width)
        self.project = nn.Sequential(*layers.last(nn.Linear(width, out_channels * patch_size**2), "output", output))

    def forward(self, tokens: Tensor) -> Tensor:
        patches = self.project(self.norm(tokens[:, 1:] if self.pooling == "token" else tokens))
        # (batch, rows, columns, channels, height, width of a patch)
        grid = patches.unflatten(2, (-1, self.patch_size, self.patch_size)).unflatten(1, self.size)
        return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def transformer(
    image_size: int | tuple[int, int],
    in_channels: int,
    patch_size: int,
    width: int,
    depth: int,
    heads: int,
    latent_dim: int,
    *,
    code_dim: int | None = None,
    out_channels: int | None = None,
    pooling: Pooling = "token",
    code: LayerActivation = "identity",
    output: LayerActivation = "identity",
    layers: Layers = SILU,
) -> Pair:
    """A transformer over patches (Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2021), and its mirror image from a code to patches.

    Args:
        image_size: height and width of the images, multiples of ``patch_size``; one number for both.
        in_channels: channels of the images.
        patch_size: height and width of a patch.
        width, depth, heads: units of a position, blocks of the encoder and of the decoder, and heads of a block.
        latent_dim: units that the decoder takes.
        code_dim: units that the encoder gives, ``latent_dim`` by default.
        out_channels: channels of what the decoder gives, by default those of the images.
        pooling: the code is a map of a learned ``"token"`` that is the sequence's first, or of the ``"mean"`` of all positions.
        code, output: activations of the encoder's last layer and of the decoder's last one.
        layers: the options of all layers.
    """
    check_choice("pooling", pooling, get_args(Pooling))
    height, width_in_pixels = height_and_width(image_size)
    if patch_size < 1 or height % patch_size or width_in_pixels % patch_size:
        raise ValueError(f"patch_size: got {patch_size} for images of {height} x {width_in_pixels}, takes a divisor of both")
    size = height // patch_size, width_in_pixels // patch_size
    encoder = nn.Sequential(
        Patches(size, in_channels, patch_size, width, pooling, layers),
        *(TransformerBlock(width, heads, layers=layers) for _ in range(depth)),
        Pool(width, latent_dim if code_dim is None else code_dim, pooling, code, layers),
    )
    decoder = nn.Sequential(
        Spread(size[0] * size[1], latent_dim, width, pooling, layers),
        *(TransformerBlock(width, heads, layers=layers) for _ in range(depth)),
        Unpatch(size, in_channels if out_channels is None else out_channels, patch_size, width, pooling, output, layers),
    )
    return encoder, decoder
