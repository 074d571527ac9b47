"""The FactorVAE (Kim and Mnih, *Disentangling by Factorising*, 2018)."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fastvae._pytree import exportable
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.normal import widened
from fastvae.distributions.posterior import Posterior
from fastvae.distributions.prior import Prior, check_count
from fastvae.functional._checks import check_nonnegative
from fastvae.models.vae import VAE, VAETerms


@exportable
class FactorVAEOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them; ``total_correlation`` is without its weight."""

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    total_correlation: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


class FactorVAE(VAE):
    r"""A VAE that is penalised for the total correlation of z, which a discriminator estimates.

    .. math:: -ELBO + \gamma\, KL(q(z) \| \prod_j q(z_j)), \quad
        KL(q(z) \| \prod_j q(z_j)) \approx \mathbb{E}_{q(z)} \log \frac{D(z)}{1 - D(z)}

    D(z) is the probability that z was drawn from q(z), and not from the product of its dimensions' distributions. It is trained beside the
    model by an optimizer of its own: :meth:`discriminator_parameters` and :meth:`discriminator_loss`. The gradient of a call's loss does
    not reach it.

    Args:
        encoder, decoder, latent_shape, prior, posterior, likelihood: see :class:`~fastvae.models.VAE`; z is a vector.
        gamma: :math:`\gamma`.
        discriminator: from z to two logits, those of q(z) and of the product; by default the paper's MLP of ``discriminator_layers``
            layers of ``discriminator_units`` leaky ReLUs.
        discriminator_units, discriminator_layers: of the default discriminator.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        gamma: float = 35.0,
        discriminator: nn.Module | None = None,
        discriminator_units: int = 1000,
        discriminator_layers: int = 5,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        likelihood: LikelihoodName | Likelihood = "bernoulli_logits",
    ):
        super().__init__(encoder, decoder, latent_shape, prior=prior, posterior=posterior, likelihood=likelihood)
        self.gamma = check_nonnegative("gamma", gamma)
        if discriminator is None:
            if self.latent_shape is None or len(self.latent_shape) != 1:
                raise ValueError(f"latent_shape: got {self.latent_shape}, the default discriminator takes the size of a vector")
            discriminator = _mlp(self.latent_shape[0], discriminator_units, discriminator_layers)
        self.discriminator = discriminator

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, gamma={self.gamma}"

    def discriminator_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the loss of a call does not train, but :meth:`discriminator_loss`."""
        return self.discriminator.parameters()

    def objective(self, terms: VAETerms) -> FactorVAEOutput:
        _, q, _, z, kl, recon, recon_loss, _ = terms
        if z.ndim != 2:
            raise ValueError(f"encoder: gave a posterior of shape {tuple(z.shape[1:])}, the total correlation takes one of vectors")
        frozen = {name: parameter.detach() for name, parameter in self.discriminator.named_parameters()}
        joint, product = widened(functional_call(self.discriminator, frozen, z)).unbind(1)
        total_correlation = (joint - product).mean()
        loss = recon_loss + self.kl_penalty(kl) + self.gamma * total_correlation
        return FactorVAEOutput(loss, recon_loss, kl, total_correlation, recon, z, q.mu, q.logvar)

    def discriminator_loss(self, output: FactorVAEOutput, generator: torch.Generator | None = None) -> Tensor:
        """The cross-entropy of the discriminator in nats; its gradient reaches the discriminator alone.

        One half of the batch's z are draws from q(z). The other half's dimensions are permuted over the samples, each by itself, which
        makes them draws from the product.

        Args:
            output: of a call, whose batch is of at least 2.
            generator: of the permutations, on the device of z.
        """
        joint, others = output.z.detach().tensor_split(2)
        if not len(joint) or not len(others):
            raise ValueError(f"output: is of a batch of {len(output.z)}, the discriminator takes at least 2 samples")
        logits = [widened(self.discriminator(z)) for z in (joint, permute_dimensions(others, generator))]
        losses = [F.cross_entropy(given, given.new_full((len(given),), kind, dtype=torch.int64)) for kind, given in enumerate(logits)]
        return 0.5 * (losses[0] + losses[1])


def permute_dimensions(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each dimension of ``(batch, d)`` permuted over the batch by itself."""
    order = torch.rand(z.shape, generator=generator, device=z.device).argsort(0)
    return z.gather(0, order)


def _mlp(latent_dim: int, units: int, layers: int) -> nn.Sequential:
    check_count("discriminator_units", units)
    sizes = itertools.pairwise((latent_dim, *[units] * check_count("discriminator_layers", layers)))
    hidden = (layer for below, above in sizes for layer in (nn.Linear(below, above), nn.LeakyReLU(0.2)))
    return nn.Sequential(*hidden, nn.Linear(units, 2))
