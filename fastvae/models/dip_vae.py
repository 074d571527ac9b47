"""The DIP-VAE (Kumar et al., *Variational Inference of Disentangled Latent Concepts from Unlabeled Observations*, 2018)."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import DIPKind, check_choice
from fastvae.distributions.normal import DiagonalNormal, widened
from fastvae.distributions.posterior import DiagonalPosterior
from fastvae.functional._checks import check_nonnegative
from fastvae.functional.latent import LOGVAR_CLAMP
from fastvae.models.vae import VAE, VAETerms


@exportable
class DIPOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them; ``penalty`` is with its weights."""

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    penalty: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


class DIPVAE(VAE):
    r"""A VAE whose aggregate posterior is drawn to a covariance of I.

    .. math:: -ELBO + \lambda_{od} \sum_{i \ne j} C_{ij}^2 + \lambda_d \sum_i (C_{ii} - 1)^2

    C is the covariance over the batch of the posterior means with ``kind="i"``, and of z, :math:`\mathrm{Cov}(\mu) + \mathbb{E}\,
    \mathrm{diag}(\sigma^2)`, with ``kind="ii"``.

    Args:
        encoder, decoder, latent_shape, options: see :class:`~fastvae.models.VAE`. The posterior is diagonal, z a vector.
        kind: ``"i"`` or ``"ii"``.
        off_diagonal: :math:`\lambda_{od}`.
        diagonal: :math:`\lambda_d`; the paper takes ten times ``off_diagonal`` for ``"i"``, and the same for ``"ii"``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        kind: DIPKind = "ii",
        off_diagonal: float = 10.0,
        diagonal: float = 10.0,
        **options,
    ):
        super().__init__(encoder, decoder, latent_shape, **options)
        if not isinstance(self.posterior, DiagonalPosterior):
            raise ValueError(f"posterior: got {type(self.posterior).__name__}, the covariance takes a DiagonalPosterior")
        self.kind = check_choice("kind", kind, get_args(DIPKind))
        self.off_diagonal = check_nonnegative("off_diagonal", off_diagonal)
        self.diagonal = check_nonnegative("diagonal", diagonal)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind!r}, off_diagonal={self.off_diagonal}, diagonal={self.diagonal}"

    def objective(self, terms: VAETerms) -> DIPOutput:
        _, q, _, z, kl, recon, recon_loss, _ = terms
        if q.mu.ndim != 2:
            raise ValueError(f"encoder: gave a posterior of shape {tuple(q.mu.shape[1:])}, the covariance takes one of vectors")
        penalty = self._penalty(q)
        return DIPOutput(recon_loss + self.kl_penalty(kl) + penalty, recon_loss, kl, penalty, recon, z, q.mu, q.logvar)

    def _penalty(self, q: DiagonalNormal) -> Tensor:
        mu = widened(q.mu)
        centred = mu - mu.mean(0)
        covariance = centred.mT @ centred / len(mu)
        if self.kind == "ii":
            covariance = covariance + widened(q.logvar).clamp(*LOGVAR_CLAMP).exp().mean(0).diag_embed()
        variance = covariance.diagonal()
        off_diagonal = covariance.square().sum() - variance.square().sum()
        return self.off_diagonal * off_diagonal + self.diagonal * (variance - 1).square().sum()
