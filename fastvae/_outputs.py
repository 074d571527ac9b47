"""The named tuples that the public functions return, here and in the reference alike."""

from typing import NamedTuple

from torch import Tensor

from fastvae._pytree import exportable
from fastvae._types import JacobianMethodName


@exportable
class ELBO(NamedTuple):
    """The negative evidence lower bound and its terms, in nats; ``kl`` is without its weight and capacity."""

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor


@exportable
class VQ(NamedTuple):
    """The results of vector quantization."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


@exportable
class RVQ(NamedTuple):
    """The results of residual vector quantization; ``indices`` and ``losses`` have a last dimension for the steps."""

    quantized: Tensor
    indices: Tensor
    losses: Tensor


@exportable
class JacobianMethod(NamedTuple):
    """The method by which ``jacobian_frobenius`` computes the norm for an encoder, and the reason."""

    method: JacobianMethodName
    reason: str
