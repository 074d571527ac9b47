"""Priors p(z): modules that give a distribution over latents.

A call takes the function that encodes data, of which the VampPrior makes its components, and gives a distribution with ``log_prob(z)`` and
``sample(n, generator)``. A model calls its prior once a step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.distributions._options import Stored
from fastvae.distributions.normal import DiagonalNormal, NormalMixture, SharedNormal, StandardNormal

Encode = Callable[[Tensor], Any]


def check_shape(name: str, shape: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of one sample; an integer is that of a vector."""
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"{name}: got {shape!r}, takes an integer or a sequence of integers, each at least 1")
    return sizes


def check_count(name: str, count: int) -> int:
    """A number of things that is at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: got {count!r}, takes an integer of at least 1")
    return count


class Prior(Stored, nn.Module):
    """The base of all priors. A call gives a distribution with ``log_prob(z)`` and ``sample(n, generator)``.

    Args:
        latent_shape: shape of one z, an integer for a vector.
    """

    def __init__(self, latent_shape: int | Sequence[int]):
        super().__init__()
        self.latent_shape = check_shape("latent_shape", latent_shape)

    def extra_repr(self) -> str:
        return f"latent_shape={self.latent_shape}"


class StandardPrior(Prior):
    """N(0, I). The KL of a diagonal posterior to it is in closed form and fused with sampling.

    Args:
        latent_shape: shape of one z, an integer for a vector.
    """

    origin: Tensor

    def __init__(self, latent_shape: int | Sequence[int]):
        super().__init__(latent_shape)
        # It gives draws their device and dtype, and is no weight.
        self.register_buffer("origin", torch.zeros(self.latent_shape), persistent=False)

    def forward(self, encode: Encode | None = None) -> StandardNormal:
        return StandardNormal(self.origin)


def prior_of(latent_shape: int | Sequence[int] | None, prior: Prior | None) -> Prior | None:
    """A model's prior: ``prior``, whose shape ``latent_shape`` is where both are given, or else N(0, I) where the shape is known."""
    if prior is None:
        return None if latent_shape is None else StandardPrior(latent_shape)
    if latent_shape is not None and check_shape("latent_shape", latent_shape) != prior.latent_shape:
        raise ValueError(f"latent_shape: got {latent_shape}, the prior is of {prior.latent_shape}")
    return prior


class DiagonalPrior(Prior):
    """N(mu, diag(exp(logvar))) with learned mean and log variance, N(0, I) at first. The KL of a diagonal posterior to it is in closed form
    and fused with sampling.

    Args:
        latent_shape: shape of one z, an integer for a vector.
    """

    def __init__(self, latent_shape: int | Sequence[int]):
        super().__init__(latent_shape)
        self.mu = nn.Parameter(torch.zeros(self.latent_shape))
        self.logvar = nn.Parameter(torch.zeros(self.latent_shape))

    def forward(self, encode: Encode | None = None) -> SharedNormal:
        return SharedNormal(self.mu, self.logvar)


class MixturePrior(Prior):
    r"""A learned mixture of diagonal normals, :math:`\sum_k \pi_k N(\mu_k, \mathrm{diag}(\sigma_k^2))` (Dilokthanakul et al., *Deep
    Unsupervised Clustering with Gaussian Mixture Variational Autoencoders*, 2016).

    The means are drawn from N(0, I) at first, so that the components are not the same.

    Args:
        latent_shape: shape of one z, an integer for a vector.
        components: K.
    """

    def __init__(self, latent_shape: int | Sequence[int], components: int = 10):
        super().__init__(latent_shape)
        check_count("components", components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.mu = nn.Parameter(torch.randn(components, *self.latent_shape))
        self.logvar = nn.Parameter(torch.zeros(components, *self.latent_shape))

    def forward(self, encode: Encode | None = None) -> NormalMixture:
        return NormalMixture(self.logits, self.mu, self.logvar)


class VampPrior(Prior):
    r"""The mixture of the posteriors of learned pseudo-inputs, :math:`\frac{1}{K} \sum_k q(z | u_k)` (Tomczak and Welling, *VAE with a
    VampPrior*, 2018). The posterior has to be diagonal.

    Args:
        latent_shape: shape of one z, an integer for a vector.
        data_shape: shape of one x, an integer for a vector.
        components: K.
        low, high: range of the data, in which the pseudo-inputs stay. They start as uniform noise in it.
    """

    def __init__(
        self, latent_shape: int | Sequence[int], data_shape: int | Sequence[int], components: int = 100, low: float = 0.0, high: float = 1.0
    ):
        super().__init__(latent_shape)
        check_count("components", components)
        if not low < high:
            raise ValueError(f"low: got {low!r}, takes a number below high, which is {high!r}")
        self.low, self.high = low, high
        self.pseudo_inputs = nn.Parameter(torch.empty(components, *check_shape("data_shape", data_shape)).uniform_(low, high))

    def forward(self, encode: Encode) -> NormalMixture:
        q = encode(self.pseudo_inputs.clamp(self.low, self.high))
        if not isinstance(q, DiagonalNormal):
            raise TypeError(f"posterior: gives {type(q).__name__}, a VampPrior takes DiagonalPosterior")
        return NormalMixture(q.mu.new_zeros(len(q.mu)), q.mu, q.logvar)
