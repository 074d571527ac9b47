"""The operators, a module a family: their arguments, results and shapes, and the autograd.Functions over them."""

from fastvae.ops import codebook, group_norm, jacobian, latent, logistic_mixture, norm_act_conv, reconstruction, rms_norm
from fastvae.ops._operator import BACKENDS, OPERATORS

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "codebook",
    "group_norm",
    "jacobian",
    "latent",
    "logistic_mixture",
    "norm_act_conv",
    "reconstruction",
    "rms_norm",
]
