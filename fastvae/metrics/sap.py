"""The separated attribute predictability (Kumar et al., *Variational Inference of Disentangled Latent Concepts ...*, 2018)."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.distributions.prior import check_count
from fastvae.metrics._representation import Representation, RepresentationMetric, each_factor, split

with extra("metrics"):
    from sklearn.svm import LinearSVC

# Of Locatello et al., 2019.
REGULARIZATION = 0.01


class SAPScore(RepresentationMetric):
    """SAP: how much better the best single code predicts a factor than the second best, averaged over the factors.

    A discrete factor is predicted by a linear support vector machine (C = 0.01, balanced classes), and the accuracy on test samples
    counts, as in Locatello et al., 2019. One code's linear classifier tells few of many ordered values apart, so the score is far below
    1 even for perfect codes: at most 1 - 1/m for m values that are equally frequent. A continuous factor, whose integers are ordered, is
    predicted by linear regression, and the R^2 on all samples counts.

    ``compute()`` returns ``{"sap": ...}``.

    Args:
        continuous: whether the factors are continuous.
        num_train: samples that the classifiers see, 10,000 in Locatello et al.
        num_test: other samples, for the accuracy. With fewer samples than both together, both are smaller in proportion.
        seed: of the split.
        kwargs: of ``torchmetrics.Metric``.
    """

    min_codes: ClassVar[int] = 2

    def __init__(self, num_train: int = 10_000, num_test: int = 5_000, *, continuous: bool = False, seed: int = 0, **kwargs: Any):
        super().__init__(check_count("num_train", num_train) + check_count("num_test", num_test), **kwargs)
        self.num_train, self.num_test, self.continuous, self.seed = num_train, num_test, continuous, seed

    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        if self.continuous:
            return {"sap": predictability_gap(squared_correlation(data.codes, data.factors.double()))}
        parts = each_factor(*split(data, self.num_train, self.num_test, self.seed))
        return {"sap": predictability_gap(torch.from_numpy(np.stack([accuracies(*part) for part in parts], 1)))}


def predictability_gap(scores: Tensor) -> Tensor:
    """The gap of the two largest in each column of ``(d, k)``, averaged over the columns."""
    largest = scores.topk(2, 0).values
    return (largest[0] - largest[1]).mean()


def squared_correlation(codes: Tensor, factors: Tensor) -> Tensor:
    """R^2 of each factor's linear regression on each code, ``(d, k)``; 0 for a constant code."""
    codes, factors = codes - codes.mean(0), factors - factors.mean(0)
    norms = torch.outer(codes.norm(dim=0), factors.norm(dim=0))
    return torch.where(norms > 0, codes.T @ factors / norms, 0.0).square()


def accuracies(train: tuple, test: tuple) -> np.ndarray:
    """The test accuracy of each code's classifier, ``(d,)``."""
    (codes, values), (test_codes, test_values) = train, test
    scores = []
    for column in range(codes.shape[1]):
        classifier = LinearSVC(C=REGULARIZATION, class_weight="balanced").fit(codes[:, [column]], values)
        scores.append(np.mean(classifier.predict(test_codes[:, [column]]) == test_values))
    return np.array(scores)
