"""The accuracy of simple classifiers says what a representation is worth to others."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import extra

with extra("metrics"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler


class DownstreamAccuracy(NamedTuple):
    """The shares of test samples that are classified right."""

    logistic_regression: float
    nearest_neighbours: float


def downstream_accuracy(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, neighbours: int = 5, max_train: int = 10_000, seed: int = 0
) -> DownstreamAccuracy:
    """The accuracy of logistic regression, on codes of unit variance with an L2 penalty of scikit-learn's default weight 1, and of the
    ``neighbours`` nearest codes by Euclidean distance.

    Call it with codes, and with the data themselves, to see what the representation has kept.

    Args:
        train, test: codes ``(count, ...)``, flattened, and int64 labels ``(count,)``.
        neighbours: that vote.
        max_train: so many training samples at most, a random choice by ``seed``.

    Raises:
        ValueError: for codes that are not finite, labels of another shape, fewer than two classes or fewer samples than neighbours.
    """
    codes, labels = _arrays("train", *train)
    test_codes, test_labels = _arrays("test", *test)
    if len(np.unique(labels)) < 2:
        raise ValueError(f"train: got labels of {len(np.unique(labels))} classes, takes at least 2")
    if not 1 <= neighbours <= min(len(codes), max_train):
        raise ValueError(f"neighbours: got {neighbours}, takes an integer from 1 to the {min(len(codes), max_train)} training samples")
    kept = np.random.default_rng(seed).permutation(len(codes))[:max_train]
    classifiers = (make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)), KNeighborsClassifier(neighbours))
    return DownstreamAccuracy(*(float(model.fit(codes[kept], labels[kept]).score(test_codes, test_labels)) for model in classifiers))


def _arrays(name: str, codes: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    if labels.shape != codes.shape[:1] or len(labels) == 0:
        raise ValueError(f"{name}: got labels of shape {tuple(labels.shape)} for {len(codes)} codes, takes one each, and at least one")
    flat = codes.detach().flatten(1).to("cpu", torch.float64).numpy()
    if not np.isfinite(flat).all():
        raise ValueError(f"{name}: got codes that are not finite, takes finite ones")
    return flat, labels.cpu().numpy()
