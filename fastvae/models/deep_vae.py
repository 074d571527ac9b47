"""A deep hierarchy of latent images (Vahdat and Kautz, *NVAE*, 2020; Child, *Very Deep VAEs*, 2021)."""

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastvae.distributions.names import decoder_channels
from fastvae.distributions.normal import DiagonalNormal
from fastvae.distributions.prior import check_count
from fastvae.models._inputs import in_channels_last
from fastvae.models._recipe import ready_made
from fastvae.models._top_down import Level, split_normal
from fastvae.models.hierarchy import HierarchicalVAE
from fastvae.models.networks import ResidualBlock
from fastvae.nn import GroupNormSiLU, UpsampleConv2d


class ResidualLevel(Level):
    r"""A level whose state is an image, to which z is added.

    The posterior is residual, :math:`N(\mu_p + \Delta\mu, \sigma_p^2 e^{\Delta \log \sigma^2})` (*NVAE*, section 3.2): the KL does not
    depend on the prior's mean, and the encoder learns what the data add to the levels above.

    Args:
        channels: of the state, and of the encoder's image for this level.
        latent_channels: of z.
        groups: of the normalisations, a divisor of ``channels``.
        scale: of the initial weights of the convolutions that end a branch beside the state.
    """

    def __init__(self, channels: int, latent_channels: int, groups: int, scale: float = 1.0):
        super().__init__()
        self.to_prior = _head(channels, channels, latent_channels, groups)
        self.to_posterior = _head(2 * channels, channels, latent_channels, groups)
        self.from_latent = nn.Conv2d(latent_channels, channels, 1)
        cell = ResidualBlock(channels, channels, groups)
        # The state goes through these layers on its way to the next level; upsamplings are appended to them.
        self.below = nn.Sequential(cell)
        with torch.no_grad():
            self.from_latent.weight.mul_(scale)
            cell.conv2.weight.mul_(scale)

    def prior(self, state: Tensor) -> DiagonalNormal:
        return split_normal("prior", self.to_prior(state))

    def posterior(self, state: Tensor, feature: Tensor, p: DiagonalNormal) -> DiagonalNormal:
        shift = split_normal("posterior", self.to_posterior(torch.cat([state, feature], dim=1)))
        return DiagonalNormal(p.mu + shift.mu, p.logvar + shift.logvar)

    def merge(self, state: Tensor, z: Tensor) -> Tensor:
        return self.below(state + self.from_latent(z))


def _head(in_channels: int, channels: int, latent_channels: int, groups: int) -> nn.Sequential:
    """A residual cell, then mu and log variance."""
    return nn.Sequential(
        ResidualBlock(in_channels, channels, groups),
        GroupNormSiLU(groups, channels),
        nn.Conv2d(channels, 2 * latent_channels, 3, padding=1),
    )


class BottomUp(nn.Module):
    """The bottom-up pass over an image: residual cells at each resolution, whose last image serves all levels there.

    Args:
        in_channels: channels of the image.
        widths: channels at each resolution, from the finest to the coarsest.
        blocks: levels at each resolution; as many residual cells, at least one.
        groups: groups of the normalisations, a divisor of every width.
    """

    def __init__(self, in_channels: int, widths: Sequence[int], blocks: Sequence[int], groups: int):
        super().__init__()
        self.blocks = tuple(blocks)
        self.stages = nn.ModuleList()
        previous = in_channels
        for index, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            first = nn.Conv2d(previous, width, 3, padding=1, stride=1 if index == 0 else 2)
            self.stages.append(nn.Sequential(first, *(ResidualBlock(width, width, groups) for _ in range(max(count, 1)))))
            previous = width

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """An image a level, from the top."""
        images: list[Tensor] = []
        for stage, count in zip(self.stages, self.blocks, strict=True):
            x = stage(x)
            images += [x] * count
        return tuple(reversed(images))


AnyDeepVAE = TypeVar("AnyDeepVAE", bound="DeepVAE")


class DeepVAE(HierarchicalVAE):
    """A hierarchy of latent images. Images and states are brought into ``torch.channels_last``, where convolutions and normalisations are
    fastest; the weights are contiguous.

    Args:
        encoder, levels, decoder, start: see :class:`~fastvae.models.HierarchicalVAE`.
        likelihood, beta, free_bits: see there.
    """

    @classmethod
    @ready_made
    def residual(
        cls: type[AnyDeepVAE],
        image_size: int | tuple[int, int] = 32,
        in_channels: int = 3,
        widths: Sequence[int] = (32, 64, 128),
        blocks: int | Sequence[int] = 2,
        latent_channels: int = 8,
        groups: int = 8,
        **options,
    ) -> AnyDeepVAE:
        """Residual cells of GroupNorm, SiLU and convolution in both directions; the decoder gives logits.

        On the way down each level has a prior, a residual posterior, z and a residual cell. As in *Very Deep VAEs*, the last convolution of
        each cell on the way down, and the one that z goes through, start smaller by the root of the number of levels, so that the size of
        the state does not grow with it; and the first state is learned.

        Args:
            image_size: height and width of the images, one number for both, multiples of ``2 ** (len(widths) - 1)``.
            in_channels: channels of the image.
            widths: channels at each resolution, from the finest to the coarsest.
            blocks: levels at each resolution, from the finest to the coarsest, or one number for all; 0 for a resolution without latents,
                which the coarsest may not be.
            latent_channels: channels of each z.
            groups: groups of the normalisations, a divisor of every width.
            options: those of the class.
        """
        counts = _check_blocks(blocks, len(widths))
        for width in widths:
            if width % groups:
                raise ValueError(f"groups: got {groups} for {width} channels, takes a divisor of every width")
        levels = _levels(widths, counts, latent_channels, groups)
        decoder = nn.Sequential(
            GroupNormSiLU(groups, widths[0]), nn.Conv2d(widths[0], decoder_channels(in_channels, options), 3, padding=1)
        )
        start = nn.Parameter(torch.randn(widths[-1], *_coarsest_size(image_size, 2 ** (len(widths) - 1))))
        return cls(BottomUp(in_channels, widths, counts, groups), levels, decoder, start, **options)

    def encoded(self, x: Tensor) -> Sequence[Tensor]:
        return super().encoded(in_channels_last(x))

    def started(self, n: int) -> Tensor:
        return in_channels_last(super().started(n))


def _levels(widths: Sequence[int], counts: Sequence[int], latent_channels: int, groups: int) -> list[ResidualLevel]:
    """The levels from the top; the last one at each resolution leads to the next."""
    levels: list[ResidualLevel] = []
    scale = 1 / math.sqrt(sum(counts))
    for index in reversed(range(len(widths))):
        levels += [ResidualLevel(widths[index], latent_channels, groups, scale) for _ in range(counts[index])]
        if index > 0:
            levels[-1].below.append(UpsampleConv2d(widths[index], widths[index - 1]))
    return levels


def _check_blocks(blocks: int | Sequence[int], resolutions: int) -> tuple[int, ...]:
    counts = (blocks,) * resolutions if isinstance(blocks, int) else tuple(blocks)
    if len(counts) != resolutions or any(count < 0 for count in counts):
        raise ValueError(f"blocks: got {blocks!r}, takes an integer or one for each of {resolutions} widths, each at least 0")
    check_count("blocks", counts[-1])
    return counts


def _coarsest_size(image_size: int | tuple[int, int], scale: int) -> tuple[int, int]:
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % scale or width % scale or height < scale or width < scale:
        raise ValueError(f"image_size: got {image_size}, takes multiples of {scale}")
    return height // scale, width // scale
