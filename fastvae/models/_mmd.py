"""The squared maximum mean discrepancy of two sets of latents (Gretton et al., *A Kernel Two-Sample Test*, 2012)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._types import Kernel
from fastvae.distributions.normal import widened

# The kernels are sums over these multiples of the scale.
SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def _imq(distances: Tensor, scales: Tensor) -> Tensor:
    return scales / (scales + distances)


def _rbf(distances: Tensor, scales: Tensor) -> Tensor:
    return torch.exp(-distances / scales)


KERNELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"imq": _imq, "rbf": _rbf}


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel) -> Tensor:
    r"""The unbiased estimate of :math:`\mathbb{E}\, k(x, x') + \mathbb{E}\, k(y, y') - 2\, \mathbb{E}\, k(x, y)`, which may be negative.

    ``"imq"`` is :math:`\sum_s s C / (s C + \|x - y\|^2)`, ``"rbf"`` :math:`\sum_s \exp(-\|x - y\|^2 / (s C))`, with C = 2 d for d
    dimensions, the expected squared distance of two draws of N(0, I).

    Args:
        x, y: two sets of as many latents, at least two each.
        kernel: ``"imq"`` or ``"rbf"``.
    """
    points = widened(torch.cat([x.flatten(1), y.flatten(1)]))
    n, dimensions = len(x), points.shape[1]
    if n < 2:
        raise ValueError(f"x: got a batch of {n}, the discrepancy takes at least 2")
    # Each pair once: 2 n (2 n - 1) / 2 of them.
    distances = F.pdist(points).square()
    first, second = torch.triu_indices(2 * n, 2 * n, 1, device=points.device)
    within = ((first < n) == (second < n)).to(distances.dtype)
    weights = within * (2 / (n * (n - 1))) - (1 - within) * (2 / n**2)
    scales = 2.0 * dimensions * torch.tensor(SCALES, dtype=distances.dtype, device=distances.device).unsqueeze(1)
    return KERNELS[kernel](distances, scales).sum(0) @ weights
