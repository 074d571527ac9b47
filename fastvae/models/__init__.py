"""Thin models: each composes :mod:`fastvae.functional`, :mod:`fastvae.nn` and plain torch layers."""

from fastvae.models.autoencoder import (
    AE,
    AEOutput,
    ContractiveAE,
    DenoisingAE,
    SparseAE,
    StackedAE,
    conv_coders,
    linear_coders,
    mlp_coders,
)
from fastvae.models.conv_vae import ResidualConvVAE
from fastvae.models.vae import MLPVAE, VAE, ConvVAE, VAEOutput
from fastvae.models.vqvae import VQVAE, VQVAE2, VQVAEOutput

__all__ = [
    "AE",
    "MLPVAE",
    "VAE",
    "VQVAE",
    "VQVAE2",
    "AEOutput",
    "ContractiveAE",
    "ConvVAE",
    "DenoisingAE",
    "ResidualConvVAE",
    "SparseAE",
    "StackedAE",
    "VAEOutput",
    "VQVAEOutput",
    "conv_coders",
    "linear_coders",
    "mlp_coders",
]
