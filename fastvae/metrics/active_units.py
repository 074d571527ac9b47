"""The number of latent dimensions that the data move."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.distributions.prior import check_count
from fastvae.functional._checks import check_nonnegative, check_shape

with extra("metrics"):
    from torchmetrics import Metric


class ActiveUnitsResult(NamedTuple):
    """The number of active dimensions, int64, and the variance of each dimension's posterior mean, float64 ``(latent_dim,)``."""

    num_active: Tensor
    variances: Tensor


class ActiveUnits(Metric):
    r"""The latent dimensions that the data move (Burda et al., *Importance Weighted Autoencoders*, 2016).

    Dimension j is active where :math:`\mathrm{Var}_x\, \mathbb{E}[z_j | x]` exceeds the threshold. The variance divides by the number of
    samples. Its moments are kept in float64 and merged as by Chan et al. (*Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances*, 1979), so a mean that is large next to the standard deviation costs no digits.

    Args:
        latent_dim: elements of one z.
        threshold: the paper's 0.01 by default.
        options: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    moments: Tensor

    def __init__(self, latent_dim: int, threshold: float = 0.01, **options: Any):
        super().__init__(**options)
        self.latent_dim, self.threshold = check_count("latent_dim", latent_dim), check_nonnegative("threshold", threshold)
        self.add_state("moments", torch.zeros(3, latent_dim, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def update(self, mu: Tensor) -> None:
        """Adds a batch.

        Args:
            mu: the posterior means, ``(batch, *latent_shape)``, floating.

        Raises:
            TypeError: for integers.
            ValueError: for another number of latent dimensions, or values that are not finite.
        """
        check_latents("mu", mu)
        rows = mu.detach().double().flatten(1)
        check_shape("mu", rows, (len(mu), self.latent_dim), "latent_dim elements for each sample")
        if len(rows) > 0:
            squares, means = torch.var_mean(rows, 0, correction=0)
            batch = torch.stack([torch.full_like(means, len(rows)), means, len(rows) * squares])
            self.moments = merge_moments(torch.stack([self.moments, batch]))

    def compute(self) -> ActiveUnitsResult:
        count, _, squares = self.moments
        if count[0] < 2:
            raise ValueError(f"mu: got {int(count[0])} samples, active units take at least 2")
        variances = squares / count
        return ActiveUnitsResult((variances > self.threshold).sum(), variances)


def merge_moments(parts: Tensor) -> Tensor:
    """The moments of all samples from those of their parts: count, mean and sum of squared deviations, ``(parts, 3, d)`` to ``(3, d)``."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    # Without samples the count is 0, and so are the sums.
    mean = (counts * means).sum(0) / count.clamp(min=1)
    return torch.stack([count, mean, (squares + counts * (means - mean).square()).sum(0)])


def check_latents(name: str, latents: Tensor) -> None:
    if not latents.is_floating_point():
        raise TypeError(f"{name}: got {latents.dtype}, takes a floating dtype")
    if latents.ndim < 2 or math.prod(latents.shape[1:]) == 0:
        raise ValueError(f"{name}: got shape {tuple(latents.shape)}, takes (batch, *latent_shape) with at least one element")
    if not latents.isfinite().all():
        raise ValueError(f"{name}: got values that are not finite")
