"""The operators, a module a family: their arguments, results and shapes, and the autograd.Functions over them."""

from fastvae.ops import (
    binary_code_entropy,
    codebook,
    group_norm,
    jacobian,
    latent,
    logistic_mixture,
    norm_act_conv,
    reconstruction,
    rms_norm,
    snake,
)
from fastvae.ops._operator import BACKENDS, OPERATORS

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "binary_code_entropy",
    "codebook",
    "group_norm",
    "jacobian",
    "latent",
    "logistic_mixture",
    "norm_act_conv",
    "reconstruction",
    "rms_norm",
    "snake",
]
