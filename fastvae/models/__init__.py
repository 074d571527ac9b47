"""Thin models: each composes :mod:`fastvae.functional`, :mod:`fastvae.nn` and plain torch layers."""

from fastvae.models.vae import MLPVAE, VAE, ConvVAE, VAEOutput

__all__ = ["MLPVAE", "VAE", "ConvVAE", "VAEOutput"]
