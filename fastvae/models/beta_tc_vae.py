"""The beta-TC-VAE (Chen et al., *Isolating Sources of Disentanglement in Variational Autoencoders*, 2018)."""

import math
from collections.abc import Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import AggregateEstimator, check_choice
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.normal import DiagonalNormal, normal_log_prob
from fastvae.distributions.prior import Prior, check_count
from fastvae.functional._checks import check_nonnegative
from fastvae.models.vae import VAE, VAETerms


@exportable
class BetaTCOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them.

    ``mutual_information``, ``total_correlation`` and ``dimension_kl`` are without their weights; their sum is an estimate of ``kl``.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    mutual_information: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


class BetaTCVAE(VAE):
    r"""A VAE whose KL is split in three, each with a weight of its own.

    .. math:: KL(q(z|x) \| p(z)) = \underbrace{I(x; z)}_{\alpha} + \underbrace{KL(q(z) \| \prod_j q(z_j))}_{\beta} +
        \underbrace{\sum_j KL(q(z_j) \| p(z_j))}_{\gamma}

    in expectation over the data, where q(z) is the mean of the posteriors of all N samples of the data, estimated from a batch.

    Args:
        encoder, decoder, latent_shape, prior, likelihood: see :class:`~fastvae.models.VAE`. The posterior is diagonal, z a vector. With a
            prior whose dimensions depend on each other the third term is :math:`KL(\prod_j q(z_j) \| p(z))`.
        dataset_size: N.
        alpha, beta, gamma: weights of the mutual information, the total correlation and the KL of the dimensions.
        estimator: of q(z): ``"weighted"`` (minibatch-weighted sampling) or ``"stratified"`` (minibatch-stratified sampling, unbiased for
            q(z)).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        dataset_size: int,
        alpha: float = 1.0,
        beta: float = 6.0,
        gamma: float = 1.0,
        estimator: AggregateEstimator = "stratified",
        prior: Prior | None = None,
        likelihood: LikelihoodName | Likelihood = "bernoulli_logits",
    ):
        super().__init__(encoder, decoder, latent_shape, prior=prior, likelihood=likelihood)
        self.dataset_size = check_count("dataset_size", dataset_size)
        self.alpha, self.beta, self.gamma = (
            check_nonnegative(name, value) for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma))
        )
        self.estimator = check_choice("estimator", estimator, get_args(AggregateEstimator))

    def extra_repr(self) -> str:
        weights = f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}"
        return f"{super().extra_repr()}, dataset_size={self.dataset_size}, {weights}, estimator={self.estimator!r}"

    def objective(self, terms: VAETerms) -> BetaTCOutput:
        _, q, p, z, kl, recon, recon_loss, _ = terms
        if z.ndim != 2:
            raise ValueError(f"encoder: gave a posterior of shape {tuple(z.shape[1:])}, the total correlation takes one of vectors")
        log_joint, log_product = self._aggregate(q, z)
        log_q, log_p = q.log_prob(z), p.log_prob(z)
        mutual_information = (log_q - log_joint).mean()
        total_correlation = (log_joint - log_product).mean()
        dimension_kl = (log_product - log_p).mean()
        loss = recon_loss + self.alpha * mutual_information + self.beta * total_correlation + self.gamma * dimension_kl
        parts = mutual_information, total_correlation, dimension_kl
        return BetaTCOutput(loss, recon_loss, kl, *parts, recon, z, q.mu, q.logvar)

    def _aggregate(self, q: DiagonalNormal, z: Tensor) -> tuple[Tensor, Tensor]:
        """log q(z) and the sum over dimensions of log q(z_j) at each z of the batch, ``(batch,)``."""
        # (z's sample, posterior's sample, dimension)
        densities = normal_log_prob(z.unsqueeze(1), q.mu.unsqueeze(0), q.logvar.unsqueeze(0))
        weights = log_importance_weights(len(z), self.dataset_size, self.estimator, densities)
        joint = torch.logsumexp(weights + densities.sum(-1), 1)
        return joint, torch.logsumexp(weights.unsqueeze(-1) + densities, 1).sum(-1)


def log_importance_weights(batch: int, dataset_size: int, estimator: AggregateEstimator, like: Tensor) -> Tensor:
    """The log of the weight of each posterior of the batch in the estimate of q(z) at each z of the batch, ``(batch, batch)``.

    ``"weighted"``: 1 / (batch * N) each, whose sum is not 1. ``"stratified"``: 1 / N for z's own posterior, 1 / M for M - 1 of the M
    others, and (N - M) / (N M) for the last of them, the next in the batch.
    """
    if estimator == "weighted":
        return like.new_full((batch, batch), -math.log(batch * dataset_size))
    if batch > dataset_size:
        raise ValueError(f"dataset_size: got {dataset_size} for a batch of {batch}, takes the number of samples of the training data")
    others = max(batch - 1, 1)
    row = torch.arange(batch, device=like.device)
    weights = like.new_full((batch, batch), 1 / others)
    weights[row, (row + 1) % batch] = (dataset_size - others) / (dataset_size * others)
    weights[row, row] = 1 / dataset_size if batch > 1 else 1.0
    return weights.log()
