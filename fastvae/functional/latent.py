"""Reparameterized sampling and the analytic Gaussian KL, fused."""

import math

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._types import Reduction
from fastvae.functional._call import apply
from fastvae.functional._checks import check_device, check_expands, check_nonnegative, check_posterior, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops._results import reduction_number
from fastvae.ops.latent import ForwardArguments, ReparameterizeKL
from fastvae.reference.latent import LOGVAR_CLAMP


@documented
def reparameterize(
    mu: Tensor,
    logvar: Tensor,
    *,
    num_samples: int | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | int | None = None,
    logvar_clamp: tuple[float, float] | None = LOGVAR_CLAMP,
) -> Tensor:
    r"""Samples a diagonal Gaussian, differentiably: :math:`z = \mu + e^{\log\sigma^2 / 2} \epsilon`, :math:`\epsilon \sim N(0, I)`.

    The reparameterization of Kingma and Welling, *Auto-Encoding Variational Bayes* (2014).

    Args:
        mu: mean, any shape; float32, bfloat16, float16 or float64.
        logvar: log variance :math:`\log\sigma^2`, the shape and dtype of ``mu``.
        $num_samples
        $noise
        $logvar_clamp

    Returns:
        ``z`` in the dtype of ``mu``. Arithmetic is in float32 (float64 for float64); the noise is drawn in float32.

    Raises:
        $errors
    """
    return _sample(mu, logvar, None, None, num_samples, eps, generator, seed, logvar_clamp, with_kl=False)[0]


@documented
def kl_normal(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    reduction: Reduction = "batchmean",
    free_bits: float = 0.0,
    logvar_clamp: tuple[float, float] | None = LOGVAR_CLAMP,
) -> Tensor:
    r"""The KL divergence of a diagonal Gaussian from a standard normal or from another diagonal Gaussian, in nats.

    .. math:: \tfrac12 \sum_d \left( \log\tfrac{\sigma_p^2}{\sigma^2} + \frac{\sigma^2 + (\mu - \mu_p)^2}{\sigma_p^2} - 1 \right)

    Kingma and Welling (2014), appendix B. It is never negative, and accurate near the prior too. With ``free_bits`` :math:`\lambda` the
    sum is :math:`\sum_d \max(\lambda, \mathrm{mean}_b\, KL_{bd})`.

    Args:
        $posterior
        $prior
        $reduction
        $free_bits
        $logvar_clamp

    Returns:
        The KL; in the dtype of ``mu`` for ``"none"``, else in float32 (float64 for float64). 0 for an empty batch.

    Raises:
        $errors
    """
    check_posterior("mu", mu, "logvar", logvar)
    prior_mu, prior_logvar = _check_prior(mu, prior_mu, prior_logvar)
    clamp_min, clamp_max = _check_clamp(logvar_clamp)
    arguments = ForwardArguments(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        eps=None,
        seed=None,
        num_samples=None,
        with_kl=True,
        reduction=reduction_number(reduction),
        free_bits=check_nonnegative("free_bits", free_bits),
        clamp_min=clamp_min,
        clamp_max=clamp_max,
        keep_noise=False,
    )
    return apply(ReparameterizeKL, arguments, _backend.resolve("latent_forward", mu.device, mu.dtype))[1]


@documented
def reparameterize_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    *,
    num_samples: int | None = None,
    reduction: Reduction = "batchmean",
    free_bits: float = 0.0,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    seed: Tensor | int | None = None,
    logvar_clamp: tuple[float, float] | None = LOGVAR_CLAMP,
) -> tuple[Tensor, Tensor]:
    """:func:`reparameterize` and :func:`kl_normal` in one pass over ``mu`` and ``logvar``.

    On a GPU the noise is not stored: the backward pass draws it again from the seed.

    Args:
        $posterior
        $prior
        $num_samples
        $reduction
        $free_bits
        $noise
        $logvar_clamp

    Returns:
        ``(z, kl)``: ``z`` in the dtype of ``mu``; the KL in the dtype of ``mu`` for ``"none"``, else in float32 (float64 for float64). The
        KL of an empty batch is 0.

    Raises:
        $errors
    """
    posterior_and_prior = mu, logvar, prior_mu, prior_logvar
    noise = num_samples, eps, generator, seed
    return _sample(*posterior_and_prior, *noise, logvar_clamp, with_kl=True, reduction=reduction, free_bits=free_bits)[:2]


def _sample(
    mu, logvar, prior_mu, prior_logvar, num_samples, eps, generator, seed, logvar_clamp, *, with_kl, reduction="none", free_bits=0.0
):
    check_posterior("mu", mu, "logvar", logvar)
    prior_mu, prior_logvar = _check_prior(mu, prior_mu, prior_logvar)
    reduction, free_bits = reduction_number(reduction), check_nonnegative("free_bits", free_bits)
    clamp_min, clamp_max = _check_clamp(logvar_clamp)
    backend = _backend.resolve("latent_forward", mu.device, mu.dtype)
    eps, seed = _noise_source(mu, _sample_shape(mu, num_samples), eps, generator, seed)
    arguments = ForwardArguments(
        mu,
        logvar,
        prior_mu,
        prior_logvar,
        eps,
        seed,
        num_samples,
        with_kl,
        reduction,
        free_bits,
        clamp_min,
        clamp_max,
        _keeps_noise(backend, seed, mu, logvar),
    )
    return apply(ReparameterizeKL, arguments, backend)


def _check_prior(mu, prior_mu, prior_logvar):
    if prior_mu is None and prior_logvar is None:
        return None, None
    for name, value in (("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        if value is None:
            raise ValueError(f"{name}: got None beside a tensor, takes both prior_mu and prior_logvar or neither")
        check_tensor(name, value)
        check_device(name, value, "mu", mu)
        if value.dtype != mu.dtype:
            raise TypeError(f"{name}: got {value.dtype}, takes the dtype of mu, {mu.dtype}")
        check_expands(name, value, "mu", mu.shape)
    return prior_mu.expand(mu.shape), prior_logvar.expand(mu.shape)


def _sample_shape(mu, num_samples):
    if num_samples is None:
        return mu.shape
    if isinstance(num_samples, bool) or not isinstance(num_samples, int | torch.SymInt) or num_samples < 1:
        raise ValueError(f"num_samples: got {num_samples!r}, takes an integer >= 1 or None")
    return (num_samples, *mu.shape)


def _noise_source(mu, shape, eps, generator, seed):
    """The given noise, or a seed on the device of ``mu``: given, or drawn."""
    if (eps is not None) + (generator is not None) + (seed is not None) > 1:
        raise ValueError("eps, generator, seed: got more than one of them, takes at most one")
    if eps is not None:
        check_tensor("eps", eps)
        check_device("eps", eps, "mu", mu)
        check_shape("eps", eps, shape, "the shape of the sample")
        return eps.to(mu.dtype), None
    if seed is None:
        return None, _draw_seed(mu.device, generator)
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (torch.int64,))
        check_device("seed", seed, "mu", mu)
        check_shape("seed", seed, (), "a 0-dim tensor")
        return None, seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: got {type(seed).__name__}, takes an integer or a 0-dim int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, takes an integer of 64 bits")
    return None, _seed_tensor(seed, mu.device)


def _draw_seed(device, generator):
    """A seed on ``device``, drawn on the generator's own device."""
    if generator is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: got {type(generator).__name__}, takes a torch.Generator")
    if generator.device.type not in ("cpu", device.type):
        raise ValueError(f"generator: got one on {generator.device}, takes one on the CPU or on the device of mu, {device}")
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=generator.device, generator=generator)
    return seed if generator.device.type == device.type else _seed_tensor(int(seed), device)


def _seed_tensor(seed, device):
    # torch.tensor would copy from the host, which waits for a GPU.
    return torch.full((), seed, dtype=torch.int64, device=device)


def _keeps_noise(backend, seed, mu, logvar):
    """Whether drawn noise is stored for the backward pass. On a CPU drawing it again costs five times as much as storing it."""
    differentiated = torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad)
    return differentiated and seed is not None and _backend.keeps_noise(backend)


def _check_clamp(limits):
    if limits is None:
        return -math.inf, math.inf
    if not isinstance(limits, tuple | list) or len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(f"logvar_clamp: got {limits!r}, takes (low, high) with low <= high, or None")
    return float(limits[0]), float(limits[1])
