"""Posteriors q(z | x): modules that make a distribution from what an encoder gives."""

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae.distributions._options import Stored
from fastvae.distributions.normal import CholeskyNormal, DiagonalNormal

# softplus of it is 1.
ONE_BEFORE_SOFTPLUS = math.log(math.expm1(1.0))


class Posterior(Stored, nn.Module):
    """The base of all posteriors. A call gives a distribution with ``mean``, ``logvar``, ``log_prob(z)``, ``rsample(num_samples, ...)`` and
    ``rsample_and_log_prob(num_samples, ...)``."""

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def parameters_for(self, latent_dim: int) -> int:
        """The size of dimension 1 of the encoder's output for a latent of size ``latent_dim``."""


class DiagonalPosterior(Posterior):
    """N(mu, diag(exp(logvar))): the encoder gives ``(mu, logvar)``, or one tensor that is split into the two on dimension 1."""

    def parameters_for(self, latent_dim: int) -> int:
        return 2 * latent_dim

    def forward(self, encoded: Tensor | tuple[Tensor, Tensor]) -> DiagonalNormal:
        if not isinstance(encoded, Tensor):
            mu, logvar = encoded
            return DiagonalNormal(mu, logvar)
        if encoded.ndim < 2 or encoded.shape[1] % 2:
            raise ValueError(f"encoder: gave shape {tuple(encoded.shape)}, has to give (mu, logvar) or an even size in dimension 1")
        mu, logvar = encoded.chunk(2, dim=1)
        return DiagonalNormal(mu, logvar)


class CholeskyPosterior(Posterior):
    r"""N(mu, L L^T) of vectors, L lower triangular: the encoder gives the d means, then the d (d + 1) / 2 entries of L row by row.

    The diagonal goes through a softplus that makes 1 of 0, so an encoder that gives zeros gives N(0, I).
    """

    def parameters_for(self, latent_dim: int) -> int:
        return latent_dim + latent_dim * (latent_dim + 1) // 2

    def forward(self, encoded: Tensor) -> CholeskyNormal:
        d = self._latent_dim(encoded)
        factor = encoded.new_zeros(len(encoded), d, d)
        rows, columns = torch.tril_indices(d, d, device=encoded.device)
        factor[:, rows, columns] = encoded[:, d:]
        # Softplus underflows to 0, whose logarithm is infinite.
        diagonal = F.softplus(factor.diagonal(dim1=1, dim2=2) + ONE_BEFORE_SOFTPLUS).clamp_min(torch.finfo(factor.dtype).tiny)
        return CholeskyNormal(encoded[:, :d], factor.tril(-1) + diagonal.diag_embed())

    def _latent_dim(self, encoded: Tensor) -> int:
        if isinstance(encoded, Tensor) and encoded.ndim == 2:
            # d + d (d + 1) / 2 = size solved for d.
            d = (math.isqrt(9 + 8 * encoded.shape[1]) - 3) // 2
            if d > 0 and self.parameters_for(d) == encoded.shape[1]:
                return d
        given = f"shape {tuple(encoded.shape)}" if isinstance(encoded, Tensor) else type(encoded).__name__
        raise ValueError(f"encoder: gave {given}, has to give (batch, d + d (d + 1) / 2) for a posterior with full covariance")
