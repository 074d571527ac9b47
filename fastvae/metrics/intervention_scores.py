"""Scores that ask which factor a group of samples shares: BetaVAE (Higgins et al., 2017) and FactorVAE (Kim and Mnih, 2018)."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.distributions.prior import check_count
from fastvae.metrics._groups import Groups, group_by_value
from fastvae.metrics._representation import Representation, RepresentationMetric

with extra("metrics"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

# Codes of so many samples are in memory at once: 16 MiB for 64 codes.
SAMPLES_AT_ONCE = 2**15


class InterventionScore(RepresentationMetric):
    """The base of both scores.

    The papers make new data for each group. Here a factor is drawn, then kept samples that share a value of it, each as likely as any
    other, so that the remaining factors vary as they do in the data.

    Args:
        num_train: groups that the classifier sees, 10,000 in Locatello et al., 2019.
        num_test: other groups, for its accuracy.
        group_size: pairs or samples of a group.
        max_samples: samples that are kept, see :class:`~fastvae.metrics._samples.SampledMetric`.
        seed: of the groups.
        kwargs: of ``torchmetrics.Metric``.
    """

    min_factors: ClassVar[int] = 2

    def __init__(
        self,
        num_train: int = 10_000,
        num_test: int = 5_000,
        *,
        group_size: int = 64,
        max_samples: int = 100_000,
        seed: int = 0,
        **kwargs: Any,
    ):
        super().__init__(max_samples, **kwargs)
        self.num_train, self.num_test = check_count("num_train", num_train), check_count("num_test", num_test)
        self.group_size, self.seed = check_count("group_size", group_size), seed

    def _examples(self, data: Representation, min_samples: int) -> list[tuple[Tensor, Tensor]]:
        """Features of training and test groups, ``(groups, d)``, and the factor that each group shares, ``(groups,)``."""
        generator = torch.Generator().manual_seed(self.seed)
        groups = group_by_value(data.factors, min_samples)
        return [self._features_of_factors(data.codes, groups, count, generator) for count in (self.num_train, self.num_test)]

    def _features_of_factors(self, codes: Tensor, groups: list[Groups], count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shared = torch.randint(len(groups), (count,), generator=generator).sort().values
        at_once = max(SAMPLES_AT_ONCE // self.group_size, 1)
        features = [
            self._features(codes, groups[int(part[0])], len(part), generator)
            for values in shared.split(shared.bincount(minlength=len(groups)).tolist())
            for part in values.split(at_once)
            if len(part)
        ]
        return torch.cat(features), shared.to(codes.device)

    @abstractmethod
    def _features(self, codes: Tensor, group: Groups, count: int, generator: torch.Generator) -> Tensor:
        """Features of ``count`` groups that share the factor of ``group``, ``(count, d)``."""


class BetaVAEScore(InterventionScore):
    r"""The accuracy of a linear classifier that guesses the factor which pairs share.

    Its features are :math:`\frac{1}{L} \sum_l |z_l - z'_l|` over ``group_size`` pairs, where each pair has its own value of the shared
    factor. It is scikit-learn's logistic regression on standardised features, so that the scale of a code does not matter.

    ``compute()`` returns ``beta_vae_score``, on the test groups, and ``beta_vae_score_train``. Chance is 1/k. Arguments:
    :class:`InterventionScore`. A value needs two samples.
    """

    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        train, test = ((features.cpu().numpy(), shared.cpu().numpy()) for features, shared in self._examples(data, 2))
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*train)
        return {"beta_vae_score": classifier.score(*test), "beta_vae_score_train": classifier.score(*train)}

    def _features(self, codes: Tensor, group: Groups, count: int, generator: torch.Generator) -> Tensor:
        first, second = (codes[indices.to(codes.device)] for indices in group.pairs(count, self.group_size, generator))
        return (first - second).abs().mean(1)


class FactorVAEScore(InterventionScore):
    """The accuracy of a majority vote that guesses the shared factor from the code that varies least in a group.

    The variance of a code in the group is divided by that in all kept samples. Each code votes for the factor for which it varied least
    in most training groups.

    ``compute()`` returns ``factor_vae_score``, on the test groups, ``factor_vae_score_train``, and ``factor_vae_active_codes``, the number
    of codes that are not left out. Chance is 1/k; without an active code the scores are 0. Arguments: :class:`InterventionScore`. A
    value needs ``group_size`` samples, at least 2.

    Args:
        prune_threshold: codes with a smaller standard deviation have collapsed to the prior's mean and are left out.
    """

    def __init__(self, *args: Any, prune_threshold: float = 0.05, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.group_size < 2:
            raise ValueError(f"group_size: got {self.group_size}, the variance takes an integer of at least 2")
        if not prune_threshold >= 0:
            raise ValueError(f"prune_threshold: got {prune_threshold!r}, takes a number >= 0")
        self.prune_threshold = prune_threshold

    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        deviations = data.codes.std(0)
        # The deviation of a constant code is 0 up to rounding.
        active = (deviations >= self.prune_threshold) & (data.codes.amax(0) > data.codes.amin(0))
        train_accuracy, test_accuracy = 0.0, 0.0
        if active.any():
            normalized = Representation(data.codes[:, active] / deviations[active], data.factors)
            votes = [count_votes(*part, data.factors.shape[1]) for part in self._examples(normalized, self.group_size)]
            train_accuracy, test_accuracy = (accuracy_of_votes(votes[0], part) for part in votes)
        return {
            "factor_vae_score": test_accuracy,
            "factor_vae_score_train": train_accuracy,
            "factor_vae_active_codes": int(active.sum()),
        }

    def _features(self, codes: Tensor, group: Groups, count: int, generator: torch.Generator) -> Tensor:
        return codes[group.members(count, self.group_size, generator).to(codes.device)].var(1)


def count_votes(variances: Tensor, shared: Tensor, num_factors: int) -> Tensor:
    """Counts how often each code varied least in a group that shares each factor, ``(d, num_factors)``.

    Args:
        variances: of the codes in each group, ``(groups, d)``.
        shared: the factor of each group, ``(groups,)``.
        num_factors: k.
    """
    cells = variances.argmin(1) * num_factors + shared
    return torch.bincount(cells, minlength=variances.shape[1] * num_factors).view(-1, num_factors)


def accuracy_of_votes(train: Tensor, votes: Tensor) -> float:
    """The share of ``votes`` for the factor that had the most of each code's ``train`` votes, both ``(d, k)``."""
    majority = train.argmax(1, keepdim=True)
    return float(votes.gather(1, majority).sum() / votes.sum())
