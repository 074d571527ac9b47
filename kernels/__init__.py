"""Triton kernels and their launchers; importing a family registers it with the operators."""

from fastvae.kernels import codebook, group_norm, jacobian, latent, logistic_mixture, reconstruction, rms_norm, snake

__all__ = ["codebook", "group_norm", "jacobian", "latent", "logistic_mixture", "reconstruction", "rms_norm", "snake"]
