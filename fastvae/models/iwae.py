"""The importance weighted autoencoder (Burda, Grosse and Salakhutdinov, *Importance Weighted Autoencoders*, 2016)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import ImportanceGradient, check_choice
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.posterior import CholeskyPosterior, DiagonalPosterior, Posterior
from fastvae.distributions.prior import Prior, check_count
from fastvae.models.vae import VAE
from fastvae.ops._results import accumulation_dtype


@exportable
class IWAEOutput(NamedTuple):
    """The bound and its terms in nats per sample, and the tensors behind them.

    ``loss`` is the negative importance-weighted bound; ``recon_loss`` and ``kl`` are those of the evidence lower bound at the same draws;
    ``recon`` and ``z`` have a first dimension of ``num_samples``.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


class GradientTimesShare(torch.autograd.Function):
    """Gives z, and zeros ``(num_samples, batch)`` and ``()``, by whose gradients the backward pass learns a factor of that of z.

    With the two zeros in a loss, the first times the shares, their gradients are the shares times that of the loss, and that of the loss.
    Where nothing flows through the loss, such as from a picture, the gradient of z is left as it is. A hook on z would do the same, which
    torch.compile of 2.12 cannot trace.
    """

    @staticmethod
    def forward(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dtype = accumulation_dtype(z.dtype)
        return z.view_as(z), z.new_zeros(z.shape[:2], dtype=dtype), z.new_zeros((), dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_share: Tensor, grad_loss: Tensor) -> Tensor:
        share = torch.where(grad_loss == 0, 1.0, grad_share / grad_loss).to(grad.dtype)
        return grad * share.view(*share.shape, *(1,) * (grad.ndim - 2))


class IWAE(VAE):
    r"""A VAE that is trained on the importance-weighted bound.

    .. math:: -\mathbb{E} \log \frac{1}{K} \sum_k w_k, \quad w_k = \frac{p(x | z_k)\, p(z_k)}{q(z_k | x)}, \quad z_k \sim q(z | x)

    in nats per sample. All K samples go through the decoder as one batch.

    Args:
        encoder, decoder, latent_shape, prior, posterior, likelihood: see :class:`~fastvae.models.VAE`.
        num_samples: K.
        gradient: of the encoder. ``"standard"`` is the gradient of the bound, whose signal falls with K (Rainforth et al., *Tighter
            Variational Bounds are Not Necessarily Better*, 2018). ``"doubly_reparameterized"`` has the same expectation and a smaller
            variance (Tucker et al., *Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives*, 2019); it takes a
            ``DiagonalPosterior`` or a ``CholeskyPosterior``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        num_samples: int = 5,
        gradient: ImportanceGradient = "standard",
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        likelihood: LikelihoodName | Likelihood = "bernoulli_logits",
    ):
        parts: dict[str, Any] = {"prior": prior, "posterior": posterior, "likelihood": likelihood}
        super().__init__(encoder, decoder, latent_shape, num_samples=check_count("num_samples", num_samples), **parts)
        self.gradient = check_choice("gradient", gradient, get_args(ImportanceGradient))
        if gradient != "standard" and not isinstance(self.posterior, DiagonalPosterior | CholeskyPosterior):
            given = type(self.posterior).__name__
            raise ValueError(f"posterior: got {given}, {gradient!r} takes a DiagonalPosterior or a CholeskyPosterior")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gradient={self.gradient!r}"

    def forward(
        self, x: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None, seed: Tensor | int | None = None
    ) -> IWAEOutput:
        """The negative bound of a batch; see :meth:`fastvae.models.VAE.forward` for the arguments."""
        q = self.encode(x)
        z = q.rsample(self.num_samples, eps=eps, generator=generator, seed=seed)
        weighted, share_of_gradient, one = GradientTimesShare.apply(z) if self.gradient == "doubly_reparameterized" else (z, None, None)
        recon = self.decode_samples(weighted, self.num_samples)
        log_px = -self.recon_loss(recon, x, self.num_samples, "sample")
        kl = self._density(q).log_prob(weighted) - self.prior_distribution(q).log_prob(weighted)
        log_weights = log_px - kl
        loss = math.log(cast("int", self.num_samples)) - torch.logsumexp(log_weights, 0).mean()
        if share_of_gradient is not None:
            # Both terms are zero, and tell the backward pass the shares.
            loss = loss + (share_of_gradient * log_weights.detach().softmax(0)).sum() + one
        return IWAEOutput(loss, -log_px.mean(), kl.mean(), recon, z, q.mu, q.logvar)

    def _density(self, q: Any) -> Any:
        """The posterior whose density is in the weights. The doubly reparameterized gradient reaches the encoder through z alone."""
        return q if self.gradient == "standard" else type(q)(*(parameter.detach() for parameter in q))
