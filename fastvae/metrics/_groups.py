"""Draws of samples that share the value of one factor."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Samples in the order of one factor's values, so that those of a value are neighbours.

    Attributes:
        order: the index of the sample at each place, ``(n,)``.
        starts: the first place of the value at each place, ``(n,)``.
        counts: the number of samples with that value, ``(n,)``.
        eligible: the places whose value has enough samples.
    """

    order: Tensor
    starts: Tensor
    counts: Tensor
    eligible: Tensor

    def pairs(self, count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Indices of samples and of others with the same values, ``(count, size)`` each; the value differs from pair to pair."""
        places = self._draw(count, size, generator=generator)
        starts, counts = self.starts[places], self.counts[places]
        steps = 1 + _below(counts - 1, generator)
        return self.order[places], self.order[starts + (places - starts + steps) % counts]

    def members(self, count: int, size: int, generator: torch.Generator) -> Tensor:
        """Indices of ``count`` groups of samples with one value, ``(count, size)``, drawn with replacement."""
        places = self._draw(count, 1, generator=generator).expand(count, size)
        return self.order[self.starts[places] + _below(self.counts[places], generator)]

    def _draw(self, *shape: int, generator: torch.Generator) -> Tensor:
        return self.eligible[torch.randint(len(self.eligible), shape, generator=generator)]


def _below(limits: Tensor, generator: torch.Generator) -> Tensor:
    """Integers from 0 to below the limits."""
    return (torch.rand(limits.shape, generator=generator, dtype=torch.float64) * limits).long()


def group_by_value(factors: Tensor, min_samples: int) -> list[Groups]:
    """The groups of each factor, on the CPU.

    Args:
        factors: ``(n, k)`` int64, numbered from 0.
        min_samples: values with fewer samples are left out.

    Raises:
        ValueError: where that leaves no value of a factor.
    """
    groups = []
    for column, values in enumerate(factors.cpu().unbind(1)):
        lengths = values.bincount()
        if lengths.max() < min_samples:
            raise ValueError(f"factors: column {column} has at most {int(lengths.max())} samples with one value, takes {min_samples}")
        counts = lengths.repeat_interleave(lengths)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        groups.append(Groups(values.argsort(stable=True), starts, counts, (counts >= min_samples).nonzero()[:, 0]))
    return groups
