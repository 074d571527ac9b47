"""Variational autoencoders (Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014)."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.divergence import sample_with_kl
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.names import likelihood_of
from fastvae.distributions.normal import StandardNormal
from fastvae.distributions.posterior import DiagonalPosterior, Posterior
from fastvae.distributions.prior import Prior, VampPrior, check_count, prior_of
from fastvae.functional._checks import check_nonnegative
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float, parameter_dtype
from fastvae.models._line import points_between
from fastvae.models._reading import reading
from fastvae.models._ready_made_vae import ReadyMadeVAE
from fastvae.models.bounds import importance_bound, log_weights
from fastvae.nn import KLPenalty
from fastvae.nn.schedules import Schedule


@exportable
class VAEOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them.

    ``kl`` is without ``beta`` and ``capacity``; ``recon`` is what the decoder gave: logits, probabilities or means. With ``num_samples``,
    ``z`` and ``recon`` have a first dimension of that size. ``mu`` and ``logvar`` are the posterior's, those of a flow its base's.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


AnyVAE = TypeVar("AnyVAE", bound="VAE")


class VAE(ReadyMadeVAE, nn.Module, Pretrained):
    r"""A VAE of any encoder and decoder, with an exchangeable prior, posterior and likelihood.

    .. math:: -\mathbb{E}_{q(z|x)} \log p(x|z) + \beta\, KL(q(z|x) \| p(z))

    in nats per sample, by default with :math:`q(z|x) = N(\mu, \mathrm{diag}(\sigma^2))` and :math:`p(z) = N(0, I)`; with ``capacity``
    :math:`C` the second term is :math:`\beta\, |KL - C|`. A call samples ``z`` in training and in evaluation mode, as the bound demands;
    :meth:`reconstruct` decodes the posterior's mean.

    :meth:`encode`, :meth:`decode` and :meth:`decode_mean` are parts of a call: differentiable, in the model's mode. The other methods read:
    they have no gradient and run as in evaluation mode, so that they change no buffer of a model in training.

    A subclass with another objective has its own :meth:`objective`.

    Args:
        encoder: gives what ``posterior`` takes: by default ``(mu, logvar)``, or one tensor that is split into the two on dimension 1. It
            sees an 8-bit image as value / 255.
        decoder: gives, for ``z``, what ``likelihood`` takes: logits, probabilities or means in the shape of the data, or several parameters
            for each element on dimension 1.
        latent_shape: shape of one ``z``, an integer for a vector; :meth:`sample` needs it. A ``prior`` knows it.
        prior: p(z) of :mod:`fastvae.distributions`; by default ``StandardPrior``.
        posterior: q(z | x) of :mod:`fastvae.distributions`; by default ``DiagonalPosterior``.
        likelihood: p(x | z) of :mod:`fastvae.distributions`, or ``"bernoulli_logits"``, ``"bernoulli"`` (probabilities) or ``"gaussian"``
            (unit variance).
        beta: weight of the KL, a number or a schedule (Higgins et al., *beta-VAE*, 2017). ``model.kl_penalty.step()`` advances schedules.
        capacity: :math:`C` in nats per sample, a number or a schedule (Burgess et al., 2018); ``None`` for none.
        free_bits: nats a latent dimension that are free (Kingma et al., 2016); with a diagonal posterior and a normal prior.
        num_samples: samples of ``z`` for each ``x``, over which the reconstruction term is averaged.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        likelihood: LikelihoodName | Likelihood = "bernoulli_logits",
        beta: float | Schedule = 1.0,
        capacity: float | Schedule | None = None,
        free_bits: float = 0.0,
        num_samples: int | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.prior = prior_of(latent_shape, prior)
        self.posterior = DiagonalPosterior() if posterior is None else posterior
        if isinstance(self.prior, VampPrior) and not isinstance(self.posterior, DiagonalPosterior):
            raise ValueError(f"posterior: got {type(posterior).__name__} with a VampPrior, takes a DiagonalPosterior")
        self.likelihood = likelihood_of(likelihood)
        self.kl_penalty = KLPenalty(beta, capacity)
        self.free_bits = check_nonnegative("free_bits", free_bits)
        self.num_samples = None if num_samples is None else check_count("num_samples", num_samples)

    @property
    def latent_shape(self) -> tuple[int, ...] | None:
        """The shape of one ``z``, where it is known."""
        return None if self.prior is None else self.prior.latent_shape

    @classmethod
    def _of_networks(cls: type[AnyVAE], encoder: nn.Sequential, decoder: nn.Sequential, latent_dim: int, **options) -> AnyVAE:
        """The model of ready-made networks; a subclass that takes more than the two overrides it."""
        return cls(encoder, decoder, latent_dim, **options)

    def extra_repr(self) -> str:
        return f"latent_shape={self.latent_shape}, free_bits={self.free_bits}, num_samples={self.num_samples}"

    def encode(self, x: Tensor) -> Any:
        """The posterior: ``(mu, logvar)`` by default, else a distribution with ``mean``."""
        return self.posterior(self._encoded(x))

    def _encoded(self, x: Tensor) -> Any:
        """The encoder's output."""
        return self.encoder(as_float(x, self.encoder))

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output: the likelihood's parameters."""
        return self.decoder(z)

    def decode_mean(self, z: Tensor) -> Tensor:
        """The mean of p(x | z)."""
        return self.likelihood.mean(self.decode(z))

    def prior_distribution(self, q: Any) -> Any:
        """p(z), which a model that does not know the shape of its latent takes from the posterior's."""
        shape = q.mu.shape[1:]
        if self.prior is None:
            return StandardNormal(q.mu.new_zeros(shape))
        if shape != self.prior.latent_shape:
            raise ValueError(f"prior: is of shape {self.prior.latent_shape}, the encoder gave a posterior of shape {tuple(shape)}")
        return self.prior(self.encode)

    def forward(
        self, x: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None, seed: Tensor | int | None = None
    ) -> Any:
        """The negative evidence lower bound of a batch.

        Args:
            x: data, ``(batch, ...)``; floating, or uint8, which means value / 255.
            eps: the noise, in the shape of ``z``; drawn where it is not given, by ``generator`` or ``seed``.
        """
        q = self.encode(x)
        return self.bound(x, q, self.prior_distribution(q), self.decode, eps=eps, generator=generator, seed=seed)

    def bound(self, x: Tensor, q: Any, p: Any, decode: Callable[[Tensor], Tensor], **noise) -> Any:
        """The output of a call, by the posterior and the prior's distribution of a batch and the decoder."""
        z, kl = sample_with_kl(q, p, num_samples=self.num_samples, free_bits=self.free_bits, **noise)
        recon = decode_samples(decode, z, self.num_samples)
        recon_loss = self.recon_loss(recon, x, self.num_samples)
        return self.objective(VAETerms(x, q, p, z, kl, recon, recon_loss, noise.get("generator")))

    def objective(self, terms: "VAETerms") -> Any:
        """The output of a call: the loss of what encoder, prior, decoder and likelihood gave."""
        loss = terms.recon_loss + self.kl_penalty(terms.kl)
        return VAEOutput(loss, terms.recon_loss, terms.kl, terms.recon, terms.z, terms.q.mu, terms.q.logvar)

    def decode_samples(self, z: Tensor, num_samples: int | None) -> Tensor:
        """The decoder's output for one ``z`` a sample, or for several on a first dimension."""
        return decode_samples(self.decode, z, num_samples)

    def recon_loss(
        self, recon: Tensor, x: Tensor, num_samples: int | None, reduction: Literal["batchmean", "sample"] = "batchmean"
    ) -> Tensor:
        r""":math:`-\log p(x|z)` in nats per sample; with ``"sample"`` of each ``z``, ``(batch,)`` or ``(num_samples, batch)``."""
        if num_samples is None:
            return self.likelihood(recon, x, reduction=reduction)
        loss = self.likelihood(recon.flatten(0, 1), x.repeat(num_samples, *(1,) * (x.ndim - 1)), reduction=reduction)
        return loss.unflatten(0, recon.shape[:2]) if reduction == "sample" else loss

    @reading
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The means of p(x | z) for ``n`` draws of z from the prior, drawn on the device of ``generator`` where one is given."""
        if self.prior is None:
            raise ValueError("latent_shape: got None, sample() takes a model that was given the shape of its z")
        z = self.prior(self.encode).sample(n, generator)
        return self.decode_mean(z.to(parameter_dtype(self.decoder)))

    @reading
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x | z) at the posterior's mean of z, in the range of the data."""
        return self.decode_mean(self.encode(x).mean)

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10) -> Tensor:
        """Decodes ``steps`` points on the line between the posterior means of two batches: ``(batch, steps, ...)``, both ends included."""
        # A step of all samples comes before the next one: the conditions of a batch repeat in this order.
        path = points_between(self.encode(start).mean, self.encode(end).mean, steps).transpose(0, 1)
        return self.decode_mean(path.flatten(0, 1)).unflatten(0, path.shape[:2]).transpose(0, 1)

    def log_weights(self, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The log importance weights of draws of the posterior, ``(num_samples, batch)``, see :func:`fastvae.models.bounds.log_weights`."""
        return log_weights(self, x, num_samples, generator=generator)

    @reading
    def log_prob_bound(
        self, x: Tensor, num_samples: int = 1, *, samples_at_once: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """The importance-weighted lower bound on log p(x) of each sample in nats, ``(batch,)``, see
        :func:`fastvae.models.bounds.importance_bound`; with one sample the evidence lower bound."""
        return importance_bound(self, x, num_samples, samples_at_once=samples_at_once, generator=generator)

    @reading
    def anomaly_score(self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The negative evidence lower bound of each sample in nats, shape ``(batch,)``, with beta 1, averaged over ``num_samples`` of z.

        The score of An and Cho, *Variational Autoencoder based Anomaly Detection using Reconstruction Probability* (2015), plus the KL.
        """
        q = self.encode(x)
        z, kl = sample_with_kl(q, self.prior_distribution(q), num_samples=num_samples, reduction="sample", generator=generator)
        recon = self.decode_samples(z, num_samples)
        return self.recon_loss(recon, x, num_samples, "sample").mean(0) + kl


@exportable
class VAETerms(NamedTuple):
    """What a forward pass gives an objective: the data, the posterior, the prior's distribution, z, the KL in nats per sample, the
    decoder's output, the reconstruction loss in nats per sample, and the generator of a call's noise."""

    x: Tensor
    q: Any
    p: Any
    z: Tensor
    kl: Tensor
    recon: Tensor
    recon_loss: Tensor
    generator: torch.Generator | None


def decode_samples(decode: Callable[[Tensor], Tensor], z: Tensor, num_samples: int | None) -> Tensor:
    """The decoder's output for one ``z`` a sample, or for several on a first dimension, which go through it as one batch."""
    return decode(z) if num_samples is None else decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])
