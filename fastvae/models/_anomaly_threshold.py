"""The threshold above which a score is an anomaly."""

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class AnomalyThreshold(nn.Module):
    """A module with a score and its threshold, a buffer, which the ``state_dict`` holds where it has been fitted."""

    threshold: Tensor

    def __init__(self):
        super().__init__()
        # NaN stands for no threshold, which is not stored.
        self.register_buffer("threshold", torch.tensor(math.nan), persistent=False)

    @abstractmethod
    def anomaly_score(self, x: Tensor) -> Tensor:
        """The score of each sample, shape ``(batch,)``."""

    def _store_threshold(self, stored: bool) -> None:
        """Puts the threshold into the ``state_dict``, or takes it out."""
        self.register_buffer("threshold", self.threshold, persistent=stored)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "threshold" in state_dict:
            self._store_threshold(True)
        elif any(name.startswith(prefix) for name in state_dict):
            # The old threshold belongs to other weights.
            self.threshold.fill_(math.nan)
            self._store_threshold(False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def fit_threshold(self, batches: Tensor | Iterable[Tensor], quantile: float = 0.95) -> Tensor:
        """Sets ``threshold``, a buffer, to a quantile of the scores of validation data that hold no anomalies, and gives a copy of it. From
        then on the ``state_dict`` holds it.

        Args:
            batches: a batch, or several.
            quantile: the share of the validation data that is to pass.
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile: got {quantile!r}, takes a number in (0, 1]")
        batches = [batches] if isinstance(batches, Tensor) else batches
        scores = torch.cat([self.anomaly_score(batch) for batch in batches])
        if scores.numel() == 0:
            raise ValueError("batches: got no samples, takes at least one")
        self.threshold.copy_(torch.quantile(scores, quantile))
        self._store_threshold(True)
        return self.threshold.clone()

    def is_anomaly(self, x: Tensor) -> Tensor:
        """A mask of the samples that score above the threshold: bool, shape ``(batch,)``."""
        if self.threshold.isnan():
            raise RuntimeError("threshold: has not been fitted, call fit_threshold(batches) with validation data")
        return self.anomaly_score(x) > self.threshold
