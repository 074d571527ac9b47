"""Modularity and explicitness (Ridgeway and Mozer, *Learning Deep Disentangled Embeddings With the F-Statistic Loss*, 2018)."""

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.distributions.prior import check_count
from fastvae.metrics._mutual_information import histogram_information
from fastvae.metrics._representation import Representation, RepresentationMetric, check_varied, each_factor, split

with extra("metrics"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler


class Modularity(RepresentationMetric):
    r"""How far each code knows of one factor alone, averaged over the codes.

    .. math:: 1 - \frac{\sum_{j \ne j^*} I(z_i; v_j)^2}{(k - 1) \, I(z_i; v_{j^*})^2} \quad \text{with} \quad j^* = \arg\max_j I(z_i; v_j)

    A code that knows of no factor counts as 0, as in Locatello et al., 2019. The mutual information is that of a histogram, see
    :class:`~fastvae.metrics.mig.MutualInformationGap`, whose bias gives a code of noise a value that means nothing.

    ``compute()`` returns ``{"modularity": ...}``.

    Args:
        num_bins: bins of the histogram for each code.
        max_samples: samples that are kept, see :class:`~fastvae.metrics._samples.SampledMetric`.
        kwargs: of ``torchmetrics.Metric``.
    """

    min_factors: ClassVar[int] = 2

    def __init__(self, *, num_bins: int = 20, max_samples: int = 10_000, **kwargs: Any):
        super().__init__(max_samples, **kwargs)
        self.num_bins = check_count("num_bins", num_bins)

    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        return {"modularity": modularity(histogram_information(data.codes, data.factors, self.num_bins))}


def modularity(information: Tensor) -> Tensor:
    """The formula of :class:`Modularity` for I(code; factor), ``(d, k)``."""
    largest = information.amax(1, keepdim=True)
    # The largest ratio is 1, and is no deviation.
    deviation = ((information / largest).square().sum(1) - 1) / (information.shape[1] - 1)
    return torch.where(largest[:, 0] > 0, 1 - deviation, 0.0).mean()


class Explicitness(RepresentationMetric):
    """How well a linear classifier of all codes tells a value of a factor from the others: the area under its ROC curve.

    The areas are averaged over the values of a factor and over the factors; 0.5 is chance. The classifier is scikit-learn's logistic
    regression on standardised codes.

    ``compute()`` returns ``{"explicitness": ...}``.

    Args:
        num_train: samples that the classifiers see, 10,000 in Locatello et al., 2019.
        num_test: other samples, for the areas. With fewer samples than both together, both are smaller in proportion.
        seed: of the split.
        kwargs: of ``torchmetrics.Metric``.
    """

    def __init__(self, num_train: int = 10_000, num_test: int = 5_000, *, seed: int = 0, **kwargs: Any):
        super().__init__(check_count("num_train", num_train) + check_count("num_test", num_test), **kwargs)
        self.num_train, self.num_test, self.seed = num_train, num_test, seed

    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        train, test = split(data, self.num_train, self.num_test, self.seed)
        check_varied(test.factors, "the test samples")
        return {"explicitness": float(np.mean([_mean_area(*parts) for parts in each_factor(train, test)]))}


def _mean_area(train: tuple, test: tuple) -> float:
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(*train)
    codes, values = test
    scores = classifier.predict_proba(codes)
    # A value without a test sample has no curve.
    present = [(index, value) for index, value in enumerate(classifier.classes_) if (values == value).any()]
    if not present:
        raise ValueError("factors: no value of a factor is in both the training and the test samples")
    return float(np.mean([roc_auc_score(values == value, scores[:, index]) for index, value in present]))
