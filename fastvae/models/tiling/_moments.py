"""Mean and variance of the groups of a feature map that is seen tile by tile."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae.ops._results import accumulation_dtype, widest_dtype


class Affine(NamedTuple):
    """The normalisation of each channel, ``(x - centre) * scale + offset``, each of shape ``(batch, channels, 1, 1)``.

    ``centre`` is the mean rounded to the dtype of ``x``; its rounding error is in ``offset``, so a large mean keeps its digits.
    """

    centre: Tensor
    scale: Tensor
    offset: Tensor


class GroupMoments:
    """The mean, and the sum of squared deviations from it, of each sample's groups over all tiles so far, in float64 where the device
    has it.

    A tile is merged with those before it by their means and sums alone (Chan, Golub and LeVeque, *Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances*, 1979), which loses no digits where the mean is large.
    """

    def __init__(self, num_groups: int):
        self.num_groups, self.count = num_groups, 0
        # The first tile brings shape, dtype and device.
        self.mean = self.squares = torch.zeros(())
        self.dtype = torch.float32

    def add(self, tile: Tensor) -> None:
        """Merges a tile ``(batch, channels, rows, columns)``; every position of the map belongs to one tile."""
        groups = tile.to(widest_dtype(tile.device)).unflatten(1, (self.num_groups, -1))
        variance, mean = torch.var_mean(groups, (2, 3, 4), correction=0)
        count = groups.shape[2:].numel()
        difference, total = mean - self.mean, self.count + count
        self.squares = self.squares + count * variance + difference.square() * (self.count * count / total)
        self.mean = self.mean + difference * (count / total)
        self.count, self.dtype = total, accumulation_dtype(tile.dtype)

    def affine(self, norm: nn.GroupNorm) -> Affine:
        """What ``norm`` does to the channels, in the dtype in which it computes."""
        wide, width = self.mean.dtype, norm.num_channels // norm.num_groups
        mean, rstd = (t.repeat_interleave(width, 1) for t in (self.mean, (self.squares / self.count + norm.eps).rsqrt()))
        scale = rstd if norm.weight is None else rstd * norm.weight.to(wide)
        centre = mean.to(self.dtype)
        offset = (centre - mean) * scale
        if norm.bias is not None:
            offset = offset + norm.bias.to(wide)
        centre, scale, offset = (t.to(self.dtype)[:, :, None, None] for t in (centre, scale, offset))
        return Affine(centre, scale, offset)
