"""The images behind the page: functions of a model with a latent vector, on tensors alone."""

from typing import Any

import torch
from torch import Tensor

from fastvae.metrics.active_units import ActiveUnits
from fastvae.models import AE, VAE
from fastvae.nn import ClassCondition
from fastvae.training import latents, pictures
from fastvae.training.errors import CheckpointError
from fastvae.training.module import LitAutoencoder

TAKES = "fastvae explore takes an AE or a VAE of grey or RGB images whose latent is a vector, with no condition or with classes"
# The side of the map in pixels of the model's images, which decides how many of them it shows, within two limits: fewer would hide how one
# turns into the next, more would take long to decode.
MAP_PIXELS, FEWEST_TILES, MOST_TILES = 560, 6, 20


def check_model(lit: LitAutoencoder) -> None:
    """Raises where a checkpoint's model cannot be explored.

    Raises:
        CheckpointError: naming the model, for one without a latent vector, with a condition other than classes, or of data other than
            images.
    """
    network: Any = lit.network
    condition = getattr(network, "condition", None)
    if not isinstance(network, AE | VAE):
        raise _refusal(lit, "")
    if condition is not None and not isinstance(condition, ClassCondition):
        raise _refusal(lit, f" with a {type(condition).__name__}")
    shape = tuple(lit.sample_shape or ())
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise _refusal(lit, f" of samples of shape {shape}")


def _refusal(lit: LitAutoencoder, reason: str) -> CheckpointError:
    return CheckpointError(f"checkpoint: got {type(lit.network).__name__}{reason}, {TAKES}")


class LatentSpace:
    """The latent space of a model, as far as samples fill it.

    Images are batches ``(batch, channels, height, width)`` in the units of the data, as in :mod:`fastvae.training.latents`. A ``label`` is
    a class of a conditional model, and None for every other model.

    Args:
        lit: a model that :func:`check_model` lets through.
        x: at least two samples, which say which dimensions are active and how far they reach.
        labels: the samples' labels, one tensor, where the model takes labels.

    Attributes:
        z: the latents of the samples, ``(count, dimensions)``.
        variances: of each dimension over the samples, float64 ``(dimensions,)``.
        threshold: of the variances, that of :class:`fastvae.metrics.active_units.ActiveUnits`.
        active: the dimensions whose variance exceeds the threshold, from the largest variance down.
        low, high: the least and the greatest value of each dimension among the samples, ``(dimensions,)``.
        mean: of each dimension over the samples, ``(dimensions,)``.
        num_classes: of a conditional model; 0 of every other model.

    Raises:
        CheckpointError: for a latent that is no vector.
    """

    def __init__(self, lit: LitAutoencoder, x: Tensor, *labels: Tensor):
        self.lit, self.x, self.labels = lit, x, labels
        self.z = latents.encode(lit, x, *latents.completed(lit, x, labels))[0]
        if self.z.ndim != 2:
            raise _refusal(lit, f" with a latent of shape {tuple(self.z.shape[1:])}")
        units = ActiveUnits(self.z.shape[1])
        units.update(self.z)
        self.threshold, self.variances = units.threshold, units.compute().variances
        order = self.variances.argsort(descending=True, stable=True)
        self.active: list[int] = order[self.variances[order] > self.threshold].tolist()
        self.low, self.high = self.z.aminmax(dim=0)
        self.mean = self.z.mean(0)
        condition = getattr(lit.network, "condition", None)
        self.num_classes = 0 if condition is None else condition.num_classes

    @property
    def name(self) -> str:
        """The model's class."""
        return type(self.lit.network).__name__

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.x.shape[1:]
        return channels, height, width

    @property
    def has_prior(self) -> bool:
        """Whether the model has samples."""
        return latents.can_sample(self.lit.network)

    @property
    def classifies(self) -> bool:
        """Whether the model can tell the class of an image, whose label is then -1."""
        return getattr(self.lit.network, "takes_unlabelled", False)

    def as_samples(self, images: Tensor) -> Tensor:
        """8-bit images in the dtype of the samples, in which floating images lie in [0, 1]."""
        return images.to(self.x.dtype) / 255 if self.x.is_floating_point() else images

    def encode(self, x: Tensor, label: int | None = None) -> Tensor:
        """The latents of images, ``(batch, dimensions)``; of a VAE the means of the posteriors."""
        labels = latents.completed(self.lit, x, self._labels(label, len(x)))
        return latents.encode(self.lit, x, *labels)[0]

    def decode(self, z: Tensor, label: int | None = None) -> Tensor:
        """The images of latents ``(batch, dimensions)``."""
        return latents.decode(self.lit, z, *self._labels(label, len(z)))

    def reconstruct(self, x: Tensor, label: int | None = None) -> Tensor:
        """The reconstructions of images."""
        return latents.reconstruct(self.lit, x, *self._labels(label, len(x)))

    def sample(self, count: int, seed: int, label: int | None = None) -> Tensor:
        """The means of p(x | z) for ``count`` draws from the prior.

        Raises:
            TrainingError: for a model without a prior.
        """
        return latents.sample(self.lit, count, seed, *self._labels(label, count))

    def interpolate(self, start: Tensor, end: Tensor, steps: int, start_label: int | None = None, end_label: int | None = None) -> Tensor:
        """The images of ``steps`` points on the line between the latents of two images, each a batch of one."""
        labels = (self._labels(label, 1) for label in (start_label, end_label))
        return latents.interpolate(self.lit, start, end, steps, *labels)

    def map(self, label: int | None = None) -> Tensor:
        """A picture of a latent space of two dimensions, uint8 ``(channels, height, width)``: as many images in a row as in a column, each
        decoded from the point in its middle. Dimension 0 rises to the right, dimension 1 upwards."""
        middles = ((torch.arange(self.tiles) + 0.5) / self.tiles).tolist()
        points = [self.point_at(right, down) for down in middles for right in middles]
        return pictures.grid(self.decode(torch.stack(points), label), self.tiles, gap=0)

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width of the map in pixels."""
        _, height, width = self.shape
        return self.tiles * height, self.tiles * width

    @property
    def tiles(self) -> int:
        """The images in a row of the map."""
        return max(FEWEST_TILES, min(MOST_TILES, MAP_PIXELS // max(self.shape[1:])))

    def point_at(self, right: float, down: float) -> Tensor:
        """The latent at a place of the map, ``(2,)``.

        Args:
            right, down: the distances from the map's upper left corner, as shares of its width and of its height.
        """
        return torch.lerp(self.low, self.high, self.low.new_tensor([right, 1 - down]))

    def _labels(self, label: int | None, count: int) -> tuple[Tensor, ...]:
        return () if label is None else (torch.full((count,), label),)
