"""Small models of the whole VAE family, for 8 x 8 images with a latent of 4."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvae.distributions import (
    CholeskyPosterior,
    DiagonalPrior,
    FlowPosterior,
    FlowPrior,
    MixturePrior,
    VampPrior,
)
from fastvae.models import DIPVAE, IWAE, VAE, WAE, BetaTCVAE, FactorVAE, InfoVAE

SHAPE, DIM = (1, 8, 8), 4


def _maker(cls: type[nn.Module], **fixed) -> Callable[..., nn.Module]:
    def make(**options) -> nn.Module:
        torch.manual_seed(0)
        return cls.mlp(SHAPE, (32,), DIM, **{**{name: part() if callable(part) else part for name, part in fixed.items()}, **options})

    return make


def _flow_posterior(kind: str) -> Callable[[], FlowPosterior]:
    return lambda: FlowPosterior(DIM, kind, transforms=2, context=2 if kind == "planar" else 0)


FAMILY = {
    "VAE": _maker(VAE),
    "diagonal prior": _maker(VAE, prior=lambda: DiagonalPrior(DIM)),
    "mixture prior": _maker(VAE, prior=lambda: MixturePrior(DIM, components=3)),
    "VampPrior": _maker(VAE, prior=lambda: VampPrior(DIM, SHAPE, components=3)),
    "flow prior": _maker(VAE, prior=lambda: FlowPrior(DIM, transforms=2, hidden=(16,))),
    "full covariance": _maker(VAE, posterior=CholeskyPosterior),
    "inverse autoregressive posterior": _maker(VAE, posterior=_flow_posterior("inverse_autoregressive")),
    "planar posterior": _maker(VAE, posterior=_flow_posterior("planar")),
    "IWAE": _maker(IWAE, num_samples=3),
    "IWAE, doubly reparameterized": _maker(IWAE, num_samples=3, gradient="doubly_reparameterized"),
    "IWAE, flows": _maker(IWAE, num_samples=3, posterior=_flow_posterior("inverse_autoregressive"), prior=lambda: FlowPrior(DIM)),
    "beta-TC": _maker(BetaTCVAE, dataset_size=64, beta=2.0),
    "beta-TC, weighted": _maker(BetaTCVAE, dataset_size=64, beta=2.0, estimator="weighted"),
    "DIP-VAE I": _maker(DIPVAE, kind="i"),
    "DIP-VAE II": _maker(DIPVAE, kind="ii"),
    "FactorVAE": _maker(FactorVAE, gamma=2.0, discriminator_units=16, discriminator_layers=2),
    "InfoVAE": _maker(InfoVAE, weight=2.0),
    "InfoVAE, mixture prior": _maker(InfoVAE, weight=2.0, alpha=0.5, kernel="rbf", prior=lambda: MixturePrior(DIM, components=3)),
    "WAE": _maker(WAE, weight=10.0),
    "WAE, mixture prior": _maker(WAE, weight=10.0, prior=lambda: MixturePrior(DIM, components=3)),
}


def digits(count: int = 64) -> Tensor:
    """Of scikit-learn, in [0, 1]."""
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[:count]).float().view(-1, *SHAPE) / 16
