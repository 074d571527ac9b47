"""The base of metrics that compare a representation with the known factors of the data."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastvae.metrics._samples import SampledMetric


class Representation(NamedTuple):
    """Codes, ``(n, d)`` float64, and the factors' values, ``(n, k)`` int64, each numbered from 0."""

    codes: Tensor
    factors: Tensor

    def rows(self, indices: Tensor) -> "Representation":
        indices = indices.to(self.codes.device)
        return Representation(self.codes[indices], self.factors[indices])


class RepresentationMetric(SampledMetric):
    """Keeps pairs of codes and factors. A subclass computes its scores in :meth:`_scores`."""

    higher_is_better = True
    fields: ClassVar[dict[str, torch.dtype]] = {"codes": torch.float64, "factors": torch.int64}
    min_codes: ClassVar[int] = 1
    min_factors: ClassVar[int] = 1

    def update(self, codes: Tensor, factors: Tensor) -> None:
        """Adds a batch.

        Args:
            codes: the representation, ``(batch, d)``, floating: as a rule the posterior's mean.
            factors: the values of the factors that made the data, ``(batch, k)``, integers, in any numbering.
        """
        self.add_samples(codes=codes, factors=factors)

    def compute(self) -> dict[str, Tensor]:
        """The scores, float64 scalars.

        Raises:
            ValueError: for too few samples, codes or factors, and for a factor with one value.
        """
        samples = self.samples(2)
        for name, least in (("codes", self.min_codes), ("factors", self.min_factors)):
            if samples[name].shape[1] < least:
                raise ValueError(f"{name}: got dim {samples[name].shape[1]}, takes at least {least}")
        check_varied(samples["factors"])
        factors = [column.unique(return_inverse=True)[1] for column in samples["factors"].unbind(1)]
        scores = self._scores(Representation(samples["codes"], torch.stack(factors, 1)))
        return {name: torch.as_tensor(score, dtype=torch.float64, device=self.device) for name, score in scores.items()}

    @abstractmethod
    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        """The scores of the kept samples."""


def check_varied(factors: Tensor, where: str = "the samples") -> None:
    """Raises where a factor has one value."""
    constant = (factors == factors[0]).all(0).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"factors: column {constant[0]} has one value in {where}, takes at least 2")


def split(data: Representation, num_train: int, num_test: int, seed: int) -> tuple[Representation, Representation]:
    """Disjoint training and test samples; fewer of both, in the same proportion, where there are not enough."""
    total = len(data.codes)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    asked = num_train + num_test
    train_size = min(max(min(total, asked) * num_train // asked, 1), total - 1)
    train, test = data.rows(order[:train_size]), data.rows(order[train_size:][:num_test])
    check_varied(train.factors, "the training samples")
    return train, test


def each_factor(train: Representation, test: Representation) -> Iterator[tuple]:
    """The arrays ``(codes, values)`` of both, for one factor after the other, as scikit-learn takes them."""
    arrays = [(part.codes.cpu().numpy(), part.factors.cpu().numpy()) for part in (train, test)]
    for column in range(train.factors.shape[1]):
        yield tuple((codes, factors[:, column]) for codes, factors in arrays)
