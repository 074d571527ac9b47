"""The aggregate posterior q(z): the mixture, with equal weights, of the diagonal normal posteriors of N samples."""

import math

import torch
from torch import Tensor

from fastvae.distributions.normal import LOG_TWO_PI

# A block of densities, (draws, N) float64, has so many bytes at most: the passes over it stay in the processor's cache.
BLOCK_BYTES = 2**21


def draw_components(n: int, num_draws: int, generator: torch.Generator) -> Tensor:
    """The component of each draw: all of them in a random order, again and again, so that none has two draws before each has one."""
    return torch.randperm(n, generator=generator)[torch.arange(num_draws) % n]


def aggregate_log_densities(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    r""":math:`\log q(z)` and :math:`\sum_j \log q(z_j)` at each z, ``(draws,)`` both, in float64.

    It takes draws x N x d exponentials and the memory of a few blocks.

    Args:
        z: ``(draws, d)``, float64.
        mu, logvar: of the components, ``(N, d)``, float64.
    """
    n, dimensions = mu.shape
    columns = mu.T.contiguous()
    scales = (math.sqrt(0.5) * (-0.5 * logvar).exp()).T.contiguous()
    offsets = -0.5 * (logvar + LOG_TWO_PI).T.contiguous()
    joints, products = [], []
    for rows in z.split(max(1, BLOCK_BYTES // (8 * n))):
        joint, product = rows.new_zeros(len(rows), n), rows.new_zeros(len(rows))
        for j in range(dimensions):
            log_density = (rows[:, j, None] - columns[j]).mul_(scales[j]).square_().neg_().add_(offsets[j])
            joint += log_density
            product += torch.logsumexp(log_density, 1)
        joints.append(torch.logsumexp(joint, 1))
        products.append(product)
    return torch.cat(joints) - math.log(n), torch.cat(products) - dimensions * math.log(n)
