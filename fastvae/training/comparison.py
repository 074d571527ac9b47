"""The loss lines of a VAE in plain PyTorch and from this package, side by side."""

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae import functional as FV
from fastvae.models import VAE
from fastvae.training._measure import interleaved_medians, peak_memory


class LossLines(NamedTuple):
    """The lines of a training step that this package replaces."""

    latent: Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
    recon_loss: Callable[[Tensor, Tensor], Tensor]


def _plain_latent(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    std = torch.exp(0.5 * logvar)
    z = mu + std * (torch.randn_like(std) if eps is None else eps)
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp()) / len(mu)
    return z, kl


def _plain_recon_loss(logits: Tensor, x: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def _fused_latent(mu: Tensor, logvar: Tensor, eps: Tensor | None) -> tuple[Tensor, Tensor]:
    return FV.reparameterize_kl(mu, logvar, eps=eps)


def _fused_recon_loss(logits: Tensor, x: Tensor) -> Tensor:
    return FV.binary_cross_entropy_with_logits(logits, x, reduction="batchmean")


PLAIN = LossLines(_plain_latent, _plain_recon_loss)
FUSED = LossLines(_fused_latent, _fused_recon_loss)


def negative_elbo(model: VAE, lines: LossLines, x: Tensor, eps: Tensor | None = None) -> Tensor:
    """The loss of a batch in nats per sample; the noise is drawn where it is not given."""
    mu, logvar = model.encode(x)
    z, kl = lines.latent(mu, logvar, eps)
    return lines.recon_loss(model.decode(z), x) + kl


@dataclass
class Contender:
    """A model in training with one of the two kinds of loss lines."""

    model: VAE
    lines: LossLines
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def take_gradients(self, x: Tensor) -> None:
        negative_elbo(self.model, self.lines, x).backward()

    def step(self, x: Tensor, eps: Tensor | None) -> None:
        started = time.perf_counter()
        self.optimizer.zero_grad()
        loss = negative_elbo(self.model, self.lines, x, eps)
        loss.backward()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(loss.item())


def make_contenders(model: VAE, learning_rate: float) -> dict[str, Contender]:
    """A plain contender on a copy of the model, and a fused one on the model itself."""
    lines = {"plain": (deepcopy(model), PLAIN), "fastvae": (model, FUSED)}
    return {name: Contender(m, line, torch.optim.Adam(m.parameters(), lr=learning_rate)) for name, (m, line) in lines.items()}


def draw_noise(model: VAE, count: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise for one z a sample; the models of the demonstration know the shape of theirs."""
    return torch.randn(count, *cast("Sequence[int]", model.latent_shape), generator=generator)


def compare(contenders: dict[str, Contender], stream: Iterable[Tensor], seed: int) -> None:
    """Trains both on the same batches and the same noise."""
    generator = torch.Generator().manual_seed(seed)
    for step, x in enumerate(stream):
        eps = draw_noise(contenders["plain"].model, len(x), generator).to(x.dtype)
        # Whoever is second may find data in the cache.
        for name in ("plain", "fastvae") if step % 2 else ("fastvae", "plain"):
            contenders[name].step(x, eps)


def measure_step_memory(contenders: dict[str, Contender], x: Tensor) -> dict[str, int]:
    """Bytes that forward and backward hold at most, on top of the weights and the batch."""
    peaks = {}
    for name, contender in contenders.items():
        contender.optimizer.zero_grad()
        peaks[name] = peak_memory(partial(contender.take_gradients, x))
        contender.optimizer.zero_grad()
    return peaks


def relative_differences(contenders: dict[str, Contender]) -> list[float]:
    """Of the losses, step by step, for as long as both trained."""
    pairs = zip(contenders["plain"].losses, contenders["fastvae"].losses, strict=False)
    return [abs(plain - fused) / abs(plain) for plain, fused in pairs]


def measure_loss_lines(x: Tensor, latent_dim: int, rounds: int = 300) -> dict[str, dict[str, float]]:
    """Median time and peak memory of the loss lines alone for a batch: forward and backward, the noise drawn by each in its own way."""
    mu, logvar, grad_z = (torch.randn(len(x), latent_dim) for _ in range(3))
    leaves = [t.requires_grad_() for t in (mu, 0.1 * logvar, torch.randn_like(x))]

    def run(lines: LossLines) -> None:
        z, kl = lines.latent(leaves[0], leaves[1], None)
        loss = lines.recon_loss(leaves[2], x) + kl
        torch.autograd.backward((loss, z), (None, grad_z))
        for leaf in leaves:
            leaf.grad = None

    calls = {"plain": lambda: run(PLAIN), "fastvae": lambda: run(FUSED)}
    return {
        "median_seconds": interleaved_medians(calls, rounds),
        "peak_bytes": {name: peak_memory(call) for name, call in calls.items()},
    }
