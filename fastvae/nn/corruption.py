"""The corruptions that a denoising autoencoder applies to its input (Vincent et al., *Stacked Denoising Autoencoders*, 2010).

``generator`` decides the random numbers; it may be on the CPU or on the device of the data.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastvae.functional._checks import check_nonnegative


def _check_fraction(value) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"fraction: got {value!r}, takes a number in [0, 1]")
    return float(value)


def _draw(distribution: Callable[..., Tensor], x: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Random numbers for the elements of ``x``; a generator on the CPU serves tensors on any device."""
    device = x.device if generator is None else generator.device
    return distribution(x.shape, dtype=dtype, device=device, generator=generator).to(x.device)


class GaussianNoise(nn.Module):
    """Adds normal noise of standard deviation ``sigma``; the result may leave the range of the data.

    Args:
        sigma: in the units of the data.
    """

    def __init__(self, sigma: float = 0.3):
        super().__init__()
        self.sigma = check_nonnegative("sigma", sigma)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return x + self.sigma * _draw(torch.randn, x, x.dtype, generator)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}"


class Masking(nn.Module):
    """Sets elements to 0, each with probability ``fraction``."""

    def __init__(self, fraction: float = 0.3):
        super().__init__()
        self.fraction = _check_fraction(fraction)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        hidden = _draw(torch.rand, x, torch.get_default_dtype(), generator) < self.fraction
        return x.masked_fill(hidden, 0.0)

    def extra_repr(self) -> str:
        return f"fraction={self.fraction}"


class SaltAndPepper(nn.Module):
    """Sets elements to the least or the greatest value of the data, each of the two with probability ``fraction / 2``.

    Args:
        fraction: share of the elements that change.
        low, high: the range of the data.
    """

    def __init__(self, fraction: float = 0.3, low: float = 0.0, high: float = 1.0):
        super().__init__()
        self.fraction = _check_fraction(fraction)
        self.low, self.high = float(low), float(high)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        u = _draw(torch.rand, x, torch.get_default_dtype(), generator)
        x = x.masked_fill(u < self.fraction / 2, self.low)
        return x.masked_fill(u >= 1 - self.fraction / 2, self.high)

    def extra_repr(self) -> str:
        return f"fraction={self.fraction}, low={self.low}, high={self.high}"
