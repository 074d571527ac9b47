"""The Wasserstein autoencoder with a maximum mean discrepancy (Tolstikhin et al., *Wasserstein Auto-Encoders*, 2018)."""

from collections.abc import Sequence
from typing import TypeVar, get_args

import torch
from torch import Tensor, nn

from fastvae._types import Kernel, ReconLoss, check_choice
from fastvae.distributions.prior import Prior, prior_of
from fastvae.functional._checks import check_nonnegative
from fastvae.models._inputs import parameter_dtype
from fastvae.models._mmd import squared_mmd
from fastvae.models._reading import reading
from fastvae.models.autoencoder import AE

AnyWAE = TypeVar("AnyWAE", bound="WAE")


class WAE(AE):
    r"""An autoencoder whose codes have the distribution of a prior: :math:`\sum_i \ell(\hat x_i, x_i) + \lambda\, MMD(q(z), p(z))`.

    Without noise in its codes, it can be sampled: :meth:`sample`.

    Args:
        encoder, decoder, recon_loss: see :class:`~fastvae.models.AE`.
        latent_shape: shape of one code, an integer for a vector. A ``prior`` knows it.
        prior: p(z) of :mod:`fastvae.distributions`, from which a batch of draws comes in each call; by default ``StandardPrior``.
        weight: :math:`\lambda`.
        kernel: of the discrepancy, ``"imq"`` or ``"rbf"``, see :func:`fastvae.models._mmd.squared_mmd`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        prior: Prior | None = None,
        weight: float = 100.0,
        kernel: Kernel = "imq",
        recon_loss: ReconLoss = "mse",
    ):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        given = prior_of(latent_shape, prior)
        if given is None:
            raise ValueError("latent_shape: got None, the discrepancy takes a model that draws from its prior")
        self.prior = given
        self.weight = check_nonnegative("weight", weight)
        self.kernel = check_choice("kernel", kernel, get_args(Kernel))

    @classmethod
    def _of_networks(cls: type[AnyWAE], encoder: nn.Module, decoder: nn.Module, latent_dim: int, **options) -> AnyWAE:
        return cls(encoder, decoder, latent_dim, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight}, kernel={self.kernel!r}"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one code."""
        return self.prior.latent_shape

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        z = self.encoder(x)
        if z.shape[1:] != self.prior.latent_shape:
            raise ValueError(f"prior: is of shape {self.prior.latent_shape}, the encoder gave codes of shape {tuple(z.shape[1:])}")
        return z, squared_mmd(z, self.prior(self.encode).sample(len(z)), self.kernel), self.weight

    @reading
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Decoded draws from the prior, in the range of the data."""
        return self.decode(self.prior(self.encode).sample(n, generator).to(parameter_dtype(self.decoder)))
