"""How a VAE of sequences writes them, token by token."""

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvae.distributions.prior import Prior, check_count
from fastvae.models._drawing import check_drawing, draw
from fastvae.models._inputs import parameter_dtype
from fastvae.models._line import points_between
from fastvae.models._reading import reading


class SequenceWriting:
    """The methods that write sequences for codes. A VAE of sequences inherits them beside its objective."""

    decoder: nn.Module
    prior: Prior
    pad: int
    begin: int
    end: int

    @abstractmethod
    def encode(self, tokens: Tensor) -> Any:
        """The posterior, a distribution with ``mean``."""

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
        check_count("max_length", max_length)
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
        z = self.prior(self.encode).sample(n, generator).to(parameter_dtype(self.decoder))
        return self.generate(z, max_length, temperature=temperature, generator=generator)

    @reading
    def reconstruct(self, tokens: Tensor) -> Tensor:
        """The most probable tokens, one after the other, at the posterior's mean of ``z``: ``(batch, length)``."""
        return self.generate(self.encode(tokens).mean, tokens.shape[1])

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10, max_length: int = 32) -> Tensor:
        """The most probable tokens at ``steps`` points on the line between the posterior means of two batches, both ends included:
        ``(batch, steps, max_length)``."""
        path = points_between(self.encode(start).mean, self.encode(end).mean, steps)
        return self.generate(path.flatten(0, 1), max_length).unflatten(0, path.shape[:2])
