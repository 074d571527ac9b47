"""Twins of other libraries' names, and one-line patches for their models."""

from fastvae.compat.diffusers import DiagonalGaussianDistribution, patch_diffusers

__all__ = ["DiagonalGaussianDistribution", "patch_diffusers"]
