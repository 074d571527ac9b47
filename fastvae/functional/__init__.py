"""The public functions: argument checks, documentation, and below each its ``torch.autograd.Function``."""

from fastvae.functional.group_norm import group_norm_silu
from fastvae.functional.latent import kl_normal, reparameterize, reparameterize_kl
from fastvae.functional.reconstruction import (
    ELBO,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    elbo_loss,
    gaussian_nll,
    mse_loss,
    vae_loss,
)

__all__ = [
    "ELBO",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "elbo_loss",
    "gaussian_nll",
    "group_norm_silu",
    "kl_normal",
    "mse_loss",
    "reparameterize",
    "reparameterize_kl",
    "vae_loss",
]
