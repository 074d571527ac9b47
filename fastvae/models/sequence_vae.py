"""The VAE of sequences of tokens (Bowman et al., *Generating Sentences from a Continuous Space*, 2016)."""

import functools
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import Initialisation, RecurrentCell
from fastvae.distributions.divergence import sample_with_kl
from fastvae.distributions.posterior import DiagonalPosterior, Posterior
from fastvae.distributions.prior import Prior, StandardPrior
from fastvae.functional._checks import check_nonnegative
from fastvae.models._hub import Pretrained
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.models._sequence_writing import SequenceWriting
from fastvae.models.bounds import log_mean_weights
from fastvae.models.networks import Layers, TokenDecoder, TokenEncoder
from fastvae.nn import KLPenalty
from fastvae.nn.schedules import Schedule
from fastvae.ops._results import accumulation_dtype


@exportable
class SequenceVAEOutput(NamedTuple):
    """The terms of the loss in nats per sequence, and the tensors behind them; ``recon`` are logits, ``(batch, length, num_tokens)``."""

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


AnySequenceVAE = TypeVar("AnySequenceVAE", bound="SequenceVAE")


class SequenceVAE(SequenceWriting, nn.Module, Pretrained):
    r"""A VAE whose decoder writes a sequence token by token, each given the code and the tokens before it.

    .. math:: -\mathbb{E}_{q(z|x)} \sum_t \log p(x_t \mid z, x_{<t}) + \beta\, KL(q(z|x) \| p(z))

    in nats per sequence. A batch is ``(batch, length)`` of integers: each row the words, the token of the end, then padding, which counts
    for nothing. Such a decoder can do without ``z``. Two means make it use ``z``: in training mode words that the decoder is given are
    replaced with the unknown token at random, and the weight of the KL rises from 0, ``beta=LinearSchedule(...)``.

    A call samples ``z`` in training and in evaluation mode. :meth:`encode` and :meth:`decode` are parts of a call; the other methods read:
    they have no gradient and run as in evaluation mode.

    Args:
        encoder: from tokens to what ``posterior`` takes; see :class:`fastvae.models.networks.TokenEncoder`.
        decoder: has ``decoder(z, tokens)``, ``start`` and ``step`` as :class:`fastvae.models.networks.TokenDecoder` has.
        latent_dim: size of ``z``.
        pad, begin, end, unknown: the tokens of padding, of the beginning, which no batch holds, of the end, and of words that are not
            known.
        word_dropout: share of the words that the decoder is not given in training, in [0, 1].
        prior, posterior, beta, capacity, free_bits: see :class:`fastvae.models.VAE`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        *,
        pad: int = 0,
        begin: int = 1,
        end: int = 2,
        unknown: int = 3,
        word_dropout: float = 0.25,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        beta: float | Schedule = 1.0,
        capacity: float | Schedule | None = None,
        free_bits: float = 0.0,
    ):
        super().__init__()
        special = (pad, begin, end, unknown)
        if len(set(special)) < 4 or min(special) < 0:
            raise ValueError(f"pad, begin, end, unknown: got {special}, takes four different integers >= 0")
        if not 0 <= word_dropout <= 1:
            raise ValueError(f"word_dropout: got {word_dropout!r}, takes a number in [0, 1]")
        self.encoder, self.decoder = encoder, decoder
        self.prior = StandardPrior(latent_dim) if prior is None else prior
        self.posterior = DiagonalPosterior() if posterior is None else posterior
        if self.prior.latent_shape != (latent_dim,):
            raise ValueError(f"latent_dim: got {latent_dim}, the prior is of {self.prior.latent_shape}")
        self.pad, self.begin, self.end, self.unknown = special
        self.word_dropout = float(word_dropout)
        self.kl_penalty = KLPenalty(beta, capacity)
        self.free_bits = check_nonnegative("free_bits", free_bits)

    @classmethod
    @ready_made
    def recurrent(
        cls: type[AnySequenceVAE],
        num_tokens: int,
        latent_dim: int = 16,
        embedding: int = 64,
        hidden: int = 128,
        *,
        cell: RecurrentCell = "gru",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        pad: int = 0,
        **options,
    ) -> AnySequenceVAE:
        """The paper's network: a recurrent network of one layer each way.

        Args:
            num_tokens: size of the vocabulary, the special tokens among them.
            latent_dim: size of ``z``.
            embedding, hidden: units of a token and of the recurrent networks.
            cell: ``"gru"`` or ``"lstm"``.
            init, dropout, spectral_norm: of the linear layers, see :class:`fastvae.models.networks.Layers`; dropout acts on embeddings too.
            pad, options: those of the class.
        """
        layers = Layers("tanh", init, dropout, spectral_norm)
        posterior: Posterior = options.get("posterior") or DiagonalPosterior()
        encoder = TokenEncoder(num_tokens, embedding, hidden, posterior.parameters_for(latent_dim), cell=cell, pad=pad, layers=layers)
        decoder = TokenDecoder(num_tokens, embedding, hidden, latent_dim, cell=cell, layers=layers)
        return cls(encoder, decoder, latent_dim, pad=pad, **options)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one ``z``."""
        return self.prior.latent_shape

    def extra_repr(self) -> str:
        return f"latent_shape={self.latent_shape}, word_dropout={self.word_dropout}, free_bits={self.free_bits}"

    def encode(self, tokens: Tensor) -> Any:
        """The posterior: ``(mu, logvar)`` by default, else a distribution with ``mean``."""
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, takes integers of shape (batch, length)")
        return self.posterior(self.encoder(tokens))

    def decode(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The logits of each token, given ``z`` and the tokens before it: ``(batch, length, num_tokens)``."""
        begin = tokens.new_full((len(tokens), 1), self.begin)
        return self.decoder(z, torch.cat([begin, tokens[:, :-1]], dim=1))

    def forward(self, tokens: Tensor, eps: Tensor | None = None, *, generator: torch.Generator | None = None) -> SequenceVAEOutput:
        """The negative evidence lower bound of a batch.

        Args:
            tokens: integers, ``(batch, length)``, padded at the end; one that is not below ``num_tokens`` is an error of the embedding.
            eps: the noise, in the shape of ``z``; drawn where it is not given.
            generator: draws the noise and the words that are dropped, on the device of ``tokens``.
        """
        q = self.encode(tokens)
        noise: dict[str, Any] = {"generator": generator} if eps is None else {"eps": eps}
        z, kl = sample_with_kl(q, self.prior(self.encode), free_bits=self.free_bits, **noise)
        logits = self.decode(z, self._without_some_words(tokens, generator))
        recon_loss = self._nats(logits, tokens).mean()
        return SequenceVAEOutput(recon_loss + self.kl_penalty(kl), recon_loss, kl, logits, z, q.mu, q.logvar)

    def log_weights(self, tokens: Tensor, num_samples: int, **noise) -> Tensor:
        """:math:`\\log p(x|z_k) + \\log p(z_k) - \\log q(z_k|x)` for draws of the posterior: ``(num_samples, batch)``, in nats."""
        q = self.encode(tokens)
        z, log_q = q.rsample_and_log_prob(num_samples, **noise)
        repeated = tokens.repeat(num_samples, 1)
        nats = self._nats(self.decode(z.flatten(0, 1), repeated), repeated).view(num_samples, -1)
        return self.prior(self.encode).log_prob(z) - nats - log_q

    def _without_some_words(self, tokens: Tensor, generator: torch.Generator | None) -> Tensor:
        if not self.training or self.word_dropout == 0:
            return tokens
        dropped = torch.rand(tokens.shape, device=tokens.device, generator=generator) < self.word_dropout
        return tokens.masked_fill(dropped, self.unknown)

    def _nats(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """-log p(x | z) of each sequence."""
        logits = logits.to(accumulation_dtype(logits.dtype))
        return F.cross_entropy(logits.mT, tokens.long(), ignore_index=self.pad, reduction="none").sum(1)

    @reading
    def log_prob_bound(
        self, tokens: Tensor, num_samples: int = 1, *, samples_at_once: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """The importance-weighted lower bound on log p(x) of each sequence in nats, ``(batch,)``, see
        :func:`fastvae.models.bounds.importance_bound`; with one sample the evidence lower bound."""
        return log_mean_weights(functools.partial(self.log_weights, tokens, generator=generator), num_samples, samples_at_once)
