"""Twins of other libraries' layers and distributions on this package's kernels, and one-line patches for their models."""

from fastvae.compat.diffusers import DiagonalGaussianDistribution, patch_diffusers
from fastvae.compat.quantizers import VectorQuantizer
from fastvae.compat.vector_quantize import patch_vector_quantize

__all__ = ["DiagonalGaussianDistribution", "VectorQuantizer", "patch_diffusers", "patch_vector_quantize"]
