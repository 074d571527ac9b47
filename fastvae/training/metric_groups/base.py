"""The base of the groups of metrics, with what each is given."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.metrics.features import FeatureName
from fastvae.training.module import LitAutoencoder

with extra("metrics"):
    from torchmetrics import Metric


class Options(NamedTuple):
    """What an evaluation can be told, see :class:`fastvae.training.evaluation.Evaluation`."""

    bound_draws: int
    bound_samples: int
    features: FeatureName | None
    train_samples: int
    seed: int


class Seen(NamedTuple):
    """A test batch, and what the network gave for it.

    ``x`` is what the network was called with, floating images of 8 bits in [0, 1]; ``labels`` are those that the network takes, ``label``
    and ``factors`` those of the data; ``output`` is that of the call.
    """

    lit: LitAutoencoder
    x: Tensor
    labels: tuple[Tensor, ...]
    label: Tensor | None
    factors: Tensor | None
    output: Mapping[str, Any]


class MetricGroup(ABC):
    """The base. A group is made for the first test batch, and gets all of them.

    Args:
        seen: the first batch.
        options: of the evaluation.
    """

    def __init__(self, seen: Seen, options: Options):
        self.options = options
        self.metrics: dict[str, Metric] = {}
        # Why figures are missing, by the metric that would have given them.
        self.left_out: dict[str, str] = {}

    @staticmethod
    @abstractmethod
    def applies(seen: Seen, options: Options) -> bool:
        """Whether the group has figures of this network on these data."""

    @abstractmethod
    def update(self, seen: Seen) -> None:
        """Adds a batch."""

    def results(self) -> dict[str, float]:
        """The figures of all batches by name."""
        return {name: float(metric.compute()) for name, metric in self.metrics.items()}

    def to(self, device: torch.device) -> None:
        for metric in self.metrics.values():
            metric.to(device)
