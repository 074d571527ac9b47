"""How far generated images are from real ones: the Frechet and the kernel inception distance, of any features.

The name of the features is in the result, ``{"FID[inception-v3]": ...}``: numbers of different features do not compare.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastvae._extras import extra
from fastvae.metrics._samples import SampledMetric
from fastvae.metrics.features import FeatureName, feature_network

with extra("metrics"):
    from torchmetrics.image.fid import FrechetInceptionDistance

# Rows of a Gram matrix that are computed at a time.
GRAM_ROWS = 1000


class FID(FrechetInceptionDistance):
    r"""The Frechet inception distance (Heusel et al., *GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium*,
    2017) of features of real and of generated images:

    .. math:: \|\mu_r - \mu_g\|^2 + \mathrm{tr}\left(\Sigma_r + \Sigma_g - 2 (\Sigma_r \Sigma_g)^{1/2}\right)

    ``update(images, real)`` and the float64 sums are torchmetrics'. The trace of the root is the sum of the singular values of
    :math:`\Sigma_r^{1/2} \Sigma_g^{1/2}`, whose rounding error does not grow where there are fewer images than features; the eigenvalues of
    :math:`\Sigma_r \Sigma_g` lose half of the digits there. The estimate is too large by a term of order 1 / images, so only figures from
    equally many images compare.

    Args:
        network: the features, see :func:`~fastvae.metrics.features.feature_network`.
        image_range: the range of floating images.
        options: ``reset_real_features`` and those of ``torchmetrics.Metric``.
    """

    def __init__(self, network: FeatureName | nn.Module, image_range: tuple[float, float] = (0.0, 1.0), **options: Any):
        features = feature_network(network, image_range=image_range)
        super().__init__(feature=features, normalize=True, **options)
        self.name = features.name

    # A number without the name of its features says little.
    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """``{"FID[name]": float64 scalar}``.

        Raises:
            ValueError: for fewer than two real or generated images, which have no covariance.
        """
        mean, covariance = self._moments("real")
        generated_mean, generated_covariance = self._moments("fake")
        roots = torch.linalg.svdvals(_root(covariance) @ _root(generated_covariance)).sum()
        distance = (mean - generated_mean).square().sum() + covariance.trace() + generated_covariance.trace() - 2 * roots
        # Rounding leaves it a little below 0 for equal sets.
        return {f"FID[{self.name}]": distance.clamp(min=0)}

    def _moments(self, which: str) -> tuple[Tensor, Tensor]:
        total, squares, count = (getattr(self, f"{which}_features_{part}") for part in ("sum", "cov_sum", "num_samples"))
        if count < 2:
            raise ValueError(f"images: got {int(count)} {'real' if which == 'real' else 'generated'} ones, FID takes at least 2")
        mean = total / count
        return mean, (squares - count * torch.outer(mean, mean)) / (count - 1)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


class KID(SampledMetric):
    r"""The kernel inception distance (Bińkowski et al., *Demystifying MMD GANs*, 2018): the unbiased estimate of the squared maximum mean
    discrepancy of F features of real and of generated images with the kernel :math:`k(a, b) = (a \cdot b / F + 1)^3`.

    .. math:: \frac{\sum_{i \ne j} k(r_i, r_j)}{m (m - 1)} + \frac{\sum_{i \ne j} k(g_i, g_j)}{n (n - 1)} - \frac{2}{m n} \sum_{ij}
        k(r_i, g_j)

    It may be negative. All kept images enter at once. The paper takes the mean over random subsets of 1,000, which has the same expectation
    and a larger variance, and depends on the subsets.

    Args:
        network: the features, see :func:`~fastvae.metrics.features.feature_network`.
        image_range: the range of floating images.
        max_samples: images whose features are kept, real and generated ones together, see
            :class:`~fastvae.metrics._samples.SampledMetric`.
        options: of ``torchmetrics.Metric``.
    """

    fields: ClassVar[dict[str, torch.dtype]] = {"features": torch.float64, "real": torch.int64}

    def __init__(
        self, network: FeatureName | nn.Module, image_range: tuple[float, float] = (0.0, 1.0), max_samples: int = 10_000, **options: Any
    ):
        super().__init__(max_samples, **options)
        self.network = feature_network(network, image_range=image_range)

    def update(self, images: Tensor, real: bool) -> None:
        """Adds a batch.

        Args:
            images: see :class:`~fastvae.metrics.features.FeatureNetwork`.
            real: whether they are real or generated.
        """
        features = self.network(images)
        self.add_samples(features=features, real=torch.full((len(features), 1), int(real), device=features.device))

    def compute(self) -> dict[str, Tensor]:
        """``{"KID[name]": float64 scalar}``.

        Raises:
            ValueError: for fewer than two real or generated images.
        """
        samples = self.samples()
        is_real = samples["real"][:, 0] == 1
        real, generated = samples["features"][is_real], samples["features"][~is_real]
        for which, features in (("real", real), ("generated", generated)):
            if len(features) < 2:
                raise ValueError(f"images: got {len(features)} {which} ones, KID takes at least 2")
        across = _kernel_sum(real, generated) / (len(real) * len(generated))
        return {f"KID[{self.network.name}]": _mean_of_pairs(real) + _mean_of_pairs(generated) - 2 * across}


def _kernel(products: Tensor, num_features: int) -> Tensor:
    return (products / num_features + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum of the kernel over all pairs of rows."""
    return torch.stack([_kernel(rows @ y.T, x.shape[1]).sum() for rows in x.split(GRAM_ROWS)]).sum()


def _mean_of_pairs(x: Tensor) -> Tensor:
    """The mean of the kernel over pairs of two different rows."""
    with_themselves = _kernel(x.square().sum(1), x.shape[1]).sum()
    return (_kernel_sum(x, x) - with_themselves) / (len(x) * (len(x) - 1))
