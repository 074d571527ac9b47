"""The InfoVAE, or MMD-VAE (Zhao, Song and Ermon, *InfoVAE: Balancing Learning and Inference in Variational Autoencoders*, 2019)."""

from collections.abc import Sequence
from typing import NamedTuple, get_args

from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import Kernel, check_choice
from fastvae.functional._checks import check_nonnegative
from fastvae.models._mmd import squared_mmd
from fastvae.models.vae import VAE, VAETerms


@exportable
class InfoVAEOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them; ``kl`` and ``mmd`` are without their weights."""

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    mmd: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


class InfoVAE(VAE):
    r"""A VAE that draws the aggregate posterior to the prior by a maximum mean discrepancy.

    .. math:: -\mathbb{E}_{q(z|x)} \log p(x|z) + (1 - \alpha)\, KL(q(z|x) \| p(z)) + (\alpha + \lambda - 1)\, MMD(q(z), p(z))

    ``alpha=1`` is the MMD-VAE, which has no KL. The draws of the prior in the discrepancy come from ``generator``, or else from torch's own
    generator: ``eps`` and ``seed`` do not fix them.

    Args:
        encoder, decoder, latent_shape, options: see :class:`~fastvae.models.VAE`.
        alpha: :math:`\alpha`, at most 1.
        weight: :math:`\lambda`, at least 1 - alpha.
        kernel: of the discrepancy, ``"imq"`` or ``"rbf"``, see :func:`fastvae.models._mmd.squared_mmd`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        alpha: float = 1.0,
        weight: float = 1000.0,
        kernel: Kernel = "imq",
        **options,
    ):
        super().__init__(encoder, decoder, latent_shape, **options)
        if self.prior is None:
            raise ValueError("latent_shape: got None, the discrepancy takes a model that draws from its prior")
        if alpha > 1:
            raise ValueError(f"alpha: got {alpha!r}, takes a number of at most 1")
        if weight < 1 - alpha:
            raise ValueError(f"weight: got {weight!r}, takes a number of at least 1 - alpha, {1 - alpha}")
        self.alpha, self.weight = float(alpha), check_nonnegative("weight", weight)
        self.kernel = check_choice("kernel", kernel, get_args(Kernel))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}, weight={self.weight}, kernel={self.kernel!r}"

    def objective(self, terms: VAETerms) -> InfoVAEOutput:
        _, q, p, z, kl, recon, recon_loss, generator = terms
        draws = z if self.num_samples is None else z.flatten(0, 1)
        mmd = squared_mmd(draws, p.sample(len(draws), generator), self.kernel)
        loss = recon_loss + (1 - self.alpha) * self.kl_penalty(kl) + (self.alpha + self.weight - 1) * mmd
        return InfoVAEOutput(loss, recon_loss, kl, mmd, recon, z, q.mu, q.logvar)
