"""The squared maximum mean discrepancy of two sets of latents (Gretton et al., *A Kernel Two-Sample Test*, 2012)."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae._types import Kernel
from fastvae.distributions.normal import widened

# The kernels are sums over these multiples of the scale.
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def _imq(distances: Tensor, scale: float) -> Tensor:
    return scale / (scale + distances)


def _rbf(distances: Tensor, scale: float) -> Tensor:
    return torch.exp(-distances / scale)


KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {"imq": _imq, "rbf": _rbf}


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    r"""The unbiased estimate of :math:`\mathbb{E}\, k(x, x') + \mathbb{E}\, k(y, y') - 2\, \mathbb{E}\, k(x, y)`, which may be negative.

    ``"imq"`` is :math:`\sum_s s C / (s C + \|x - y\|^2)`, ``"rbf"`` :math:`\sum_s \exp(-\|x - y\|^2 / (s C))`, with C = 2 d for d
    dimensions, the expected squared distance of two draws of N(0, I).

    Args:
        x, y: two sets of as many latents, at least two each.
        kernel: ``"imq"`` or ``"rbf"``.
    """
    x, y = widened(x.flatten(1)), widened(y.flatten(1))
    n, base = len(x), 2.0 * x.shape[1]
    if n < 2:
        raise ValueError(f"x: got a batch of {n}, the discrepancy takes at least 2")

    def total(a: Tensor, b: Tensor) -> Tensor:
        distances = (a.unsqueeze(1) - b.unsqueeze(0)).square().sum(-1)
        kernels = torch.stack([KERNELS[kernel](distances, scale * base) for scale in SCALES]).sum(0)
        return kernels if a is not b else kernels * (1 - torch.eye(n, dtype=kernels.dtype, device=kernels.device))

    return (total(x, x) + total(y, y)).sum() / (n * (n - 1)) - 2 * total(x, y).mean()
