"""Sampling a posterior, as a module."""

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae.functional._checks import check_nonnegative, check_reduction
from fastvae.functional.latent import LOGVAR_CLAMP


class Reparameterize(nn.Module):
    """A sample of the posterior and its KL in one call: :func:`fastvae.functional.reparameterize_kl`.

    In evaluation mode ``z`` is the mean, as dropout is off there: encodings and reconstructions are then the same at every call. An
    evidence lower bound asks for samples in evaluation too: ``sample_in_eval=True``, or give the noise.

    Args:
        num_samples: draws so many samples of each element; ``z`` then has the shape ``(num_samples, *mu.shape)``.
        reduction: of the KL: ``"none"``, ``"sample"``, ``"batchmean"`` (nats per sample), ``"sum"`` or ``"mean"``.
        free_bits: nats a dimension that are free, see :func:`fastvae.functional.kl_normal`.
        sample_in_eval: samples in evaluation mode too.
        logvar_clamp: limits of ``logvar``; ``None`` for none.
    """

    def __init__(
        self,
        *,
        num_samples: int | None = None,
        reduction: str = "batchmean",
        free_bits: float = 0.0,
        sample_in_eval: bool = False,
        logvar_clamp: tuple[float, float] | None = LOGVAR_CLAMP,
    ):
        super().__init__()
        check_reduction(reduction)
        self.num_samples = num_samples
        self.reduction = reduction
        self.free_bits = check_nonnegative("free_bits", free_bits)
        self.sample_in_eval = sample_in_eval
        self.logvar_clamp = logvar_clamp

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
        options = {"reduction": self.reduction, "free_bits": self.free_bits, "logvar_clamp": self.logvar_clamp}
        noise_given = eps is not None or generator is not None or seed is not None
        if self.training or self.sample_in_eval or noise_given:
            noise = {"eps": eps, "generator": generator, "seed": seed}
            return FV.reparameterize_kl(mu, logvar, prior_mu, prior_logvar, num_samples=self.num_samples, **noise, **options)
        z = mu if self.num_samples is None else mu.expand(self.num_samples, *mu.shape)
        return z, FV.kl_normal(mu, logvar, prior_mu, prior_logvar, **options)

    def extra_repr(self) -> str:
        names = ("num_samples", "reduction", "free_bits", "sample_in_eval", "logvar_clamp")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
