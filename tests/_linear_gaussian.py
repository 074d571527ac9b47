"""A linear VAE of Gaussian data, whose log p(x), posterior and optimum are known (Tipping and Bishop, *Probabilistic Principal Component
Analysis*, 1999)."""

import math

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from fastvae.distributions import CholeskyPosterior, Posterior
from fastvae.models import VAE

DATA, DIM = 5, 2


class LinearEncoder(nn.Module):
    """A mean that is linear in x, and the same spread for every x."""

    def __init__(self, spread: int):
        super().__init__()
        self.mean = nn.Linear(DATA, DIM)
        self.spread = nn.Parameter(torch.zeros(spread))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mean(x), self.spread.expand(len(x), -1)], 1)


def make_model(posterior: Posterior | None = None, **options) -> VAE:
    """x = W z + b + noise of variance 1, in float64."""
    torch.manual_seed(0)
    spread = DIM if posterior is None else posterior.parameters_for(DIM) - DIM
    model = VAE(LinearEncoder(spread), nn.Linear(DIM, DATA), DIM, posterior=posterior, likelihood="gaussian", **options).double()
    with torch.no_grad():
        model.decoder.weight.mul_(3)
    return model


def log_prob(model: VAE, x: Tensor) -> Tensor:
    """log p(x) = log N(x; b, W W^T + I)."""
    weight = model.decoder.weight.detach()
    return MultivariateNormal(model.decoder.bias.detach(), weight @ weight.mT + torch.eye(DATA, dtype=weight.dtype)).log_prob(x)


def with_exact_posterior(model: VAE) -> VAE:
    """p(z | x) = N(P W^T (x - b), P) with P = (W^T W + I)^-1, of a model with full covariance."""
    assert isinstance(model.posterior, CholeskyPosterior)
    weight, bias = model.decoder.weight.detach(), model.decoder.bias.detach()
    covariance = torch.linalg.inv(weight.mT @ weight + torch.eye(DIM, dtype=weight.dtype))
    factor = torch.linalg.cholesky(covariance)
    rows, columns = torch.tril_indices(DIM, DIM)
    # The inverse of the softplus that makes 1 of 0.
    diagonal = torch.diag(torch.expm1(factor.diagonal()).log() - math.log(math.expm1(1.0)))
    with torch.no_grad():
        model.encoder.mean.weight.copy_(covariance @ weight.mT)
        model.encoder.mean.bias.copy_(-covariance @ weight.mT @ bias)
        model.encoder.spread.copy_((factor.tril(-1) + diagonal)[rows, columns])
    return model


def best_mean_log_prob(x: Tensor) -> float:
    """The mean log p(x) of the best model: its components are the leading eigenvectors, with the eigenvalues less 1."""
    values = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)
    kept, lost = values[:DIM], values[DIM:]
    assert kept.min() > 1
    return -0.5 * (DATA * math.log(2 * math.pi) + (kept.log() + 1).sum() + lost.sum()).item()
