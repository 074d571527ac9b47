"""Triton kernels and their launchers; importing a family registers it with the operators."""

from fastvae.kernels import group_norm, jacobian, latent, reconstruction

__all__ = ["group_norm", "jacobian", "latent", "reconstruction"]
