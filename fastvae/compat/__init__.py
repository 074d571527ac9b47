"""Twins of other libraries' layers: their names, arguments and results, on this package's kernels."""

from fastvae.compat.quantizers import ResidualVQ, VectorQuantize, VectorQuantizer

__all__ = ["ResidualVQ", "VectorQuantize", "VectorQuantizer"]
