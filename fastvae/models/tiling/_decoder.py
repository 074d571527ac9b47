"""A decoder that computes its image tile by tile."""

from collections.abc import Iterator, Sequence
from itertools import product, zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from fastvae.models.tiling._modules import steps_of
from fastvae.models.tiling._moments import Affine, GroupMoments
from fastvae.models.tiling._steps import (
    Attention,
    GroupNormalisation,
    Patch,
    Region,
    Size,
    Step,
    channels_of,
    everything,
    needed_regions,
    normalisations,
    run,
    size_of,
    sizes_of,
)


class TiledDecoder(nn.Module):
    """Takes the place of a decoder.

    The steps are cut into stages, between which the whole feature map is stored. A stage runs tile by tile, once for each group
    normalisation in it and once for its output; one of a single step runs as a whole.

    Args:
        decoder: of modules that :mod:`fastvae.models.tiling._modules` knows.
        tile: largest height and width of a tile of the image.
        budget: largest number of bytes of a feature map that is stored; None for those of a tile.
    """

    def __init__(self, decoder: nn.Module, tile: int, budget: float | None):
        super().__init__()
        self.decoder, self.tile, self.budget = decoder, tile, budget

    def forward(self, z: Tensor, latent_embeds: None = None) -> Tensor:
        """The image. diffusers' VQModel calls its decoder with a second argument, which is None where the decoder has no SpatialNorm."""
        if z.ndim != 4:
            raise ValueError(f"z: got shape {tuple(z.shape)}, takes (batch, channels, height, width)")
        steps = steps_of(self.decoder, "decoder")
        height, width = sizes_of(steps, size_of(z))[-1]
        if max(height, width) <= self.tile or len(z) == 0:
            return self.decoder(z)
        counts = -(-height // self.tile), -(-width // self.tile)
        for stage in _stages(steps, self._storable(steps, z, counts)):
            z = _whole(stage, z) if len(stage) == 1 else _in_tiles(stage, z, counts)
        return z

    def _storable(self, steps: Sequence[Step], z: Tensor, counts: Size) -> list[bool]:
        """Whether the whole output of each step may be stored."""
        channels, sizes = channels_of(steps, z.shape[1]), sizes_of(steps, size_of(z))
        limit = _largest_patch(steps, z, counts) if self.budget is None else self.budget / (len(z) * z.element_size())
        return [count * height * width <= limit for count, (height, width) in zip(channels[1:], sizes[1:], strict=True)]


def _largest_patch(steps: Sequence[Step], z: Tensor, counts: Size) -> int:
    """The elements of one sample in the largest feature map of the tile in the middle, which has a halo on all sides."""
    size = size_of(z)
    tiles = list(_tiles(sizes_of(steps, size)[-1], counts))
    regions = needed_regions(steps, tiles[len(tiles) // 2], size)
    return max(count * len(rows) * len(columns) for count, (rows, columns) in zip(channels_of(steps, z.shape[1]), regions, strict=True))


def _stages(steps: Sequence[Step], storable: Sequence[bool]) -> Iterator[list[Step]]:
    """Cuts behind each step whose output may be stored. Attention is a stage of its own: it takes and gives a whole feature map."""
    stage = []
    for step, follower, stored in zip_longest(steps, steps[1:], storable):
        stage.append(step)
        if stored or follower is None or isinstance(step, Attention) or isinstance(follower, Attention):
            yield stage
            stage = []


def _whole(steps: Sequence[Step], z: Tensor) -> Tensor:
    patch = Patch.whole(z)
    return run(steps, patch, everything(sizes_of(steps, patch.size)[-1]), {}).values


def _in_tiles(steps: Sequence[Step], z: Tensor, counts: Size) -> Tensor:
    """The whole output, computed in so many tiles along height and width."""
    input, statistics = Patch.whole(z), dict[GroupNormalisation, Affine]()
    for norm, before in normalisations(steps):
        statistics[norm] = _affine(norm, before, input, counts, statistics)
    size, image = sizes_of(steps, input.size)[-1], cast("Patch | None", None)
    for region in _tiles(size, counts):
        tile = run(steps, input, region, statistics).values
        if image is None:
            image = Patch.whole(_empty_image(tile, size))
        image.crop(region).values.copy_(tile)
    return cast("Patch", image).values


def _affine(
    norm: GroupNormalisation, before: Sequence[Step], input: Patch, counts: Size, statistics: dict[GroupNormalisation, Affine]
) -> Affine:
    """What ``norm`` does to its input, which ``before`` gives: one pass over all tiles of that."""
    moments = GroupMoments(norm.norm.num_groups)
    for region in _tiles(sizes_of(before, input.size)[-1], counts):
        moments.add(run(before, input, region, statistics).values)
    return moments.affine(norm.norm)


def _tiles(size: Size, counts: Size) -> Iterator[Region]:
    """Rectangles that cover a feature map, no position twice."""
    return product(_split(size[0], counts[0]), _split(size[1], counts[1]))


def _split(length: int, count: int) -> list[range]:
    """Equal parts of a height or width: ``count`` of them, or one for each position where these are fewer."""
    count = min(length, count)
    return [range(i * length // count, (i + 1) * length // count) for i in range(count)]


def _empty_image(tile: Tensor, size: Size) -> Tensor:
    """In the dtype and the memory layout of its tiles."""
    # A tile is a part of a larger tensor, so its layout shows in the order of its strides alone.
    layout = torch.channels_last if tile.stride(1) < tile.stride(3) else torch.contiguous_format
    return torch.empty((*tile.shape[:2], *size), dtype=tile.dtype, device=tile.device, memory_format=layout)
