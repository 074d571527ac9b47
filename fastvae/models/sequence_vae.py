"""The VAE of sequences of tokens (Bowman et al., *Generating Sentences from a Continuous Space*, 2016)."""

import math
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae._types import Initialisation, RecurrentCell
from fastvae.functional._checks import check_nonnegative
from fastvae.models._drawing import check_drawing, draw
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import parameter_dtype
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
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


class SequenceVAE(nn.Module, Pretrained):
    r"""A VAE whose decoder writes a sequence token by token, each given the code and the tokens before it.

    .. math:: -\mathbb{E}_{q(z|x)} \sum_t \log p(x_t \mid z, x_{<t}) + \beta\, KL(q(z|x) \| N(0, I))

    in nats per sequence. A batch is ``(batch, length)`` of integers: each row the words, the token of the end, then padding, which counts
    for nothing. Such a decoder can do without ``z``. Two means make it use ``z``: in training mode words that the decoder is given are
    replaced with the unknown token at random, and the weight of the KL rises from 0, ``beta=LinearSchedule(...)``.

    A call samples ``z`` in training and in evaluation mode. :meth:`encode` and :meth:`decode` are parts of a call; the other methods read:
    they have no gradient and run as in evaluation mode.

    Args:
        encoder: from tokens to ``(batch, 2 * latent_dim)``, mean and log variance; see :class:`fastvae.models.networks.TokenEncoder`.
        decoder: has ``decoder(z, tokens)``, ``start`` and ``step`` as :class:`fastvae.models.networks.TokenDecoder` has.
        latent_dim: size of ``z``.
        pad, begin, end, unknown: the tokens of padding, of the beginning, which no batch holds, of the end, and of words that are not
            known.
        word_dropout: share of the words that the decoder is not given in training, in [0, 1].
        beta, capacity, free_bits: see :class:`fastvae.models.VAE`.
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
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim
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
        encoder = TokenEncoder(num_tokens, embedding, hidden, 2 * latent_dim, cell=cell, pad=pad, layers=layers)
        decoder = TokenDecoder(num_tokens, embedding, hidden, latent_dim, cell=cell, layers=layers)
        return cls(encoder, decoder, latent_dim, pad=pad, **options)

    def extra_repr(self) -> str:
        return f"latent_dim={self.latent_dim}, word_dropout={self.word_dropout}, free_bits={self.free_bits}"

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``(mu, logvar)`` of the posterior, ``(batch, latent_dim)`` each."""
        if tokens.ndim != 2 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise ValueError(f"tokens: got {tokens.dtype} of shape {tuple(tokens.shape)}, takes integers of shape (batch, length)")
        encoded = self.encoder(tokens)
        if encoded.shape[1:] != (2 * self.latent_dim,):
            raise ValueError(f"encoder: gave shape {tuple(encoded.shape)}, has to give (batch, {2 * self.latent_dim})")
        mu, logvar = encoded.chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor, tokens: Tensor) -> Tensor:
        """The logits of each token, given ``z`` and the tokens before it: ``(batch, length, num_tokens)``."""
        begin = tokens.new_full((len(tokens), 1), self.begin)
        return self.decoder(z, torch.cat([begin, tokens[:, :-1]], dim=1))

    def forward(self, tokens: Tensor, eps: Tensor | None = None, generator: torch.Generator | None = None) -> SequenceVAEOutput:
        """The negative evidence lower bound of a batch.

        Args:
            tokens: integers, ``(batch, length)``, padded at the end; one that is not below ``num_tokens`` is an error of the embedding.
            eps: the noise, in the shape of ``z``; drawn where it is not given.
            generator: draws the noise and the words that are dropped, on the device of ``tokens``.
        """
        mu, logvar = self.encode(tokens)
        z, kl = FV.reparameterize_kl(mu, logvar, free_bits=self.free_bits, eps=eps, generator=generator if eps is None else None)
        logits = self.decode(z, self._without_some_words(tokens, generator))
        recon_loss = self._nats(logits, tokens).mean()
        return SequenceVAEOutput(recon_loss + self.kl_penalty(kl), recon_loss, kl, logits, z, mu, logvar)

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
    def log_prob_bound(self, tokens: Tensor, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """The importance-weighted bound of log p(x) in nats, ``(batch,)`` (Burda et al., 2016): the evidence lower bound with one sample of
        ``z``, closer to log p(x) the more there are."""
        if num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples}, takes an integer >= 1")
        mu, logvar = self.encode(tokens)
        z = FV.reparameterize(mu, logvar, num_samples=num_samples, generator=generator)
        noise = (z - mu) * (-0.5 * logvar).exp()
        log_ratio = 0.5 * (noise.square() - z.square() + logvar).sum(-1)
        repeated = tokens.repeat(num_samples, 1)
        nats = self._nats(self.decode(z.flatten(0, 1), repeated), repeated).view(num_samples, -1)
        return (log_ratio - nats).logsumexp(0) - math.log(num_samples)

    @reading
    def generate(self, z: Tensor, max_length: int = 32, *, temperature: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """Writes a sequence for each ``z``: ``(batch, max_length)``, int64, padding behind the token of the end.

        Args:
            z: ``(batch, latent_dim)``.
            max_length: tokens; a sequence that is longer is cut.
            temperature: 0 takes the most probable token at each step, 1 draws from the model's probabilities.
            generator: decides the draws; one of the CPU serves every device.
        """
        check_drawing(temperature)
        if max_length < 1:
            raise ValueError(f"max_length: got {max_length}, takes an integer >= 1")
        decoder = cast("Any", self.decoder)
        token = torch.full((len(z),), self.begin, dtype=torch.int64, device=z.device)
        ended, state, written = torch.zeros_like(token, dtype=torch.bool), decoder.start(z), []
        for _ in range(max_length):
            logits, state = decoder.step(z, token, state)
            token = draw(self._writable(logits), generator, temperature).masked_fill(ended, self.pad)
            ended = ended | (token == self.end)
            written.append(token)
        return torch.stack(written, dim=1)

    def _writable(self, logits: Tensor) -> Tensor:
        """Padding and the beginning are no words; a model that has not been trained on them gives them some probability."""
        return logits.index_fill(1, torch.tensor([self.pad, self.begin], device=logits.device), -torch.inf)

    @reading
    def sample(self, n: int, max_length: int = 32, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Sequences for ``n`` draws of ``z`` from the prior, ``(n, max_length)``; see :meth:`generate`."""
        like = next(self.parameters())
        device = like.device if generator is None else generator.device
        z = torch.randn(n, self.latent_dim, generator=generator, device=device, dtype=parameter_dtype(self.decoder)).to(like.device)
        return self.generate(z, max_length, temperature=temperature, generator=generator)

    @reading
    def reconstruct(self, tokens: Tensor) -> Tensor:
        """The most probable tokens, one after the other, at the posterior's mean of ``z``: ``(batch, length)``."""
        return self.generate(self.encode(tokens)[0], max(tokens.shape[1], 1))

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10, max_length: int = 32) -> Tensor:
        """The most probable tokens at ``steps`` points on the line between the posterior means of two batches, both ends included:
        ``(batch, steps, max_length)``."""
        first, last = self.encode(start)[0], self.encode(end)[0]
        weights = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype).view(-1, 1)
        path = torch.lerp(first.unsqueeze(1), last.unsqueeze(1), weights)
        return self.generate(path.flatten(0, 1), max_length).unflatten(0, path.shape[:2])
