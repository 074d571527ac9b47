"""Twins of other libraries' layers and distributions on this package's kernels, and one-line patches for their models."""

from fastvae.compat.diffusers import DiagonalGaussianDistribution, patch_diffusers
from fastvae.compat.pythae import patch_pythae
from fastvae.compat.quantizers import ResidualVQ, VectorQuantize
from fastvae.compat.taming import VectorQuantizer2, patch_taming

__all__ = [
    "DiagonalGaussianDistribution",
    "ResidualVQ",
    "VectorQuantize",
    "VectorQuantizer2",
    "patch_diffusers",
    "patch_pythae",
    "patch_taming",
]
