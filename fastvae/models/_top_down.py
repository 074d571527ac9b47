"""The levels of a hierarchy of latents, and the passes up and down them."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae.distributions.normal import DiagonalNormal
from fastvae.models._inputs import as_float

# Seeds of successive levels differ by this, 2^64 over the golden ratio as a signed number (Steele et al., Fast Splittable Pseudorandom
# Number Generators, 2014), so that calls with successive seeds share no level's noise.
SEED_STEP = 0x9E3779B97F4A7C15 - 2**64


class Level(nn.Module):
    """One level of a hierarchy. ``state`` is what the levels above hand down, ``(batch, ...)``."""

    @abstractmethod
    def prior(self, state: Tensor) -> DiagonalNormal:
        """:math:`p(z_l | z_{>l})`."""

    @abstractmethod
    def posterior(self, state: Tensor, feature: Tensor, p: DiagonalNormal) -> DiagonalNormal:
        """:math:`q(z_l | x, z_{>l})`, of the prior's shape; ``feature`` is what the encoder gives for this level."""

    @abstractmethod
    def merge(self, state: Tensor, z: Tensor) -> Tensor:
        """The state that the next level gets, the decoder after the last."""


def split_normal(name: str, parameters: Tensor) -> DiagonalNormal:
    """The normal whose means and log variances are the halves of dimension 1; ``name`` is that of the network in the error."""
    if parameters.ndim < 2 or parameters.shape[1] % 2:
        raise ValueError(f"{name}: gave shape {tuple(parameters.shape)}, has to give mu and logvar, an even size in dimension 1")
    return DiagonalNormal(*parameters.chunk(2, dim=1))


Draw = Callable[[int, DiagonalNormal, DiagonalNormal], tuple[Tensor, Any]]


@exportable
class Step(NamedTuple):
    """A level on the way down: posterior, prior, z and what was computed of them."""

    q: DiagonalNormal
    p: DiagonalNormal
    z: Tensor
    term: Any


class TopDown(nn.Module):
    """The two passes of a hierarchy: up through the encoder, down through the levels.

    Args:
        encoder, levels, decoder, start: see :class:`~fastvae.models.HierarchicalVAE`.
    """

    start: Tensor

    def __init__(self, encoder: nn.Module, levels: Iterable[Level], decoder: nn.Module, start: Tensor):
        super().__init__()
        self.encoder = encoder
        self.levels = nn.ModuleList(levels)
        if len(self.levels) < 2:
            raise ValueError(f"levels: got {len(self.levels)}, takes at least 2")
        self.decoder = decoder
        if isinstance(start, nn.Parameter):
            self.start = start
        else:
            self.register_buffer("start", start, persistent=False)

    def encoded(self, x: Tensor) -> Sequence[Tensor]:
        """The encoder's output for each level."""
        features = self.encoder(as_float(x, self.encoder))
        if isinstance(features, Tensor) or len(features) != len(self.levels):
            count = 1 if isinstance(features, Tensor) else len(features)
            raise ValueError(f"encoder: gave {count} tensors, has to give one for each of {len(self.levels)} levels")
        return features

    def _levels(self) -> list[Level]:
        return cast("list[Level]", list(self.levels))

    def started(self, n: int) -> Tensor:
        """The state that the first level gets."""
        return self.start.expand(n, *self.start.shape)

    def infer(self, features: Sequence[Tensor], draw: Draw, num_samples: int = 1) -> tuple[list[Step], Tensor]:
        """Goes down the levels with z of the posteriors; gives the steps and the decoder's output.

        Args:
            features: what the encoder gives.
            draw: gives z and a term for the number of a level, its posterior and its prior.
            num_samples: draws for each sample, one after the other in the batch.
        """
        steps, state = [], self.started(num_samples * len(features[0]))
        for index, (level, feature) in enumerate(zip(self._levels(), features, strict=True)):
            p = level.prior(state)
            q = level.posterior(state, repeated(feature, num_samples), p)
            if q.mu.shape != p.mu.shape:
                raise ValueError(f"levels: level {index} has a posterior of {tuple(q.mu.shape)} and a prior of {tuple(p.mu.shape)}")
            z, term = draw(index, q, p)
            steps.append(Step(q, p, z, term))
            state = level.merge(state, z)
        return steps, self.decoder(state)

    def generate(self, n: int, given: Sequence[Tensor], draw: Callable[[DiagonalNormal], Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Goes down the levels with the z that are given, then with those that ``draw`` gives for a prior.

        Returns:
            The z of all levels, and the decoder's output.
        """
        z, state = list(given), self.started(n)
        for index, level in enumerate(self._levels()):
            if index == len(z):
                z.append(draw(level.prior(state)))
            state = level.merge(state, z[index])
        return tuple(z), self.decoder(state)

    def check_levels(self, name: str, tensors: tuple[Tensor, ...], *, at_least: int) -> tuple[Tensor, ...]:
        if not at_least <= len(tensors) <= len(self.levels):
            expected = f"{at_least} to {len(self.levels)}" if at_least < len(self.levels) else str(at_least)
            raise ValueError(f"{name}: got {len(tensors)} tensors, takes {expected}, one a level")
        return tensors


def level_seed(seed: Tensor | int | None, level: int, q: DiagonalNormal) -> Tensor | int | None:
    """The seed of a level's noise: ``seed + level * SEED_STEP``, modulo 2^64."""
    if seed is None or level == 0:
        return seed
    seed = seed if isinstance(seed, Tensor) else torch.full((), seed, dtype=torch.int64, device=q.mu.device)
    offset = level * SEED_STEP % 2**64
    return seed + (offset - 2**64 if offset >= 2**63 else offset)


def repeated(tensor: Tensor, times: int) -> Tensor:
    """A batch ``times`` times, one after the other."""
    return tensor if times == 1 else tensor.repeat(times, *(1,) * (tensor.ndim - 1))
