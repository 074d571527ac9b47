"""The training loop of the demonstration."""

import itertools
import statistics
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._extras import extra
from fastvae.models import VAE, VAEOutput
from fastvae.training.comparison import Contender, compare, draw_noise, make_contenders, relative_differences
from fastvae.training.data import Split

# The settings of the tutorial whose network VAE.conv is.
BATCH_SIZE = 128
LEARNING_RATE = 1e-3


@dataclass
class Training:
    """A model, how it is trained, and what came of it."""

    name: str
    model: VAE
    epochs: int
    compared_steps: int
    contenders: dict[str, Contender] = field(default_factory=dict)
    exact_contenders: dict[str, Contender] = field(default_factory=dict)
    test_losses: dict[int, float] = field(default_factory=dict)

    @property
    def losses(self) -> list[float]:
        """Of our own contender, step by step."""
        return self.contenders["fastvae"].losses

    def step_seconds(self) -> dict[str, float]:
        """Median over the compared steps, in which the two took turns."""
        return {name: statistics.median(c.seconds[: self.compared_steps]) for name, c in self.contenders.items()}

    def differences(self) -> dict[str, list[float]]:
        """Relative difference of the two losses in each of the compared steps."""
        return {"float32": relative_differences(self.contenders), "float64": relative_differences(self.exact_contenders)}


def as_floats(images: Tensor) -> Tensor:
    return images.float() / 255


def batch_size(count: int) -> int:
    return min(BATCH_SIZE, count)


def batches(images: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    """Full batches, shuffled anew in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = batch_size(len(images))
    for _ in range(epochs):
        shuffled = torch.randperm(len(images), generator=generator)
        for index in shuffled[: len(images) // size * size].split(size):
            yield images[index]


def train(training: Training, split: Split, seed: int) -> None:
    """Trains both contenders for the compared steps, then ours alone, which draws its own noise.

    The compared steps are done in float64 as well. In float32 Adam turns the rounding of a gradient that is nearly 0 into a step of full
    size, so that two float32 trainings drift apart from their first rounding difference on; in float64 equal formulas stay equal.
    """
    with extra("train"):
        from tqdm import tqdm
    torch.manual_seed(seed)
    images, test_images = as_floats(split.train_images), as_floats(split.test_images)
    steps_per_epoch = len(images) // batch_size(len(images))
    steps = training.epochs * steps_per_epoch
    compared = training.compared_steps = min(training.compared_steps, steps)

    training.exact_contenders = make_contenders(deepcopy(training.model).double(), LEARNING_RATE)
    stream = itertools.islice(batches(images.double(), training.epochs, seed), compared)
    if compared:
        compare(training.exact_contenders, tqdm(stream, desc=f"{training.name}, float64", total=compared, unit="step"), seed)

    training.contenders = make_contenders(training.model, LEARNING_RATE)
    progress = tqdm(batches(images, training.epochs, seed), desc=training.name, total=steps, unit="step")
    stream = iter(progress)
    compare(training.contenders, itertools.islice(stream, compared), seed)
    for step, x in enumerate(stream, start=compared + 1):
        training.contenders["fastvae"].step(x, eps=None)
        if step % steps_per_epoch == 0:
            training.test_losses[step] = bound(training.model, test_images, seed).loss.item()
            progress.set_postfix_str(f"test {training.test_losses[step]:.1f} nats")


@torch.no_grad()
def bound(model: VAE, x: Tensor, seed: int) -> VAEOutput:
    """The negative evidence lower bound with one sampled z an image, the same noise every time."""
    generator = torch.Generator().manual_seed(seed)
    return model(x, eps=draw_noise(model, len(x), generator))


@torch.no_grad()
def evaluate(model: VAE, images: Tensor, seed: int) -> dict[str, float]:
    """The terms of the bound in nats per sample, and the squared error per pixel."""
    x = as_floats(images)
    output = bound(model, x, seed)
    return {
        "elbo": -output.loss.item(),
        "recon_loss": output.recon_loss.item(),
        "kl": output.kl.item(),
        "mse_per_pixel_mean_z": F.mse_loss(model.reconstruct(x), x).item(),
        "mse_per_pixel_sampled_z": F.mse_loss(model.decode_mean(output.z), x).item(),
    }
