"""Images of shapes whose factors are known, rendered when they are asked for."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvae.distributions.prior import check_count
from fastvae.metrics._shape_rendering import SHAPES, draw_shapes

SIZE = 64
# Pixels from the centre of a shape at full scale to its farthest point.
RADIUS = 15.0
# A centre moves by up to so many pixels from that of the image, which keeps an antialiased shape inside.
REACH = 16.0
SMALLEST_SCALE = 0.5
# Where a factor with one value is between its least, 0, and its largest, 1.
SHARE_OF_ONE_VALUE = {"scale": 1.0, "rotation": 0.0, "position_x": 0.5, "position_y": 0.5}


class FactorSizes(NamedTuple):
    """The number of values of each factor, in the order of the columns of ``factors``."""

    shape: int
    scale: int
    rotation: int
    position_x: int
    position_y: int


LARGEST = FactorSizes(shape=3, scale=6, rotation=40, position_x=32, position_y=32)


class FactorImages(Dataset):
    r"""All images of a grid of factors: 1 x 64 x 64, float32 in [0, 1], a white shape on black. Nothing is stored or downloaded.

    The factors and their numbers of values are those of dSprites (Matthey et al., 2017), 737,280 images in all:

    * ``shape``: square, ellipse, heart.
    * ``scale``: from 0.5 to 1 in equal steps.
    * ``rotation``: value r of n is the angle :math:`\frac{\pi}{2} \frac{r}{n}` for every shape. A square is its own image after a quarter
      turn and an ellipse after half a turn. In the full turn of dSprites they have images with several rotations; here each image has one.
    * ``position_x``, ``position_y``: the centre of the shape moves 32 pixels to the right or down in equal steps; every shape is inside.

    A factor with one value is at full scale, upright or in the middle. An edge pixel is as bright as the part of it that is inside, to
    first order in the distance from its centre to the edge.

    Sample ``index`` is the pair of an image and its factors' values, ``(5,)`` int64. The last factor changes fastest.

    Args:
        shape, scale, rotation, position_x, position_y: the number of values of each factor. There are three shapes at most.
    """

    def __init__(
        self,
        *,
        shape: int = LARGEST.shape,
        scale: int = LARGEST.scale,
        rotation: int = LARGEST.rotation,
        position_x: int = LARGEST.position_x,
        position_y: int = LARGEST.position_y,
    ):
        self.sizes = FactorSizes(shape, scale, rotation, position_x, position_y)
        for name, size in self.sizes._asdict().items():
            check_count(name, size)
        if shape > len(SHAPES):
            raise ValueError(f"shape: got {shape}, takes an integer from 1 to {len(SHAPES)}")

    def __len__(self) -> int:
        return math.prod(self.sizes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        factors = self.factors_of(index)
        return self.render(factors[None])[0], factors

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Samples rendered as one batch, for a ``DataLoader``."""
        factors = self.factors_of(torch.tensor(indices))
        return list(zip(self.render(factors), factors, strict=True))

    def factors_of(self, index: "int | Tensor") -> Tensor:
        """The factors' values, ``(..., 5)`` int64, of samples ``index``, an integer or ``(...)``.

        Raises:
            IndexError: for an index outside the grid.
        """
        index = torch.as_tensor(index)
        _check_integers("index", index)
        outside = (index < 0) | (index >= len(self))
        if outside.any():
            raise IndexError(f"index: got {int(index[outside][0])}, takes an integer from 0 to {len(self) - 1}")
        return torch.stack(torch.unravel_index(index.long(), self.sizes), -1)

    def index_of(self, factors: Tensor) -> Tensor:
        """The inverse of :meth:`factors_of`: ``(...)`` int64 from ``(..., 5)``.

        Raises:
            ValueError: for another shape and for a value that a factor does not have, with its name.
        """
        self._check(factors)
        index = torch.zeros(factors.shape[:-1], dtype=torch.int64, device=factors.device)
        for size, values in zip(self.sizes, factors.unbind(-1), strict=True):
            index = index * size + values
        return index

    def render(self, factors: Tensor) -> Tensor:
        """Images ``(batch, 1, 64, 64)`` of factors' values ``(batch, 5)``, on their device.

        Raises:
            ValueError: as :meth:`index_of`, and for factors without a batch.
        """
        self._check(factors)
        if factors.ndim != 2:
            raise ValueError(f"factors: got shape {tuple(factors.shape)}, takes (batch, {len(self.sizes)})")
        shape, *others = factors.long().unbind(1)
        scale, rotation, x, y = (self._share(name, values) for name, values in zip(self.sizes._fields[1:], others, strict=True))
        radius = RADIUS * (SMALLEST_SCALE + (1 - SMALLEST_SCALE) * scale)
        left, top = (SIZE / 2 + REACH * (2 * share - 1) for share in (x, y))
        return draw_shapes(SIZE, shape, radius, rotation * (math.pi / 2), left, top)

    def _share(self, name: str, values: Tensor) -> Tensor:
        """Equal steps from 0 to 1, ``(batch,)`` float32; the last rotation is one step before 1, where the first comes again."""
        size = getattr(self.sizes, name)
        if size == 1:
            return torch.full(values.shape, SHARE_OF_ONE_VALUE[name], dtype=torch.float32, device=values.device)
        return values.to(torch.float32) / (size if name == "rotation" else size - 1)

    def _check(self, factors: Tensor) -> None:
        _check_integers("factors", factors)
        if factors.ndim == 0 or factors.shape[-1] != len(self.sizes):
            raise ValueError(f"factors: got shape {tuple(factors.shape)}, takes (..., {len(self.sizes)})")
        for (name, size), values in zip(self.sizes._asdict().items(), factors.unbind(-1), strict=True):
            outside = (values < 0) | (values >= size)
            if outside.any():
                raise ValueError(f"factors: got {name} {int(values[outside][0])}, takes an integer from 0 to {size - 1}")


def _check_integers(name: str, values: Tensor) -> None:
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise TypeError(f"{name}: got {values.dtype}, takes integers")
