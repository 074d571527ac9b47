"""The public functions: argument checks, documentation, and below each its ``torch.autograd.Function``."""

from fastvae._outputs import ELBO, RVQ, VQ, JacobianMethod
from fastvae.functional.binary_code_entropy import binary_code_entropy
from fastvae.functional.codebook import codebook_ema_update_, residual_quantize, vector_quantize, vq_nearest
from fastvae.functional.group_norm import group_norm_silu
from fastvae.functional.jacobian import contractive_penalty, explain_jacobian_method, jacobian_frobenius
from fastvae.functional.latent import kl_normal, reparameterize, reparameterize_kl
from fastvae.functional.logistic_mixture import logistic_mixture_nll
from fastvae.functional.norm_act_conv import norm_act_conv
from fastvae.functional.reconstruction import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    elbo_loss,
    gaussian_nll,
    mse_loss,
    vae_loss,
)
from fastvae.functional.rms_norm import rms_norm_silu
from fastvae.functional.snake import snake

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
