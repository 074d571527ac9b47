"""The FactorVAE (Kim and Mnih, *Disentangling by Factorising*, 2018)."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae._pytree import exportable
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.normal import widened
from fastvae.distributions.posterior import Posterior
from fastvae.distributions.prior import Prior, check_count
from fastvae.functional._checks import check_nonnegative
from fastvae.models._adversarial import with_fixed_weights
from fastvae.models.vae import VAE, VAETerms

# Adam's decay rates for the discriminator, as in the paper; torch's own serve the autoencoder.
DISCRIMINATOR_BETAS = (0.5, 0.9)


@exportable
class FactorVAEOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them.

    ``total_correlation`` is without its weight. ``discriminator_loss`` is no part of ``loss``: its gradient trains the discriminator.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    total_correlation: Tensor
    discriminator_loss: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


class FactorVAE(VAE):
    r"""A VAE that is penalised for the total correlation of z, which a discriminator estimates.

    .. math:: -ELBO + \gamma\, KL(q(z) \| \prod_j q(z_j)), \quad
        KL(q(z) \| \prod_j q(z_j)) \approx \mathbb{E}_{q(z)} \log \frac{D(z)}{1 - D(z)}

    D(z) is the probability that z was drawn from q(z), and not from the product of its dimensions' distributions. The discriminator is
    trained beside the model, by the output's ``discriminator_loss``. The gradient of each loss keeps off the weights of the other, so a
    loop takes the gradient of their sum, or two optimizers: :meth:`parameter_groups`. A batch is of at least 2 samples.

    One half of a batch's z are draws from q(z) to the discriminator. In the other half each dimension is permuted over the samples by
    itself, where the paper takes a second batch.

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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The weights of the autoencoder, and those of the discriminator with the paper's decay rates of Adam."""
        judges = set(self.discriminator.parameters())
        own = [parameter for parameter in self.parameters() if parameter not in judges]
        return [{"params": own}, {"params": list(self.discriminator.parameters()), "betas": DISCRIMINATOR_BETAS}]

    def objective(self, terms: VAETerms) -> FactorVAEOutput:
        _, q, _, z, kl, recon, recon_loss, generator = terms
        if z.ndim != 2:
            raise ValueError(f"encoder: gave a posterior of shape {tuple(z.shape[1:])}, the total correlation takes one of vectors")
        joint, product = widened(with_fixed_weights(self.discriminator, z)).unbind(1)
        total_correlation = (joint - product).mean()
        discriminator_loss = self._discriminator_loss(z.detach(), generator)
        loss = recon_loss + self.kl_penalty(kl) + self.gamma * total_correlation
        return FactorVAEOutput(loss, recon_loss, kl, total_correlation, discriminator_loss, recon, z, q.mu, q.logvar)

    def _discriminator_loss(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """The cross-entropy in nats: half of the z are draws from q(z), those of the other half become draws from the product."""
        if len(z) < 2:
            raise ValueError(f"x: got a batch of {len(z)}, the discriminator takes at least 2 samples")
        joint, others = z.tensor_split(2)
        # One call: the weights of the discriminator, of which a batch has few rows, are read once.
        logits = widened(self.discriminator(torch.cat([joint, permute_dimensions(others, generator)])))
        halves = logits.tensor_split(2)
        losses = [F.cross_entropy(given, given.new_full((len(given),), kind, dtype=torch.int64)) for kind, given in enumerate(halves)]
        return 0.5 * (losses[0] + losses[1])


def permute_dimensions(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each dimension of ``(batch, d)`` permuted over the batch by itself, which makes z draws from the product of its dimensions."""
    device = z.device if generator is None else generator.device
    order = torch.rand(z.shape, generator=generator, device=device).argsort(0).to(z.device)
    return z.gather(0, order)


def _mlp(latent_dim: int, units: int, layers: int) -> nn.Sequential:
    check_count("discriminator_units", units)
    sizes = itertools.pairwise((latent_dim, *[units] * check_count("discriminator_layers", layers)))
    hidden = (layer for below, above in sizes for layer in (nn.Linear(below, above), nn.LeakyReLU(0.2)))
    return nn.Sequential(*hidden, nn.Linear(units, 2))
