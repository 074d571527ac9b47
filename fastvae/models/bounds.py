"""Bounds on log p(x) by importance sampling (Burda et al., *Importance Weighted Autoencoders*, 2016)."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.distributions.prior import check_count

if TYPE_CHECKING:
    from fastvae.models.hierarchy import HierarchicalVAE
    from fastvae.models.vae import VAE


def log_weights(model: "VAE", x: Tensor, num_samples: int, **noise) -> Tensor:
    r""":math:`\log p(x|z_k) + \log p(z_k) - \log q(z_k|x)` for draws of the posterior: ``(num_samples, batch)``, in nats, differentiable.

    Args:
        model: a VAE.
        x: data, ``(batch, ...)``.
        num_samples: draws for each sample, which go through the decoder as one batch.
        noise: ``eps``, ``generator`` or ``seed``, see :func:`fastvae.functional.reparameterize`.
    """
    q = model.encode(x)
    z, log_q = q.rsample_and_log_prob(num_samples, **noise)
    log_px = -model.recon_loss(model.decode_samples(z, num_samples), x, num_samples, "sample")
    return log_px + model.prior_distribution(q).log_prob(z) - log_q


def importance_bound(
    model: "VAE | HierarchicalVAE", x: Tensor, num_samples: int, *, samples_at_once: int = 50, generator: torch.Generator | None = None
) -> Tensor:
    r""":math:`\log \frac{1}{K} \sum_k \frac{p(x|z_k) p(z_k)}{q(z_k|x)}`, ``(batch,)``, in nats, without a gradient.

    Its expectation is a lower bound on log p(x) that rises with K; for large K it is the importance-sampled estimate of log p(x).

    Args:
        model: gives the weights by its method ``log_weights``.
        x: data, ``(batch, ...)``.
        num_samples: K.
        samples_at_once: how many of them go through the decoder as one batch, which bounds the memory.
        generator: of the noise.
    """
    return log_mean_weights(functools.partial(model.log_weights, x, generator=generator), num_samples, samples_at_once)


def log_mean_weights(draw: Callable[[int], Tensor], num_samples: int, samples_at_once: int) -> Tensor:
    """The logarithm of the mean of ``num_samples`` importance weights, ``(batch,)``, without a gradient.

    Args:
        draw: gives the logarithms of so many weights, ``(count, batch)``.
        num_samples: weights in all.
        samples_at_once: weights of one call, which bounds the memory.
    """
    check_count("num_samples", num_samples)
    check_count("samples_at_once", samples_at_once)
    with torch.no_grad():
        counts = (min(samples_at_once, num_samples - first) for first in range(0, num_samples, samples_at_once))
        parts = (torch.logsumexp(draw(count), 0) for count in counts)
        return functools.reduce(torch.logaddexp, parts) - math.log(num_samples)
