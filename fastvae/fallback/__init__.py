"""Every operator in plain PyTorch written for speed: it serves the devices, dtypes and installations that no kernel serves."""

from fastvae.fallback import binary_code_entropy, codebook, group_norm, jacobian, latent, logistic_mixture, reconstruction, rms_norm, snake

__all__ = ["binary_code_entropy", "codebook", "group_norm", "jacobian", "latent", "logistic_mixture", "reconstruction", "rms_norm", "snake"]
