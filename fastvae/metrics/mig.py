"""The mutual information gap (Chen et al., *Isolating Sources of Disentanglement in Variational Autoencoders*, 2018)."""

from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae._types import check_choice
from fastvae.distributions.prior import check_count
from fastvae.metrics._mutual_information import entropy, histogram_information
from fastvae.metrics._representation import Representation, RepresentationMetric

with extra("metrics"):
    from sklearn.feature_selection import mutual_info_classif

InformationEstimator = Literal["histogram", "neighbors"]


class MutualInformationGap(RepresentationMetric):
    r"""MIG: the gap between the two codes that know most about a factor, over its entropy, averaged over the factors.

    .. math:: \frac{1}{k} \sum_j \frac{I(z_{(1)}; v_j) - I(z_{(2)}; v_j)}{H(v_j)}

    It is 1 where each factor is in one code alone and no other code knows of it, and about 0 where two codes know as much.

    Both estimators of I(z; v) need codes alone:

    * ``"histogram"`` puts each code in bins of equal width between its minimum and its maximum, as Locatello et al., *Challenging Common
      Assumptions in the Unsupervised Learning of Disentangled Representations*, 2019, do. It is too large by about
      (bins - 1) (values - 1) / (2 n) nats and depends on outliers. With more values than bins it stays below H(v): 40 values in 20 bins
      have a gap of at most 0.81.
    * ``"neighbors"`` is scikit-learn's, of Ross, *Mutual Information between Discrete and Continuous Data Sets*, 2014.

    Chen et al. draw z of the posteriors q(z|x) and estimate the density of the aggregate posterior instead, so that noise in z lowers
    I(z; v). Figures of different estimators do not compare.

    ``compute()`` returns ``{"mig_histogram": ...}`` or ``{"mig_neighbors": ...}``.

    Args:
        estimator: ``"histogram"`` or ``"neighbors"``.
        num_bins: bins of the histogram for each code.
        max_samples: samples that are kept, see :class:`~fastvae.metrics._samples.SampledMetric`; 10,000 in Locatello et al.
        kwargs: of ``torchmetrics.Metric``.
    """

    min_codes: ClassVar[int] = 2

    def __init__(self, estimator: InformationEstimator = "histogram", *, num_bins: int = 20, max_samples: int = 10_000, **kwargs: Any):
        super().__init__(max_samples, **kwargs)
        check_choice("estimator", estimator, get_args(InformationEstimator))
        self.estimator, self.num_bins = estimator, check_count("num_bins", num_bins)

    def extra_repr(self) -> str:
        return f"estimator={self.estimator!r}" + (f", num_bins={self.num_bins}" if self.estimator == "histogram" else "")

    def _scores(self, data: Representation) -> dict[str, Tensor | float]:
        if self.estimator == "histogram":
            information = histogram_information(data.codes, data.factors, self.num_bins)
        else:
            information = neighbor_information(data.codes, data.factors)
        return {f"mig_{self.estimator}": information_gap(information, data.factors)}


def neighbor_information(codes: Tensor, factors: Tensor) -> Tensor:
    """I(code; factor) in nats, ``(d, k)``, by nearest neighbours; the seed is of the noise that breaks ties."""
    columns = [mutual_info_classif(codes.cpu().numpy(), values, random_state=0) for values in factors.T.cpu().numpy()]
    return torch.from_numpy(np.stack(columns, 1)).to(codes.device)


def information_gap(information: Tensor, factors: Tensor) -> Tensor:
    """The gap of the two largest in each column of ``(d, k)``, over the entropy of the factor, averaged over the factors."""
    largest = information.topk(2, 0).values
    entropies = torch.stack([entropy(values.bincount()) for values in factors.unbind(1)])
    return ((largest[0] - largest[1]) / entropies).mean()
