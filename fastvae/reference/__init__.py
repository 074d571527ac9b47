"""Every operator in plain PyTorch: the definition, and the oracle of the tests.

The functions are those of :mod:`fastvae.functional`, by the same names and with the same arguments, differentiable any number of times.
They check less, and they are slow.
"""

from fastvae._outputs import ELBO, RVQ, VQ, JacobianMethod
from fastvae.reference.binary_code_entropy import binary_code_entropy
from fastvae.reference.codebook import codebook_ema_update_, residual_quantize, vector_quantize, vq_nearest
from fastvae.reference.group_norm import group_norm_silu
from fastvae.reference.jacobian import contractive_penalty, explain_jacobian_method, jacobian_frobenius
from fastvae.reference.latent import kl_normal, reparameterize, reparameterize_kl
from fastvae.reference.logistic_mixture import logistic_mixture_nll
from fastvae.reference.norm_act_conv import norm_act_conv
from fastvae.reference.reconstruction import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    elbo_loss,
    gaussian_nll,
    mse_loss,
    vae_loss,
)
from fastvae.reference.rms_norm import rms_norm_silu
from fastvae.reference.snake import snake

__all__ = [
    "ELBO",
    "RVQ",
    "VQ",
    "JacobianMethod",
    "binary_code_entropy",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "codebook_ema_update_",
    "contractive_penalty",
    "elbo_loss",
    "explain_jacobian_method",
    "gaussian_nll",
    "group_norm_silu",
    "jacobian_frobenius",
    "kl_normal",
    "logistic_mixture_nll",
    "mse_loss",
    "norm_act_conv",
    "reparameterize",
    "reparameterize_kl",
    "residual_quantize",
    "rms_norm_silu",
    "snake",
    "vae_loss",
    "vector_quantize",
    "vq_nearest",
]
