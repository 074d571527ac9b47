"""Twins of other libraries' layers and distributions on this package's kernels, and one-line patches for their models."""

from fastvae.compat.diffusers import DiagonalGaussianDistribution, patch_diffusers
from fastvae.compat.quantizers import ResidualVQ, VectorQuantize, VectorQuantizer

__all__ = ["DiagonalGaussianDistribution", "ResidualVQ", "VectorQuantize", "VectorQuantizer", "patch_diffusers"]
