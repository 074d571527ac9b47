"""Bounds on log p(x)."""

import math
from typing import Any

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.models import SequenceVAE
from fastvae.training import latents
from fastvae.training.metric_groups.base import MetricGroup, Options, Seen

with extra("metrics"):
    from torchmetrics import MeanMetric, Metric


class Bound(MetricGroup):
    """The evidence lower bound and the importance-weighted one on log p(x), of the first test samples."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return options.bound_draws > 0 and hasattr(seen.lit.network, "log_prob_bound")

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        self.draws = {"ELBO": 1, f"IWAE bound, k = {options.bound_draws}": options.bound_draws}
        self.is_text = isinstance(seen.lit.network, SequenceVAE)
        self.unit = "nats a token" if self.is_text else "bits/dim"
        self.metrics = {name: MeanMetric() for bound in self.draws for name in (f"{bound} [nats]", f"{bound} [{self.unit}]")}
        self.count = 0
        # Not of the seed alone: another bound than that of the batch's own noise.
        self.generator = torch.Generator(seen.x.device).manual_seed(options.seed)

    def update(self, seen: Seen) -> None:
        x = seen.x[: max(self.options.bound_samples - self.count, 0)]
        self.count += len(x)
        if len(x) == 0:
            return
        given = {"y": seen.labels[0][: len(x)]} if seen.labels else {}
        for name, draws in self.draws.items():
            with latents.looking(seen.lit) as network:
                nats = network.log_prob_bound(x, draws, generator=self.generator, **given).double()
            self.metrics[f"{name} [nats]"].update(nats)
            self._update_per_element(self.metrics[f"{name} [{self.unit}]"], nats, seen, x)

    def _update_per_element(self, metric: Metric, nats: Tensor, seen: Seen, x: Tensor) -> None:
        if not self.is_text:
            metric.update(-nats / (x[0].numel() * math.log(2)))
            return
        network: Any = seen.lit.network
        tokens = (x != network.pad).sum(1)
        metric.update(nats / tokens, tokens)
