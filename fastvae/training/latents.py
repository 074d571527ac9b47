"""Functions of any autoencoder's latent, whatever its class: they serve pictures, files and curves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.models import AE, SequenceVAE
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


def encode(lit: LitAutoencoder, x: Tensor) -> tuple[Tensor, ...]:
    """The latents of a batch: the means of a VAE, the codes of an AE, the indices of a VQ-VAE, one tensor a level."""
    with looking(lit) as network:
        encoded = network.encode(lit.preprocessing(x))
    levels = [encoded] if isinstance(encoded, Tensor) or hasattr(encoded, "mean") else encoded
    return tuple(level if isinstance(level, Tensor) else level.mean for level in levels)


def decode(lit: LitAutoencoder, z: Tensor | Sequence[Tensor]) -> Tensor:
    """Data from continuous latents, in the units of the training data; a hierarchy takes a sequence of levels, or its top
    alone; sequences are as long as those of the training."""
    with looking(lit) as network:
        if isinstance(network, SequenceVAE):
            assert lit.sample_shape is not None, "the training comes first"
            return network.generate(z, lit.sample_shape[0])
        decoded = network.decode_mean(z) if hasattr(network, "decode_mean") else network.decode(z)
    return lit.preprocessing.inverse(decoded)


def reconstruct(lit: LitAutoencoder, x: Tensor) -> Tensor:
    """The reconstructions of a batch, in the units of the training data."""
    with looking(lit) as network:
        return lit.preprocessing.inverse(network.reconstruct(lit.preprocessing(x)))


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


def sample(lit: LitAutoencoder, count: int, seed: int) -> Tensor:
    """Means of p(x | z) for draws from the prior; of a sequence VAE draws of p(x | z)."""
    network: Any = lit.network
    if not _has_prior(network):
        raise TrainingError(f"sample: {type(network).__name__} has no prior to draw from, takes a VAE")
    if not can_sample(network):
        raise TrainingError(f"sample: this {type(network).__name__} does not know the shape of its latent, takes one with image_size")
    return lit.preprocessing.inverse(network.sample(count, generator=torch.Generator().manual_seed(seed)))


def interpolate(lit: LitAutoencoder, start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Decoded points on the lines between the latents of two batches, in all levels at once: ``(batch * steps, ...)``, the points of a line
    in succession."""
    check_continuous(lit.network, "interpolate")
    path = [_line(first, last, steps) for first, last in zip(encode(lit, start), encode(lit, end), strict=True)]
    return decode(lit, path if len(path) > 1 else path[0])


def _line(first: Tensor, last: Tensor, steps: int) -> Tensor:
    weights = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype).view(-1, *(1,) * (first.ndim - 1))
    return torch.lerp(first.unsqueeze(1), last.unsqueeze(1), weights).flatten(0, 1)


def traverse(lit: LitAutoencoder, x: Tensor, dimensions: int, span: float, steps: int) -> Tensor:
    """One sample with one latent dimension after the other set to values from ``-span`` to ``span``: ``(dimensions * steps, ...)``.

    The dimensions are those of the flattened latent, the first ``dimensions`` of them; of a hierarchy those of the top level, whose lower
    levels take the means of their priors.
    """
    check_continuous(lit.network, "traverse")
    z = encode(lit, x[:1])[0]
    dimensions = min(dimensions, z[0].numel())
    path = z.flatten(1).repeat(dimensions * steps, 1).unflatten(0, (dimensions, steps))
    values = torch.linspace(-span, span, steps, device=z.device, dtype=z.dtype)
    for dimension in range(dimensions):
        path[dimension, :, dimension] = values
    return decode(lit, path.flatten(0, 1).view(-1, *z.shape[1:]))
