"""Twins of other libraries' names, and one-line patches for their models."""

from fastvae.compat.diffusers import DiagonalGaussianDistribution, patch_diffusers

__all__ = ["DiagonalGaussianDistribution", "patch_diffusers"]
"""Twins of other libraries' layers: their names, arguments and results, on this package's kernels."""

from fastvae.compat.quantizers import ResidualVQ, VectorQuantize, VectorQuantizer

__all__ = ["ResidualVQ", "VectorQuantize", "VectorQuantizer"]
