"""Every operator in plain PyTorch: the definition, the oracle of the tests and the last fallback."""

from fastvae.reference import codebook, group_norm, jacobian, latent, reconstruction

__all__ = ["codebook", "group_norm", "jacobian", "latent", "reconstruction"]
