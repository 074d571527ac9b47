"""Functions of any autoencoder's latent, whatever its class: they serve pictures, files and curves.

``labels`` are those of the samples, one tensor, where the network takes labels; nothing otherwise.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.models import AE, SequenceVAE
from fastvae.models._line import points_between
from fastvae.nn import ClassCondition
from fastvae.training.errors import TrainingError
from fastvae.training.module import LitAutoencoder


@contextmanager
def looking(lit: LitAutoencoder) -> Iterator[Any]:
    """The network in evaluation mode and without gradients; its modules have their modes back afterwards."""
    training = [module for module in lit.modules() if module.training]
    lit.eval()
    try:
        with torch.no_grad():
            yield lit.network
    finally:
        for module in training:
            module.training = True


def encode(lit: LitAutoencoder, x: Tensor, *labels: Tensor) -> tuple[Tensor, ...]:
    """The latents of a batch: the means of a VAE, the codes of an AE, the indices of a VQ-VAE, one tensor a level."""
    with looking(lit) as network:
        encoded = network.encode(lit.preprocessing(x), *labels)
    levels = [encoded] if isinstance(encoded, Tensor) or hasattr(encoded, "mean") else encoded
    return tuple(level if isinstance(level, Tensor) else level.mean for level in levels)


def decode(lit: LitAutoencoder, z: Tensor | Sequence[Tensor], *labels: Tensor) -> Tensor:
    """Data from continuous latents, in the units of the training data; a hierarchy takes a sequence of levels, or its top
    alone; sequences are as long as those of the training."""
    with looking(lit) as network:
        if isinstance(network, SequenceVAE):
            assert lit.sample_shape is not None, "the training comes first"
            return network.generate(z, lit.sample_shape[0])
        decoded = network.decode_mean(z, *labels) if hasattr(network, "decode_mean") else network.decode(z)
    return lit.preprocessing.inverse(decoded)


def reconstruct(lit: LitAutoencoder, x: Tensor, *labels: Tensor) -> Tensor:
    """The reconstructions of a batch, in the units of the training data."""
    with looking(lit) as network:
        return lit.preprocessing.inverse(network.reconstruct(lit.preprocessing(x), *labels))


def is_continuous(network: nn.Module) -> bool:
    """Whether one may walk in its latent: a codebook has nothing between two codes."""
    return isinstance(network, AE) or hasattr(network, "interpolate")


def check_continuous(network: nn.Module, what: str) -> None:
    if not is_continuous(network):
        raise TrainingError(f"{what}: {type(network).__name__} has a discrete latent, takes an AE or a VAE")


def can_sample(network: nn.Module) -> bool:
    """Whether the network has a prior, and knows the shape of its latent."""
    return _has_prior(network) and getattr(network, "latent_shape", ()) is not None


def _has_prior(network: nn.Module) -> bool:
    return hasattr(network, "sample")


def sample(lit: LitAutoencoder, count: int, seed: int, *labels: Tensor) -> Tensor:
    """Means of p(x | z) for draws from the prior; of a sequence VAE draws of p(x | z)."""
    network: Any = lit.network
    if not _has_prior(network):
        raise TrainingError(f"sample: {type(network).__name__} has no prior to draw from, takes a VAE")
    if not can_sample(network):
        raise TrainingError(f"sample: this {type(network).__name__} does not know the shape of its latent, takes one with image_size")
    return lit.preprocessing.inverse(network.sample(count, *labels, generator=torch.Generator().manual_seed(seed)))


def rows_of_classes(network: nn.Module, columns: int, classes: Sequence[int] | None = None) -> tuple[Tensor, ...]:
    """The labels of a grid of samples with a row for each class, of all of them by default; nothing for a network without classes."""
    condition = getattr(network, "condition", None)
    if not isinstance(condition, ClassCondition):
        if classes is not None:
            raise TrainingError(f"labels: got {list(classes)} for {type(network).__name__}, takes a network with classes")
        return ()
    chosen = range(condition.num_classes) if classes is None else classes
    if not chosen or not all(0 <= label < condition.num_classes for label in chosen):
        raise TrainingError(f"labels: got {list(chosen)}, takes classes from 0 to {condition.num_classes - 1}")
    return (torch.tensor(list(chosen), device=condition.embedding.weight.device).repeat_interleave(columns),)


def completed(lit: LitAutoencoder, x: Tensor, labels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The labels, in which those that a network can tell from the samples are not missing."""
    with looking(lit) as network:
        return tuple(network.completed(lit.preprocessing(x), label) for label in labels)


def interpolate(
    lit: LitAutoencoder,
    start: Tensor,
    end: Tensor,
    steps: int,
    start_labels: tuple[Tensor, ...] = (),
    end_labels: tuple[Tensor, ...] = (),
) -> Tensor:
    """Decoded points on the lines between the latents of two batches, in all levels at once: ``(batch * steps, ...)``, the points of a line
    in succession. A point has the label of the end that is nearer."""
    check_continuous(lit.network, "interpolate")
    start_labels, end_labels = completed(lit, start, start_labels), completed(lit, end, end_labels)
    ends = zip(encode(lit, start, *start_labels), encode(lit, end, *end_labels), strict=True)
    path = [points_between(first, last, steps).flatten(0, 1) for first, last in ends]
    nearer = (torch.arange(steps) >= steps / 2).long()
    labels = (torch.stack(pair, dim=1)[:, nearer].flatten(0, 1) for pair in zip(start_labels, end_labels, strict=True))
    return decode(lit, path if len(path) > 1 else path[0], *labels)


def traverse(lit: LitAutoencoder, x: Tensor, dimensions: int, span: float, steps: int, *labels: Tensor) -> Tensor:
    """One sample with one latent dimension after the other set to values from ``-span`` to ``span``: ``(dimensions * steps, ...)``.

    The dimensions are those of the flattened latent, the first ``dimensions`` of them; of a hierarchy those of the top level, whose lower
    levels take the means of their priors.
    """
    check_continuous(lit.network, "traverse")
    labels = completed(lit, x[:1], tuple(label[:1] for label in labels))
    z = encode(lit, x[:1], *labels)[0]
    dimensions = min(dimensions, z[0].numel())
    path = z.flatten(1).repeat(dimensions * steps, 1).unflatten(0, (dimensions, steps))
    values = torch.linspace(-span, span, steps, device=z.device, dtype=z.dtype)
    for dimension in range(dimensions):
        path[dimension, :, dimension] = values
    same = (label.repeat_interleave(dimensions * steps, dim=0) for label in labels)
    return decode(lit, path.flatten(0, 1).view(-1, *z.shape[1:]), *same)
