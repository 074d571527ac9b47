"""Splits of a data set, and the order in which a training sees it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


class Indices(NamedTuple):
    """The samples of each part of a data set, by their numbers."""

    train: Tensor
    val: Tensor
    test: Tensor


def stratified_order(count: int, labels: Tensor | None, seed: int) -> Tensor:
    """All samples in a random order in which each class is equally frequent at the beginning, in the middle and at the end."""
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    if labels is None:
        return shuffled
    # A sample is placed at its rank among those of its class, as a share of the class.
    places = torch.empty(count, dtype=torch.float64)
    classes = labels[shuffled]
    for label in classes.unique():
        members = (classes == label).nonzero().flatten()
        places[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    by_class = torch.argsort(classes, stable=True)
    return shuffled[by_class[torch.argsort(places[by_class], stable=True)]]


def split(order: Tensor, val: float, test: float) -> Indices:
    """Cuts an order into training, validation and test part; ``val`` and ``test`` are shares of the whole."""
    count = len(order)
    tests = round(test * count)
    vals = round(val * count)
    train = count - vals - tests
    return Indices(order[:train], order[train : train + vals], order[train + vals :])


class ResumableSampler(DistributedSampler):
    """The order of a training set: a function of the seed and the epoch, shared out among the processes, which may begin inside an epoch.

    Args:
        size: number of samples.
        seed: of the order.
        options: of :class:`torch.utils.data.DistributedSampler`: ``num_replicas``, ``rank``, ``drop_last``.
    """

    def __init__(self, size: int, seed: int, **options: Any):
        super().__init__(range(size), shuffle=True, seed=seed, **options)  # type: ignore[arg-type]
        self.skipped = 0

    def begin_at(self, epoch: int, skipped: int) -> None:
        """Begins an epoch behind the first ``skipped`` samples of this process."""
        self.epoch, self.skipped = epoch, skipped

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.begin_at(epoch, 0)

    def __iter__(self) -> Iterator[int]:
        return iter(list(super().__iter__())[self.skipped :])
