"""The loss lines of a VAE in plain PyTorch and from this package, side by side."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae import functional as FV
from fastvae.models import VAE


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
    mu, logvar = map(_widened, model.encode(x))
    z, kl = lines.latent(mu, logvar, eps)
    return lines.recon_loss(_widened(model.decode(z)), x) + kl


def _widened(tensor: Tensor) -> Tensor:
    """In float32 what autocast left in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass
class Contender:
    """A model in training with one of the two kinds of loss lines, and the loss of each step."""

    model: VAE
    lines: LossLines
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)

    def step(self, x: Tensor, eps: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = negative_elbo(self.model, self.lines, x, eps)
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())


def compare(model: VAE, batches: Iterable[Tensor], seed: int, learning_rate: float = 1e-3) -> dict[str, Contender]:
    """Trains two copies of a model, ``"plain"`` and ``"fastvae"``, in float64 on the same batches and the same noise.

    In float32 Adam turns the rounding of a gradient that is nearly 0 into a step of full size, so that two trainings drift apart from their
    first rounding difference on. In float64 equal formulas stay equal.
    """
    contenders = {}
    for name, lines in (("plain", PLAIN), ("fastvae", FUSED)):
        copy = deepcopy(model).double()
        contenders[name] = Contender(copy, lines, torch.optim.Adam(copy.parameters(), lr=learning_rate))
    generator = torch.Generator().manual_seed(seed)
    for x in batches:
        eps = draw_noise(model, len(x), generator).double()
        for contender in contenders.values():
            contender.step(x.double() / 255, eps)
    return contenders


def draw_noise(model: VAE, count: int, generator: torch.Generator) -> Tensor:
    """Standard normal noise for one z a sample; the models of the demonstration know the shape of theirs."""
    return torch.randn(count, *cast("Sequence[int]", model.latent_shape), generator=generator)


def relative_differences(contenders: dict[str, Contender]) -> list[float]:
    """The relative differences of the two contenders' losses, step by step."""
    pairs = zip(contenders["plain"].losses, contenders["fastvae"].losses, strict=True)
    return [abs(plain - fused) / abs(plain) for plain, fused in pairs]
