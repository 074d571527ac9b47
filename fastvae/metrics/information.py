"""The parts of the KL between a VAE's posteriors and the prior, the mutual information of data and latent among them."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae.distributions.normal import DiagonalNormal, StandardNormal
from fastvae.distributions.prior import check_count
from fastvae.functional._checks import check_shape
from fastvae.functional.latent import LOGVAR_CLAMP
from fastvae.metrics._aggregate import aggregate_log_densities, draw_components
from fastvae.metrics._samples import SampledMetric
from fastvae.metrics.active_units import check_latents


class PosteriorTerms(NamedTuple):
    """Float64 scalars in nats: the mean KL of the posteriors to N(0, I), and its parts.

    ``kl = mutual_information + aggregate_kl`` and ``aggregate_kl = total_correlation + dimension_kl``, to rounding.
    """

    kl: Tensor
    mutual_information: Tensor
    aggregate_kl: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor


class PosteriorDecomposition(SampledMetric):
    r"""The parts of the KL of diagonal normal posteriors to N(0, I).

    .. math:: \mathbb{E}_x KL(q(z|x) \| p(z)) = I(x; z) + \underbrace{KL(q(z) \| \textstyle\prod_j q(z_j)) + \sum_j KL(q(z_j) \| p(z_j))}_
        {KL(q(z) \| p(z))}

    with the mutual information under q, the KL of the aggregate posterior q(z) (Hoffman and Johnson, *ELBO Surgery*, 2016), and its two
    parts, total correlation and dimension-wise KL (Chen et al., *Isolating Sources of Disentanglement in Variational Autoencoders*, 2018).

    q(z) is the mixture of the posteriors of the N kept samples. ``num_samples`` draws of it estimate the expectations of log density
    ratios; the mean KL, which is exact, is their control variate. The numbers are unbiased for these N samples, but for a share of order
    1 / num_samples from the fitted weight of the control variate, and may fall a little below 0.

    For the distribution that the samples come from they are biased: the mutual information is at most log N and on average too small, the
    aggregate KL too large by as much, the dimension-wise KL too large. The bias is small where log N exceeds the mutual information by
    several nats; where the mutual information comes near log N, it says that N is too small and little else.

    Args:
        max_samples: N at most, see :class:`~fastvae.metrics._samples.SampledMetric`.
        num_samples: draws of z, at least 2. ``compute()`` takes ``num_samples * N * d`` exponentials, most of them for the density of each
            dimension: about 10 s on one core for 1,000 draws, 10,000 samples and 64 dimensions.
        seed: of the draws.
        options: of ``torchmetrics.Metric``.
    """

    fields: ClassVar[dict[str, torch.dtype]] = {"mu": torch.float64, "logvar": torch.float64}

    def __init__(self, max_samples: int = 10_000, num_samples: int = 1000, seed: int = 0, **options: Any):
        super().__init__(max_samples, **options)
        if check_count("num_samples", num_samples) < 2:
            raise ValueError(f"num_samples: got {num_samples}, takes at least 2")
        self.num_samples, self.seed = num_samples, seed

    def update(self, mu: Tensor, logvar: Tensor) -> None:
        """Adds the posteriors of a batch.

        Args:
            mu, logvar: ``(batch, *latent_shape)``, floating; ``logvar`` is clamped to [-30, 20].

        Raises:
            TypeError: for integers.
            ValueError: for shapes that differ, among them and from earlier batches, or values that are not finite.
        """
        check_latents("mu", mu)
        check_latents("logvar", logvar)
        check_shape("logvar", logvar, mu.shape, "the shape of mu")
        self.add_samples(mu=mu.flatten(1), logvar=logvar.flatten(1).clamp(*LOGVAR_CLAMP))

    def compute(self) -> PosteriorTerms:
        posteriors = DiagonalNormal(**self.samples(min_samples=2))
        kl = FV.kl_normal(*posteriors)
        parts = _controlled(self._log_ratios(posteriors), kl)
        mutual_information, total_correlation, dimension_kl = parts.unbind()
        return PosteriorTerms(kl, mutual_information, total_correlation + dimension_kl, total_correlation, dimension_kl)

    def _log_ratios(self, posteriors: DiagonalNormal) -> Tensor:
        """The log density ratios whose means are mutual information, total correlation and dimension-wise KL, ``(3, num_samples)``."""
        # Drawn on the CPU, so that every device has the same.
        generator = torch.Generator().manual_seed(self.seed)
        mu, logvar = posteriors
        component = draw_components(len(mu), self.num_samples, generator).to(mu.device)
        eps = torch.randn(self.num_samples, mu.shape[1], generator=generator, dtype=torch.float64).to(mu.device)
        drawn_from = DiagonalNormal(mu[component], logvar[component])
        z = drawn_from.mu + (drawn_from.logvar / 2).exp() * eps
        log_joint, log_product = aggregate_log_densities(z, mu, logvar)
        log_p = StandardNormal(z[0]).log_prob(z)
        return torch.stack([drawn_from.log_prob(z) - log_joint, log_joint - log_product, log_product - log_p])


def _controlled(ratios: Tensor, total: Tensor) -> Tensor:
    """The means of ``ratios``, ``(parts, draws)``, corrected by their sum, whose expectation is known to be ``total``.

    The weights of least variance are the regression coefficients on the sum. They add to 1, so the parts add to ``total``.
    """
    sums = ratios.sum(0)
    deviations = sums - sums.mean()
    # The sum is constant where every posterior is the prior; there is nothing to correct then.
    weights = ratios @ deviations / deviations.square().sum().clamp(min=torch.finfo(sums.dtype).tiny)
    return ratios.mean(1) + weights * (total - sums.mean())
