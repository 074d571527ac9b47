"""Thin models: each composes :mod:`fastvae.functional`, :mod:`fastvae.nn` and plain torch layers."""

from fastvae.models.vae import MLPVAE, VAE, ConvVAE, VAEOutput
from fastvae.models.vqvae import VQVAE, VQVAE2, VQVAEOutput

__all__ = ["MLPVAE", "VAE", "VQVAE", "VQVAE2", "ConvVAE", "VAEOutput", "VQVAEOutput"]
