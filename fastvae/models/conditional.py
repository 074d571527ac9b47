"""The conditional VAE (Sohn, Lee and Yan, *Learning Structured Output Representation using Deep Conditional Generative Models*, 2015)."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import Conditioning
from fastvae.distributions.conditional import ConditionalPrior, PriorAt
from fastvae.distributions.prior import VampPrior
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models.vae import VAE
from fastvae.nn.conditioning import At, call_at, conditioned
from fastvae.nn.conditions import ClassCondition, Condition, ConditionEmbedding

AnyCVAE = TypeVar("AnyCVAE", bound="CVAE")


class CVAE(VAE):
    r"""A VAE of p(x | y), whose encoder and decoder see a condition y: a class, a vector or a sequence.

    .. math:: -\mathbb{E}_{q(z|x, y)} \log p(x|z, y) + \beta\, KL(q(z|x, y) \| p(z|y))

    in nats per sample. p(z | y) is ``prior``, the same for all y unless it is a ``ConditionalPrior``.

    With ``drop_condition`` a batch in training loses each of its conditions with that probability: a learned embedding stands for it, in
    encoder, decoder and prior (Ho and Salimans, *Classifier-Free Diffusion Guidance*, 2021). Such a model is a VAE of p(x) too, where y is
    None.

    Args:
        encoder: gives, for ``(x, condition)``, what ``posterior`` takes: a :class:`~fastvae.nn.ConditionedSequential` for example. The
            condition is a :class:`~fastvae.nn.Condition`.
        decoder: gives, for ``(z, condition)``, what ``likelihood`` takes.
        condition: embeds y: :class:`~fastvae.nn.ClassCondition`, :class:`~fastvae.nn.VectorCondition` or
            :class:`~fastvae.nn.SequenceCondition`.
        latent_shape, options: see :class:`~fastvae.models.VAE`.
        drop_condition: probability in [0, 1).

    The ready-made networks take these options too:

    Args:
        num_classes: y is int64, from 0 to ``num_classes - 1``; 10 by default.
        conditioning: how y enters each hidden layer: ``"concatenation"``, ``"film"`` (the default), ``"batch_norm"`` or
            ``"cross_attention"``.
        condition_dim: size of the embedding of y, 32 by default.
        conditional_prior: whether p(z | y) is learned; ``False`` by default.
        condition: embeds a y of another kind, in place of ``num_classes`` and ``condition_dim``.
    """

    # A training hands the labels of a batch to the network.
    takes_labels: ClassVar[bool] = True

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        condition: ConditionEmbedding,
        latent_shape: int | Sequence[int] | None = None,
        *,
        drop_condition: float = 0.0,
        **options,
    ):
        super().__init__(encoder, decoder, latent_shape, **options)
        if isinstance(self.prior, VampPrior):
            raise ValueError("prior: got a VampPrior, whose pseudo-inputs have no condition, takes another one")
        if not 0 <= drop_condition < 1:
            raise ValueError(f"drop_condition: got {drop_condition!r}, takes a number in [0, 1)")
        self.condition, self.drop_condition = condition, float(drop_condition)
        self.no_condition = nn.Parameter(torch.randn(condition.dim)) if drop_condition else None

    @classmethod
    def _of_networks(
        cls: type[AnyCVAE],
        encoder: nn.Sequential,
        decoder: nn.Sequential,
        latent_dim: int,
        *,
        num_classes: int = 10,
        conditioning: Conditioning = "film",
        condition_dim: int = 32,
        conditional_prior: bool = False,
        condition: ConditionEmbedding | None = None,
        **options,
    ) -> AnyCVAE:
        """The model of networks without a condition.

        Args:
            num_classes, conditioning, condition_dim, conditional_prior, condition: see the class.
        """
        condition = ClassCondition(num_classes, condition_dim) if condition is None else condition
        if conditional_prior:
            options["prior"] = ConditionalPrior(latent_dim, condition.dim)
        options.update(cls._parts_of_condition(encoder, condition))
        sees_condition = partial(conditioned, conditioning=conditioning, condition_dim=condition.dim)
        return cls(sees_condition(encoder), sees_condition(decoder), condition, latent_dim, **options)

    @classmethod
    def _parts_of_condition(cls, encoder: nn.Sequential, condition: ConditionEmbedding) -> dict[str, nn.Module]:
        """Makes the parts that a subclass takes besides, by name."""
        return {}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, drop_condition={self.drop_condition}"

    def given(self, y: Any) -> VAE:
        """The VAE of p(x | y), which shares all modules: whatever takes a VAE takes it.

        Its batches have as many samples as there are conditions, or a multiple, through which the conditions go again and again.
        """
        return self._vae_at(self.embed(y))

    def _vae_at(self, condition: Condition) -> VAE:
        prior = PriorAt(self.prior, condition) if isinstance(self.prior, ConditionalPrior) else self.prior
        encoder, decoder = At(self.encoder, condition), At(self.decoder, condition)
        parts: dict[str, Any] = {"prior": prior, "posterior": self.posterior, "likelihood": self.likelihood}
        vae = VAE(encoder, decoder, free_bits=self.free_bits, num_samples=self.num_samples, **parts)
        vae.kl_penalty, vae.training = self.kl_penalty, self.training
        return vae

    def embed(self, y: Any, count: int | None = None) -> Condition:
        """The embedded conditions of a batch of ``count`` samples; one that stands for all where y is None."""
        if y is None and self.no_condition is not None:
            return Condition.of_vector(self.no_condition.unsqueeze(0))
        condition = self.condition(y)
        if count is not None and count != len(condition.vector):
            raise ValueError(f"y: got {len(condition.vector)} conditions, takes one for each of {count} samples")
        return condition

    def completed(self, x: Tensor, y: Any) -> Any:
        """The conditions of a batch that is read: those given. A model that can tell missing ones from x overrides it."""
        return y

    def _at_samples(self, x: Tensor, y: Any) -> VAE:
        """The VAE at the conditions of a batch."""
        return self._vae_at(self.embed(self.completed(x, y), len(x)))

    def _dropped(self, condition: Condition, generator: torch.Generator | None, seed: Tensor | int | None) -> Condition:
        """The conditions that a batch in training keeps."""
        if self.no_condition is None or not self.training:
            return condition
        zeros = condition.vector.new_zeros(len(condition.vector), dtype=torch.float32)
        # The noise of z has the seed itself.
        noise = FV.reparameterize(zeros, zeros, generator=generator, seed=None if seed is None else ~seed)
        return condition.replaced(torch.special.ndtr(noise) >= self.drop_condition, self.no_condition)

    def encode(self, x: Tensor, y: Any = None) -> Any:
        """The posterior q(z | x, y): ``(mu, logvar)`` by default, else a distribution with ``mean``."""
        return self._posterior_at(x, self.embed(self.completed(x, y), len(x)))

    def _posterior_at(self, x: Tensor, condition: Condition) -> Any:
        return self.posterior(call_at(self.encoder, as_float(x, self.encoder), condition))

    def decode(self, z: Tensor, y: Any = None) -> Tensor:
        """The decoder's output: the parameters of p(x | z, y)."""
        return call_at(self.decoder, z, self.embed(y, len(z)))

    def decode_mean(self, z: Tensor, y: Any = None) -> Tensor:
        """The mean of p(x | z, y)."""
        return self.likelihood.mean(self.decode(z, y))

    def _prior_at(self, q: Any, condition: Condition) -> Any:
        return self.prior(condition) if isinstance(self.prior, ConditionalPrior) else self.prior_distribution(q)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        y: Any = None,
        eps: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | int | None = None,
    ) -> Any:
        """The negative evidence lower bound on log p(x | y) of a batch.

        Args:
            x: data, ``(batch, ...)``; floating, or uint8, which means value / 255.
            y: the conditions, one a sample; None for a model with ``drop_condition`` alone.
            eps: the noise, in the shape of ``z``; drawn where it is not given, by ``generator`` or ``seed``, which also decide which
                conditions are dropped.
        """
        condition = self._dropped(self.embed(y, len(x)), generator, seed)
        q = self._posterior_at(x, condition)
        decode = partial(call_at, self.decoder, condition=condition)
        return self.bound(x, q, self._prior_at(q, condition), decode, eps=eps, generator=generator, seed=seed)

    @reading
    def sample(self, n: int, y: Any = None, generator: torch.Generator | None = None) -> Tensor:
        """The means of p(x | z, y) for ``n`` draws of z from the prior.

        Args:
            n: number of draws.
            y: the conditions, ``n`` of them, or fewer that are gone through again and again and whose number divides ``n``.
            generator: of the draws, on whose device they are made.
        """
        condition = self.embed(y)
        if n % len(condition.vector):
            raise ValueError(f"y: got {len(condition.vector)} conditions, takes a number of them that divides n, {n}")
        return self._vae_at(condition).sample(n, generator)

    @reading
    def reconstruct(self, x: Tensor, y: Any = None) -> Tensor:
        """The mean of p(x | z, y) at the posterior's mean of z, in the range of the data."""
        return self._at_samples(x, y).reconstruct(x)

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10, *, y: Any = None) -> Tensor:
        """Decodes ``steps`` points on the line between the posterior means of two batches, which are both encoded and decoded at y:
        ``(batch, steps, ...)``, both ends included."""
        return self._at_samples(start, y).interpolate(start, end, steps)

    @reading
    def log_prob_bound(
        self, x: Tensor, num_samples: int = 1, *, y: Any = None, samples_at_once: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """The importance-weighted lower bound on log p(x | y) of each sample in nats, ``(batch,)``; see
        :meth:`fastvae.models.VAE.log_prob_bound`."""
        return self._at_samples(x, y).log_prob_bound(x, num_samples, samples_at_once=samples_at_once, generator=generator)

    @reading
    def anomaly_score(self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None, *, y: Any = None) -> Tensor:
        """The negative evidence lower bound on log p(x | y) of each sample; see :meth:`fastvae.models.VAE.anomaly_score`."""
        return self._at_samples(x, y).anomaly_score(x, num_samples, generator)
