"""Twins of other libraries' layers and distributions on this package's kernels, and one-line patches for their models."""

from fastvae.compat.diffusers import DiagonalGaussianDistribution, patch_diffusers
from fastvae.compat.pythae import patch_pythae
from fastvae.compat.taming import VectorQuantizer2, patch_taming
from fastvae.compat.vector_quantize import patch_vector_quantize

__all__ = [
    "DiagonalGaussianDistribution",
    "VectorQuantizer2",
    "patch_diffusers",
    "patch_pythae",
    "patch_taming",
    "patch_vector_quantize",
]
