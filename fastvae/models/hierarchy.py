"""VAEs with several levels of latents: a bottom-up pass over the data, then one down the levels, shared by posterior and prior."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.divergence import sample_with_kl
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.names import likelihood_of
from fastvae.distributions.normal import DiagonalNormal
from fastvae.distributions.prior import check_count
from fastvae.functional._checks import check_nonnegative
from fastvae.models._hub import Pretrained
from fastvae.models._line import points_between
from fastvae.models._reading import reading
from fastvae.models._top_down import Draw, Level, TopDown, level_seed, repeated
from fastvae.models.bounds import importance_bound
from fastvae.nn import KLPenalty
from fastvae.nn.schedules import Schedule


@exportable
class HierarchyOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them; tuples have one entry a level, from the top.

    ``kl`` is without ``beta``, the sum of ``kls``; ``recon`` is what the decoder gave. ``mu`` and ``logvar`` are the posteriors', each
    given the ``z`` of the levels above.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    kls: tuple[Tensor, ...]
    recon: Tensor
    z: tuple[Tensor, ...]
    mu: tuple[Tensor, ...]
    logvar: tuple[Tensor, ...]


class HierarchicalVAE(TopDown, Pretrained):
    r"""A VAE of L levels, each with a learned prior and a posterior given the levels above.

    .. math:: -\mathbb{E}_q \log p(x | z) + \beta \sum_l \mathbb{E}_q KL(q(z_l | x, z_{>l}) \| p(z_l | z_{>l}))

    in nats per sample. All sequences of levels go from the top, whose z is drawn first, to the bottom, which is next to the data.

    :meth:`encode`, :meth:`decode` and :meth:`decode_mean` are parts of a call: differentiable, in the model's mode. The other methods read:
    they have no gradient and run as in evaluation mode.

    Args:
        encoder: the bottom-up pass, which gives a sequence with one tensor a level. It sees an 8-bit image as value / 255.
        levels: two or more.
        decoder: gives what ``likelihood`` takes for the state that the last level hands down.
        start: the state that the first level gets, without its batch; learned where it is a parameter.
        likelihood: p(x | z) of :mod:`fastvae.distributions`, or a name, see :class:`~fastvae.models.VAE`.
        beta: weight of the KL, a number or a schedule. ``model.kl_penalty.step()`` advances a schedule.
        free_bits: nats a latent dimension that are free (Kingma et al., *Improving Variational Inference with Inverse Autoregressive
            Flow*, 2016), one number for all levels or one each: of level l the loss has
            :math:`\sum_d \max(\lambda_l, \mathrm{mean}_b\, KL_{bd})`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        levels: Iterable[Level],
        decoder: nn.Module,
        start: Tensor,
        *,
        likelihood: LikelihoodName | Likelihood = "bernoulli_logits",
        beta: float | Schedule = 1.0,
        free_bits: float | Sequence[float] = 0.0,
    ):
        super().__init__(encoder, levels, decoder, start)
        self.likelihood = likelihood_of(likelihood)
        self.kl_penalty = KLPenalty(beta)
        self.free_bits = _free_bits_of_levels(free_bits, len(self.levels))

    def extra_repr(self) -> str:
        return f"free_bits={self.free_bits}"

    def encode(self, x: Tensor) -> tuple[DiagonalNormal, ...]:
        """The posterior of each level, given the means of those above."""
        steps, _ = self.infer(self.encoded(x), _mean)
        return tuple(step.q for step in steps)

    def decode(self, z: Tensor | Sequence[Tensor]) -> Tensor:
        """The decoder's output: the likelihood's parameters.

        Args:
            z: a tensor a level, from the top; a single tensor is that of the top. Levels that it lacks have the means of their priors.
        """
        given = self.check_levels("z", (z,) if isinstance(z, Tensor) else tuple(z), at_least=1)
        return self.generate(len(given[0]), given, lambda p: p.mu)[1]

    def decode_mean(self, z: Tensor | Sequence[Tensor]) -> Tensor:
        """The mean of p(x | z); see :meth:`decode` for the argument."""
        return self.likelihood.mean(self.decode(z))

    def forward(
        self,
        x: Tensor,
        eps: Sequence[Tensor] | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | int | None = None,
    ) -> HierarchyOutput:
        """The negative evidence lower bound of a batch.

        Args:
            x: data, ``(batch, ...)``; floating, or uint8, which means value / 255.
            eps: the noise, a tensor a level in the shape of its z; drawn where it is not given, by ``generator`` or ``seed``. Each level
                has a seed of its own, the first one ``seed`` itself.
        """
        eps = None if eps is None else self.check_levels("eps", tuple(eps), at_least=len(self.levels))

        def draw(index: int, q: DiagonalNormal, p: DiagonalNormal) -> tuple[Tensor, Tensor]:
            noise: dict[str, Any] = {"eps": None if eps is None else eps[index], "generator": generator, "seed": level_seed(seed, index, q)}
            return sample_with_kl(q, p, free_bits=self.free_bits[index], **noise)

        steps, recon = self.infer(self.encoded(x), draw)
        q, _, z, kls = zip(*steps, strict=True)
        recon_loss, kl = self.likelihood(recon, x), torch.stack(kls).sum()
        mu, logvar = zip(*q, strict=True)
        return HierarchyOutput(recon_loss + self.kl_penalty(kl), recon_loss, kl, kls, recon, z, mu, logvar)

    @reading
    def sample_latents(
        self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0, given: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """``n`` draws of z from the prior, a tensor a level; see :meth:`sample` for the arguments."""
        return self._sample(n, generator, temperature, given)[0]

    @reading
    def sample(self, n: int, generator: torch.Generator | None = None, *, temperature: float = 1.0, given: Sequence[Tensor] = ()) -> Tensor:
        """The means of p(x | z) for ``n`` draws of z from the prior.

        Args:
            n: number of samples.
            generator: of the draws.
            temperature: factor of the standard deviation of every prior; 0 gives their means.
            given: the z of the first levels, from the top, ``(n, ...)`` each; those below are drawn.
        """
        return self.likelihood.mean(self._sample(n, generator, temperature, given)[1])

    @reading
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x | z) at the posterior means of all levels, in the range of the data."""
        return self.likelihood.mean(self.infer(self.encoded(x), _mean)[1])

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10) -> Tensor:
        """Decodes ``steps`` points on the lines between the posterior means of two batches, in all levels at once: ``(batch, steps, ...)``,
        both ends included."""
        ends = zip(self.encode(start), self.encode(end), strict=True)
        path = tuple(points_between(first.mu, last.mu, steps).flatten(0, 1) for first, last in ends)
        return self.decode_mean(path).unflatten(0, (len(start), steps))

    @reading
    def anomaly_score(self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The negative evidence lower bound of each sample in nats, ``(batch,)``, with beta 1, averaged over ``num_samples`` of z."""

        def draw(index: int, q: DiagonalNormal, p: DiagonalNormal) -> tuple[Tensor, Tensor]:
            return sample_with_kl(q, p, reduction="sample", generator=generator)

        return -self._joint(x, check_count("num_samples", num_samples), draw).mean(0)

    def log_weights(self, x: Tensor, num_samples: int, *, generator: torch.Generator | None = None) -> Tensor:
        r""":math:`\log p(x | z) + \sum_l \log p(z_l | z_{>l}) - \log q(z_l | x, z_{>l})` for draws of the posteriors: ``(num_samples,
        batch)``, in nats, differentiable. All draws go down the levels as one batch."""

        def draw(index: int, q: DiagonalNormal, p: DiagonalNormal) -> tuple[Tensor, Tensor]:
            z, log_q = q.rsample_and_log_prob(generator=generator)
            return z, log_q - p.log_prob(z)

        return self._joint(x, num_samples, draw)

    @reading
    def log_prob_bound(
        self, x: Tensor, num_samples: int = 1, *, samples_at_once: int = 50, generator: torch.Generator | None = None
    ) -> Tensor:
        """The importance-weighted lower bound on log p(x) of each sample in nats, ``(batch,)``, with the weights of all levels together,
        see :func:`fastvae.models.bounds.importance_bound`."""
        return importance_bound(self, x, num_samples, samples_at_once=samples_at_once, generator=generator)

    def _sample(
        self, n: int, generator: torch.Generator | None, temperature: float, given: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        check_nonnegative("temperature", temperature)
        for z in self.check_levels("given", tuple(given), at_least=0):
            if len(z) != n:
                raise ValueError(f"given: got a batch of {len(z)}, takes one of n, {n}")
        return self.generate(n, given, lambda p: torch.lerp(p.mu, p.rsample(generator=generator), temperature))

    def _joint(self, x: Tensor, num_samples: int, draw: Draw) -> Tensor:
        """log p(x | z) minus the terms of all levels, ``(num_samples, batch)``."""
        steps, recon = self.infer(self.encoded(x), draw, num_samples)
        log_px = self.likelihood.log_prob(recon, repeated(x, num_samples))
        return (log_px - torch.stack([step.term for step in steps]).sum(0)).unflatten(0, (num_samples, len(x)))


def _mean(index: int, q: DiagonalNormal, p: DiagonalNormal) -> tuple[Tensor, None]:
    return q.mu, None


def _free_bits_of_levels(free_bits: float | Sequence[float], levels: int) -> tuple[float, ...]:
    """The free nats of each level."""
    numbers = (free_bits,) * levels if isinstance(free_bits, int | float) else tuple(free_bits)
    if len(numbers) != levels:
        raise ValueError(f"free_bits: got {len(numbers)} numbers, takes one, or one for each of {levels} levels")
    return tuple(check_nonnegative("free_bits", number) for number in numbers)
