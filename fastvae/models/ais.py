"""Annealed importance sampling of log p(x) (Wu et al., *On the Quantitative Analysis of Decoder-Based Generative Models*, 2017)."""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastvae._pytree import exportable
from fastvae.distributions.normal import draw_noise, sum_latent, widened
from fastvae.distributions.prior import check_count
from fastvae.models._inputs import parameter_dtype
from fastvae.models._reading import reading
from fastvae.models.bounds import log_mean_weights

if TYPE_CHECKING:
    from fastvae.models.vae import VAE

# Leapfrog steps are as long as that this share of the proposals is accepted (Neal, *MCMC Using Hamiltonian Dynamics*, 2011: 0.65 is best).
TARGET_ACCEPTANCE = 0.65
ADAPTATION_RATE = 0.2
PILOT_CHAINS = 4
# The slope of the annealing schedule, as in the paper's experiments.
SIGMOID_SLOPE = 4.0


@reading
def log_prob_ais(
    model: "VAE",
    x: Tensor,
    num_chains: int = 16,
    num_steps: int = 500,
    leapfrog_steps: int = 10,
    *,
    step_size: float = 0.1,
    chains_at_once: int = 16,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""An estimate of log p(x) of each sample in nats, ``(batch,)``, that does not depend on the posterior.

    Chains start at the prior and pass through :math:`p_t(z) \propto p(z)\, p(x | z)^{\beta_t}`, each left invariant by a Hamiltonian
    transition. The mean of the weights :math:`w = \prod_t p(x | z_{t-1})^{\beta_t - \beta_{t-1}}` over chains is unbiased for p(x), so
    the expectation of its logarithm is a lower bound, which rises to log p(x) with ``num_chains`` and ``num_steps``.

    Pilot chains adapt the step size for each x and t. The chains that are weighed use these sizes unchanged: a chain that adapts to its own
    path would be biased.

    Args:
        model: a VAE without a condition, with any prior and any likelihood that is differentiable in z.
        x: data, ``(batch, ...)``.
        num_chains: chains for each x.
        num_steps: distributions from the prior to the posterior; one is importance sampling from the prior.
        leapfrog_steps: of each transition; each is one forward and backward pass through the decoder.
        step_size: of the first leapfrog step.
        chains_at_once: how many chains of each x go through the decoder as one batch, which bounds the memory.
        generator: of all noise.

    Raises:
        ValueError: for a number that is not positive.
    """
    counts = {"num_chains": num_chains, "num_steps": num_steps, "leapfrog_steps": leapfrog_steps, "chains_at_once": chains_at_once}
    for name, count in counts.items():
        check_count(name, count)
    if not step_size > 0:
        raise ValueError(f"step_size: got {step_size!r}, takes a number > 0")
    chains = Chains(model, x, leapfrog_steps, generator)
    betas = annealing_schedule(num_steps)
    steps = chains.pilot(min(num_chains, PILOT_CHAINS), betas, step_size)
    return log_mean_weights(lambda count: chains.log_weights(count, betas, steps), num_chains, chains_at_once)


def annealing_schedule(num_steps: int) -> list[float]:
    """``num_steps + 1`` numbers that rise from 0 to 1 along a sigmoid: slowly where p(x | z) begins to count, and at the end."""
    curve = torch.linspace(-SIGMOID_SLOPE, SIGMOID_SLOPE, num_steps + 1, dtype=torch.float64).sigmoid()
    return ((curve - curve[0]) / (curve[-1] - curve[0])).tolist()


@exportable
class Point(NamedTuple):
    """The place of each chain, ``(chains, batch, *latent_shape)``, its log densities, ``(chains, batch)``, and their gradients there."""

    z: Tensor
    log_prior: Tensor
    log_likelihood: Tensor
    grad_prior: Tensor
    grad_likelihood: Tensor

    def log_density(self, beta: float) -> Tensor:
        return self.log_prior + beta * self.log_likelihood

    def gradient(self, beta: float) -> Tensor:
        return self.grad_prior + beta * self.grad_likelihood


class Chains:
    """Several chains for each sample of a batch, which pass through the decoder as one batch.

    Args:
        model, x, leapfrog_steps, generator: see :func:`log_prob_ais`.
    """

    def __init__(self, model: "VAE", x: Tensor, leapfrog_steps: int, generator: torch.Generator | None):
        self.model, self.x, self.leapfrog_steps, self.generator = model, x, leapfrog_steps, generator
        self.prior = model.prior_distribution(model.encode(x))
        self.dtype = parameter_dtype(model.decoder)

    def pilot(self, count: int, betas: list[float], step_size: float) -> list[Tensor]:
        """The step size of each transition and sample, ``(batch,)`` each, at which the target share of proposals is accepted."""
        point, steps = self._start(count), []
        step = point.z.new_full((len(self.x),), step_size)
        for beta in betas[1:-1]:
            steps.append(step)
            point, acceptance = self._transition(point, beta, step)
            step = step * torch.exp(ADAPTATION_RATE * (acceptance.mean(0) - TARGET_ACCEPTANCE))
        return steps

    def log_weights(self, count: int, betas: list[float], steps: list[Tensor]) -> Tensor:
        """log w of ``count`` chains for each sample, ``(count, batch)``."""
        point = self._start(count)
        total = (betas[1] - betas[0]) * point.log_likelihood
        for beta, next_beta, step in zip(betas[1:-1], betas[2:], steps, strict=True):
            point, _ = self._transition(point, beta, step)
            total = total + (next_beta - beta) * point.log_likelihood
        return total

    def _start(self, count: int) -> Point:
        z = self.prior.sample(count * len(self.x), self.generator)
        return self._evaluate(widened(z).unflatten(0, (count, len(self.x))))

    def _evaluate(self, z: Tensor) -> Point:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            recon = self.model.decode_samples(z.to(self.dtype), len(z))
            log_likelihood = -self.model.recon_loss(recon, self.x, len(z), "sample")
            log_prior = self.prior.log_prob(z)
            gradients = [torch.autograd.grad(density.sum(), z)[0] for density in (log_prior, log_likelihood)]
        return Point(z.detach(), log_prior.detach(), log_likelihood.detach(), *gradients)

    def _transition(self, start: Point, beta: float, step: Tensor) -> tuple[Point, Tensor]:
        """A Hamiltonian transition that leaves p(z) p(x | z)^beta invariant: the next place, and the probability of acceptance."""
        latent_ndim = start.z.ndim - 2
        momentum = draw_noise(len(start.z), start.z[0], self.generator)
        end, end_momentum = self._leapfrog(start, momentum, beta, step.view(-1, *(1,) * latent_ndim))
        energies = [
            0.5 * sum_latent(p.square(), latent_ndim) - point.log_density(beta) for point, p in ((start, momentum), (end, end_momentum))
        ]
        acceptance = torch.exp(energies[0] - energies[1]).clamp(max=1)
        # A trajectory that diverges ends at NaN, which is not accepted.
        acceptance = torch.where(acceptance.isnan(), 0.0, acceptance)
        accepted = self._uniform(acceptance) < acceptance
        return Point(*(_choose(accepted, new, old) for new, old in zip(end, start, strict=True))), acceptance

    def _leapfrog(self, point: Point, momentum: Tensor, beta: float, step: Tensor) -> tuple[Point, Tensor]:
        momentum = momentum + 0.5 * step * point.gradient(beta)
        for index in range(self.leapfrog_steps):
            point = self._evaluate(point.z + step * momentum)
            share = 1.0 if index < self.leapfrog_steps - 1 else 0.5
            momentum = momentum + share * step * point.gradient(beta)
        return point, momentum

    def _uniform(self, like: Tensor) -> Tensor:
        device = like.device if self.generator is None else self.generator.device
        return torch.rand(like.shape, generator=self.generator, device=device, dtype=like.dtype).to(like.device)


def _choose(accepted: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accepted.view(*accepted.shape, *(1,) * (new.ndim - 2)), new, old)
