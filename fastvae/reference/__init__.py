"""Every operator in plain PyTorch: the definition, the oracle of the tests and the last fallback."""

from fastvae.reference import latent, reconstruction

__all__ = ["latent", "reconstruction"]
