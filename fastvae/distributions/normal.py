"""Normal distributions over latents, as named tuples of their tensors.

A latent has shape ``(batch, *latent_shape)``; several of them for each sample of a batch have ``(num_samples, batch, *latent_shape)``.
``log_prob(z)`` gives ``(batch,)`` or ``(num_samples, batch)``, in nats and at least in float32. ``noise`` stands for ``eps``, ``generator``
or ``seed`` of :func:`fastvae.functional.reparameterize`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae.functional.latent import LOGVAR_CLAMP
from fastvae.ops._results import accumulation_dtype

LOG_TWO_PI = math.log(2 * math.pi)


def widened(tensor: Tensor) -> Tensor:
    """In the dtype in which sums over elements are made: 16 bits become float32."""
    return tensor.to(accumulation_dtype(tensor.dtype))


def normal_log_prob(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """The log density of each element, at least in float32."""
    z, mu, logvar = widened(z), widened(mu), widened(logvar).clamp(*LOGVAR_CLAMP)
    return -0.5 * ((z - mu).square() * (-logvar).exp() + logvar + LOG_TWO_PI)


def sum_latent(values: Tensor, latent_ndim: int) -> Tensor:
    """The sum over the last ``latent_ndim`` dimensions, those of one latent."""
    return values.flatten(-latent_ndim).sum(-1)


def draw_noise(n: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise for ``n`` latents of the shape of ``like``, drawn on the generator's device."""
    device = like.device if generator is None else generator.device
    return torch.randn(n, *like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


@exportable
class DiagonalNormal(NamedTuple):
    """N(mu, diag(exp(logvar))) for each sample of a batch; ``logvar`` is clamped to [-30, 20] in every formula."""

    mu: Tensor
    logvar: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mu

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.mu, self.logvar

    def log_prob(self, z: Tensor) -> Tensor:
        return sum_latent(normal_log_prob(z, self.mu, self.logvar), self.mu.ndim - 1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws, which go through the distributions of the batch again and again; their number divides ``n``."""
        times = n // len(self.mu), *(1,) * (self.mu.ndim - 1)
        return FV.reparameterize(self.mu.repeat(times), self.logvar.repeat(times), eps=draw_noise(n, self.mu[0], generator))

    def rsample(self, num_samples: int | None = None, **noise) -> Tensor:
        """A draw with gradients."""
        return FV.reparameterize(self.mu, self.logvar, num_samples=num_samples, **noise)

    def rsample_and_log_prob(self, num_samples: int | None = None, **noise) -> tuple[Tensor, Tensor]:
        z = self.rsample(num_samples, **noise)
        return z, self.log_prob(z)


@exportable
class CholeskyNormal(NamedTuple):
    """N(mu, L L^T) of vectors: ``mu`` is ``(batch, d)``; ``factor`` is L, lower triangular with a positive diagonal, ``(batch, d, d)``."""

    mu: Tensor
    factor: Tensor

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def logvar(self) -> Tensor:
        """The log variance of each dimension by itself."""
        return self.factor.square().sum(-1).log()

    def log_prob(self, z: Tensor) -> Tensor:
        difference = widened(z - self.mu).unsqueeze(-1)
        factor = widened(self.factor).expand(*difference.shape[:-2], *self.factor.shape[-2:])
        whitened = torch.linalg.solve_triangular(factor, difference, upper=False)
        return -0.5 * (whitened.square().sum((-2, -1)) + self.mu.shape[-1] * LOG_TWO_PI) - self._half_log_determinant()

    def _half_log_determinant(self) -> Tensor:
        return widened(self.factor).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def rsample(self, num_samples: int | None = None, **noise) -> Tensor:
        """A draw with gradients."""
        zeros = torch.zeros_like(self.mu)
        eps = FV.reparameterize(zeros, zeros, num_samples=num_samples, **noise)
        return self.mu + (self.factor @ eps.unsqueeze(-1)).squeeze(-1)

    def rsample_and_log_prob(self, num_samples: int | None = None, **noise) -> tuple[Tensor, Tensor]:
        z = self.rsample(num_samples, **noise)
        return z, self.log_prob(z)

    def kl_to(self, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
        """The KL to N(prior_mu, diag(exp(prior_logvar))), by default N(0, I), ``(batch,)``."""
        mu, factor = widened(self.mu), widened(self.factor)
        logvar = torch.zeros_like(mu) if prior_logvar is None else widened(prior_logvar).clamp(*LOGVAR_CLAMP)
        difference = mu if prior_mu is None else mu - widened(prior_mu)
        spread = (factor.square().sum(-1) + difference.square()) * (-logvar).exp() + logvar - 1
        return 0.5 * spread.sum(-1) - self._half_log_determinant()


@exportable
class StandardNormal(NamedTuple):
    """N(0, I); ``origin`` is one latent of zeros."""

    origin: Tensor

    def moments(self) -> tuple[None, None]:
        return None, None

    def log_prob(self, z: Tensor) -> Tensor:
        return sum_latent(-0.5 * (widened(z).square() + LOG_TWO_PI), self.origin.ndim)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return draw_noise(n, self.origin, generator)


@exportable
class SharedNormal(NamedTuple):
    """N(mu, diag(exp(logvar))), the same for every sample of a batch: both have the shape of one latent."""

    mu: Tensor
    logvar: Tensor

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.mu, self.logvar

    def log_prob(self, z: Tensor) -> Tensor:
        return sum_latent(normal_log_prob(z, self.mu, self.logvar), self.mu.ndim)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        shape = n, *self.mu.shape
        return FV.reparameterize(self.mu.expand(shape), self.logvar.expand(shape), eps=draw_noise(n, self.mu, generator))


@exportable
class NormalMixture(NamedTuple):
    """A mixture of K diagonal normals: ``logits`` is ``(K,)``; ``mu`` and ``logvar`` are ``(K, *latent_shape)``."""

    logits: Tensor
    mu: Tensor
    logvar: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        latent_ndim = self.mu.ndim - 1
        components = sum_latent(normal_log_prob(z.unsqueeze(-latent_ndim - 1), self.mu, self.logvar), latent_ndim)
        return torch.logsumexp(components + widened(self.logits).log_softmax(0), dim=-1)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = self.mu.device if generator is None else generator.device
        component = torch.multinomial(widened(self.logits).softmax(0).to(device), n, replacement=True, generator=generator).to(
            self.mu.device
        )
        return FV.reparameterize(self.mu[component], self.logvar[component], eps=draw_noise(n, self.mu[0], generator))
