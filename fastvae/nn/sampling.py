"""Sampling a posterior, as a module."""

from typing import Any

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import Reduction
from fastvae.functional._checks import check_nonnegative
from fastvae.functional._documentation import documented
from fastvae.functional.latent import LOGVAR_CLAMP
from fastvae.ops._results import reduction_number


class _Sampler(nn.Module):
    """The base of both modules: the options of sampling, and the mean in place of a sample in evaluation mode."""

    options: tuple[str, ...] = ("num_samples", "sample_in_eval", "logvar_clamp")

    def __init__(self, num_samples: int | None, sample_in_eval: bool, logvar_clamp: tuple[float, float] | None):
        super().__init__()
        self.num_samples = num_samples
        self.sample_in_eval = sample_in_eval
        self.logvar_clamp = logvar_clamp

    def _samples(self, *noise: object) -> bool:
        """Whether a call draws: noise that is given is used in evaluation mode too."""
        return self.training or self.sample_in_eval or any(source is not None for source in noise)

    def _mean(self, mu: Tensor) -> Tensor:
        return mu if self.num_samples is None else mu.expand(self.num_samples, *mu.shape)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in self.options)


@documented
class Reparameterize(_Sampler):
    """A sample of the posterior: :func:`fastvae.functional.reparameterize` as a module.

    In evaluation mode ``z`` is the mean, as dropout is off there: encodings and reconstructions are then the same at every call. An
    evidence lower bound asks for samples in evaluation too: ``sample_in_eval=True``, or give the noise.

    Args:
        $num_samples
        sample_in_eval: samples in evaluation mode too.
        $logvar_clamp
    """

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        sample_in_eval: bool = False,
        logvar_clamp: tuple[float, float] | None = LOGVAR_CLAMP,
    ):
        super().__init__(num_samples, sample_in_eval, logvar_clamp)

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: Tensor | int | None = None,
    ) -> Tensor:
        """``z``. Noise that is given (``eps``, ``generator`` or ``seed``) is used in evaluation mode too."""
        if not self._samples(eps, generator, seed):
            return self._mean(mu)
        options: dict[str, Any] = {"num_samples": self.num_samples, "logvar_clamp": self.logvar_clamp}
        return FV.reparameterize(mu, logvar, eps=eps, generator=generator, seed=seed, **options)


@documented
class ReparameterizeKL(_Sampler):
    """A sample of the posterior and its KL in one call: :func:`fastvae.functional.reparameterize_kl` as a module.

    In evaluation mode ``z`` is the mean, as in :class:`Reparameterize`; the KL is that of the posterior in any mode.

    Args:
        $num_samples
        $reduction
        $free_bits
        sample_in_eval: samples in evaluation mode too.
        $logvar_clamp
    """

    options = ("num_samples", "reduction", "free_bits", "sample_in_eval", "logvar_clamp")

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        reduction: Reduction = "batchmean",
        free_bits: float = 0.0,
        sample_in_eval: bool = False,
        logvar_clamp: tuple[float, float] | None = LOGVAR_CLAMP,
    ):
        super().__init__(num_samples, sample_in_eval, logvar_clamp)
        reduction_number(reduction)
        self.reduction = reduction
        self.free_bits = check_nonnegative("free_bits", free_bits)

    def forward(
        self,
        mu: Tensor,
        logvar: Tensor,
        prior_mu: Tensor | None = None,
        prior_logvar: Tensor | None = None,
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
        seed: Tensor | int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``(z, kl)``. Noise that is given (``eps``, ``generator`` or ``seed``) is used in evaluation mode too."""
        posterior: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = mu, logvar, prior_mu, prior_logvar
        options: dict[str, Any] = {"reduction": self.reduction, "free_bits": self.free_bits, "logvar_clamp": self.logvar_clamp}
        if not self._samples(eps, generator, seed):
            return self._mean(mu), FV.kl_normal(*posterior, **options)
        options |= {"num_samples": self.num_samples, "eps": eps, "generator": generator, "seed": seed}
        return FV.reparameterize_kl(*posterior, **options)
