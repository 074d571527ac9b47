"""Anomaly detection: scores of samples, a threshold from validation data, and how well the scores tell anomalies from the rest."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae._extras import extra
from fastvae._types import check_choice
from fastvae.distributions.divergence import sample_with_kl
from fastvae.models import VAE

with extra("metrics"):
    from sklearn.metrics import average_precision_score, roc_auc_score
    from torchmetrics import Metric

AnomalyScore = Literal["reconstruction_error", "negative_elbo", "reconstruction_probability"]


@torch.no_grad()
def anomaly_scores(
    model: Any, x: Tensor, score: AnomalyScore = "reconstruction_error", *, num_samples: int = 10, generator: torch.Generator | None = None
) -> Tensor:
    r"""A score for each sample of a batch, float ``(batch,)``; the higher, the less the model knows of the like.

    ``"reconstruction_error"`` is :math:`\|x - \hat x\|^2` at the mean of z, of any autoencoder. The others are for a VAE, in nats, averaged
    over draws of the posterior: ``"negative_elbo"``, and ``"reconstruction_probability"``, :math:`-\mathbb{E}_q \log p(x | z)` (An and Cho,
    *Variational Autoencoder based Anomaly Detection using Reconstruction Probability*, 2015), which leaves out the KL.

    Args:
        model: an autoencoder, in evaluation mode for networks with dropout or batch normalisation; of a conditional one ``model.given(y)``.
        x: data, ``(batch, ...)``; floating, or uint8, which means value / 255.
        score: which one.
        num_samples: draws of z.
        generator: of the draws.

    Raises:
        ValueError: for a score that does not exist.
        TypeError: for a score that the model does not have.
    """
    check_choice("score", score, get_args(AnomalyScore))
    if score == "reconstruction_error":
        return FV.mse_loss(model.reconstruct(x), x, reduction="sample")
    if score == "negative_elbo":
        if not hasattr(model, "log_prob_bound") or not hasattr(model, "anomaly_score"):
            raise TypeError(f"model: got {type(model).__name__} for 'negative_elbo', takes a VAE")
        return model.anomaly_score(x, num_samples, generator)
    if not isinstance(model, VAE):
        raise TypeError(f"model: got {type(model).__name__} for 'reconstruction_probability', takes a VAE")
    q = model.encode(x)
    z, _ = sample_with_kl(q, model.prior_distribution(q), num_samples=num_samples, reduction="sample", generator=generator)
    return model.recon_loss(model.decode_samples(z, num_samples), x, num_samples, "sample").mean(0)


def threshold_of(scores: Tensor, quantile: float = 0.95) -> float:
    """The score that a share ``quantile`` of validation data passes, which hold no anomalies.

    Raises:
        ValueError: for no scores, one that is not finite, or a quantile out of (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile: got {quantile!r}, takes a number in (0, 1]")
    _check_scores(scores)
    if scores.numel() == 0:
        raise ValueError("scores: got none, takes at least one")
    return torch.quantile(scores.double(), quantile).item()


class AnomalyResult(NamedTuple):
    """Float64 scalars: the areas under the ROC curve and under the precision-recall curve (average precision), the share of anomalies,
    which is the area that chance gives the second; and at the threshold the shares of anomalies and of other samples that lie above it."""

    auc_roc: Tensor
    auc_pr: Tensor
    share: Tensor
    found: Tensor
    false_alarms: Tensor


class AnomalyDetection(Metric):
    """How well scores tell anomalies from the rest; see :class:`AnomalyResult`. It keeps every score, 9 bytes a sample.

    Args:
        threshold: that of :func:`threshold_of`; by default infinity, above which nothing lies.
        options: of ``torchmetrics.Metric``.
    """

    scores: list[Tensor]
    anomalies: list[Tensor]

    def __init__(self, threshold: float = torch.inf, **options: Any):
        super().__init__(**options)
        self.threshold = float(threshold)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("anomalies", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, anomalies: Tensor) -> None:
        """Adds a batch.

        Args:
            scores: ``(batch,)``, finite.
            anomalies: bool, ``(batch,)``.
        """
        _check_scores(scores)
        if anomalies.dtype != torch.bool or anomalies.shape != scores.shape:
            raise ValueError(f"anomalies: got {anomalies.dtype} of shape {tuple(anomalies.shape)}, takes bool of {tuple(scores.shape)}")
        self.scores.append(scores.detach().double())
        self.anomalies.append(anomalies)

    def compute(self) -> AnomalyResult:
        scores, anomalies = (torch.cat([*state]) if isinstance(state, list) else state for state in (self.scores, self.anomalies))
        count = int(anomalies.sum())
        if not 0 < count < len(anomalies):
            raise ValueError(f"anomalies: got {count} among {len(anomalies)} samples, takes some, and some others")
        above = scores > self.threshold
        areas = (area(anomalies.cpu(), scores.cpu()) for area in (roc_auc_score, average_precision_score))
        shares = (anomalies, above[anomalies], above[~anomalies])
        return AnomalyResult(*(torch.tensor(float(area), dtype=torch.float64) for area in areas), *(s.double().mean() for s in shares))


def _check_scores(scores: Tensor) -> None:
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(f"scores: got {scores.dtype} of shape {tuple(scores.shape)}, takes floating numbers (batch,)")
    if not scores.isfinite().all():
        raise ValueError(f"scores: got {int((~scores.isfinite()).sum())} that are not finite, takes finite ones")


Score = Callable[[Tensor], Tensor]


def leave_one_class_out(
    fit: Callable[[Tensor], Mapping[str, Score]],
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    classes: Sequence[int] | None = None,
    validation: int = 400,
    quantile: float = 0.95,
) -> dict[int, dict[str, AnomalyResult]]:
    """Each class in turn as the anomaly: models learn the others, and their scores look for that class in the test data.

    Args:
        fit: trains on data without the class and gives functions from data to scores, by name.
        train, test: data and int64 labels.
        classes: those that are left out; by default all of the training data.
        validation: samples of the training data, their first ones, from which thresholds come and not the models.
        quantile: see :func:`threshold_of`.
    """
    x, labels = train
    results = {}
    for left_out in labels.unique().tolist() if classes is None else classes:
        normal = x[labels != left_out]
        if not 0 < validation < len(normal):
            raise ValueError(f"validation: got {validation}, takes fewer than the {len(normal)} samples of the other classes, and some")
        scores = fit(normal[validation:])
        results[left_out] = {
            name: _judged(score, threshold_of(score(normal[:validation]), quantile), test, left_out) for name, score in scores.items()
        }
    return results


def _judged(score: Score, threshold: float, test: tuple[Tensor, Tensor], left_out: int) -> AnomalyResult:
    x, labels = test
    metric = AnomalyDetection(threshold)
    metric.update(score(x), labels == left_out)
    return metric.compute()
