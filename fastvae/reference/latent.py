"""Sampling and the Gaussian KL in plain PyTorch: the definition and the oracle of the tests."""

import math
from typing import Any, cast

import torch
from torch import Tensor

from fastvae._types import Reduction
from fastvae.ops import latent as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import accumulation_dtype, reduction_number
from fastvae.reference._reduce import expand_gradient, reduce_elements

_MASK = 0xFFFFFFFF
TILE, LANES = 512, 128
# The limits of log variances are those of the latent diffusion models (Rombach et al. 2022).
LOGVAR_CLAMP = (-30.0, 20.0)


def philox4x32(counter: Tensor, key: Tensor, rounds: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al. 2011): four 32-bit words for each 64-bit counter, in int64 tensors.

    Args:
        counter: int64; its low and high words are the counter's first two, the others are 0.
        key: int64, 0-dim; its low and high words are the key.
    """
    words = (counter & _MASK, (counter >> 32) & _MASK, torch.zeros_like(counter), torch.zeros_like(counter))
    return philox_rounds(words, (key & _MASK, (key >> 32) & _MASK), rounds)


def philox_rounds(words, key, rounds: int = 10):
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product wraps in int64; its words are right all the same.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def box_muller(w_even: Tensor, w_odd: Tensor) -> tuple[Tensor, Tensor]:
    """Two normals from two words (Box and Muller 1958), in fp32 steps; the angle's quadrant is reduced in integers."""
    u = w_even.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = torch.sqrt(-2.0 * torch.log(u))
    quadrant = (w_odd + 0x20000000) >> 30
    angle = (w_odd - (quadrant << 30)).to(torch.float32) * (2.0 * math.pi * 2.0**-32)
    sin, cos = torch.sin(angle), torch.cos(angle)
    swap = (quadrant & 1) == 1
    cosine = torch.where(swap, sin, cos) * torch.where(((quadrant + 1) & 2) == 2, -1.0, 1.0)
    sine = torch.where(swap, cos, sin) * torch.where((quadrant & 2) == 2, -1.0, 1.0)
    return radius * cosine, radius * sine


def normal(seed: Tensor, shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normals: a pure function of ``seed`` (0-dim int64) and the element's row-major number, the same on every backend."""
    count = math.prod(shape)
    tiles = -(-count // TILE)
    counter = torch.arange(tiles * LANES, dtype=torch.int64, device=seed.device)
    w0, w1, w2, w3 = philox4x32(counter, seed)
    streams = (*box_muller(w0, w1), *box_muller(w2, w3))
    tile_major = torch.stack([s.view(tiles, LANES) for s in streams], dim=1)
    return tile_major.reshape(-1)[:count].view(shape).to(dtype)


def clamp(logvar: Tensor, limits: tuple[float, float]) -> Tensor:
    """``torch.clamp`` with the gradient 0 outside the limits and 1 inside and on them; NaN stays."""
    return logvar.clamp(*limits)


def variance_divergence(difference: Tensor) -> Tensor:
    """``exp(d) - 1 - d``, twice the KL of two Gaussians with one mean whose log variances differ by ``d``; never negative.

    Near ``d = 0``, where the difference would cancel, it is the Taylor series, to the precision of the dtype.
    """
    near = difference.abs() < 0.5
    # 0 elsewhere: a power of a large number would be infinite, and its gradient NaN.
    d = torch.where(near, difference, 0.0)
    terms = 13 if d.dtype == torch.float64 else 7
    series = torch.full_like(d, 1.0 / math.factorial(terms + 1))
    for n in range(terms, 1, -1):
        series = series * d + 1.0 / math.factorial(n)
    return torch.where(near, series * d * d, difference.exp() - 1.0 - difference)


def kl_elements(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None = None, prior_logvar: Tensor | None = None) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))) of each element, in nats (Kingma and Welling 2014, appendix B)."""
    if prior_mu is None or prior_logvar is None:
        return 0.5 * (mu * mu + variance_divergence(logvar))
    delta = mu - prior_mu
    return 0.5 * (delta * delta * (-prior_logvar).exp() + variance_divergence(logvar - prior_logvar))


def _reduce_kl(elements: Tensor, reduction: int, free_bits: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reduced KL, and which dimensions are above their free bits (no elements where there are none to give).

    With free bits, the elements of a dimension whose batch mean is not above ``free_bits`` count as ``free_bits`` each, so every
    reduction agrees with sum_d max(free_bits, mean_b KL[b, d]) (Kingma et al. 2016).
    """
    active = elements.new_empty((0,), dtype=torch.bool)
    if free_bits > 0:
        active = ~(elements.mean(0) <= free_bits)  # a NaN stays
        elements = torch.where(active, elements, free_bits)
    return reduce_elements(elements, reduction, dtype), active


def _prepare(tensors, limits):
    """The inputs in the accumulation dtype, log variances clamped."""
    wide: list[Any] = [None if t is None else t.to(accumulation_dtype(t.dtype)) for t in tensors]
    mu, logvar, prior_mu, prior_logvar = wide
    if prior_mu is not None:
        prior_mu, prior_logvar = prior_mu.expand_as(mu), clamp(prior_logvar.expand_as(mu), limits)
    return mu, clamp(logvar, limits), prior_mu, prior_logvar


def _limits(logvar_clamp):
    return (-math.inf, math.inf) if logvar_clamp is None else logvar_clamp


def _noise(mu: Tensor, num_samples, eps, generator, seed) -> Tensor:
    """The noise that is given, or that of a seed that is given or drawn, in the accumulation dtype."""
    dtype = accumulation_dtype(mu.dtype)
    if eps is not None:
        return eps.to(dtype)
    if seed is None:
        device = mu.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device, generator=generator)
    shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
    return normal(torch.as_tensor(seed, dtype=torch.int64, device=mu.device), shape, dtype)


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
    """:func:`fastvae.functional.reparameterize`, differentiable any number of times: ``mu + exp(logvar / 2) * eps``."""
    wide_mu, wide_logvar, _, _ = _prepare((mu, logvar, None, None), _limits(logvar_clamp))
    return (wide_mu + torch.exp(0.5 * wide_logvar) * _noise(mu, num_samples, eps, generator, seed)).to(mu.dtype)


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
    """:func:`fastvae.functional.kl_normal`, differentiable any number of times."""
    wide = _prepare((mu, logvar, prior_mu, prior_logvar), _limits(logvar_clamp))
    return _reduce_kl(kl_elements(*wide), reduction_number(reduction), free_bits, mu.dtype)[0]


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
    """:func:`fastvae.functional.reparameterize_kl`, differentiable any number of times."""
    noise: dict[str, Any] = {"num_samples": num_samples, "eps": eps, "generator": generator, "seed": seed}
    z = reparameterize(mu, logvar, **noise, logvar_clamp=logvar_clamp)
    options: dict[str, Any] = {"reduction": reduction, "free_bits": free_bits, "logvar_clamp": logvar_clamp}
    return z, kl_normal(mu, logvar, prior_mu, prior_logvar, **options)


@in_plain_torch(ops.ReparameterizeKL)
@ops.forward.implement("reference")
def latent_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    """The operator, differentiable any number of times in either mode where it is called as this function."""
    # torch.compile of torch 2.10 traces the fields of a named tuple, and no property.
    mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, with_kl, reduction, free_bits, clamp_min, clamp_max, keep_noise = arguments
    dtype = accumulation_dtype(mu.dtype)
    wide_mu, wide_logvar, *prior = _prepare((mu, logvar, prior_mu, prior_logvar), (clamp_min, clamp_max))
    z, kl, active, noise = mu.new_empty((0,)), mu.new_empty((0,), dtype=dtype), mu.new_empty((0,), dtype=torch.bool), None
    if eps is not None or seed is not None:
        shape = mu.shape if num_samples is None else (num_samples, *mu.shape)
        noise = normal(cast("Tensor", seed), shape, dtype) if eps is None else eps.to(dtype)
        z = (wide_mu + torch.exp(0.5 * wide_logvar) * noise).to(mu.dtype)
    if with_kl:
        kl, active = _reduce_kl(kl_elements(wide_mu, wide_logvar, *prior), reduction, free_bits, mu.dtype)
    kept = noise.clone() if keep_noise and noise is not None else mu.new_empty((0,), dtype=dtype)
    return ops.ForwardResults(z, kl, active, kept)


@ops.backward.implement("reference")
def _latent_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    mu, grad_z, posterior = arguments.mu, arguments.grad_z, arguments.posterior
    wide_mu, wide_logvar, *prior = _prepare(posterior, arguments.limits)
    grads: list[Any] = [None if t is None else torch.zeros_like(wide_mu) for t in posterior]
    if grad_z is not None:
        noise = arguments.eps if arguments.eps is not None else normal(cast("Tensor", arguments.seed), grad_z.shape, wide_mu.dtype)
        sigma = torch.exp(0.5 * wide_logvar)
        grad_mu = grad_z.to(wide_mu.dtype)
        grad_sigma = grad_mu * noise
        if arguments.num_samples is not None:
            grad_mu, grad_sigma = grad_mu.sum(0), grad_sigma.sum(0)
        grads[:2] = [grads[0] + grad_mu, grads[1] + 0.5 * sigma * grad_sigma]
    if arguments.grad_kl is not None:
        weight, active = expand_gradient(arguments.grad_kl, mu.shape, arguments.reduction), arguments.active
        weight = torch.where(active, weight, 0.0) if active.numel() else weight
        for i, gradient in enumerate(_kl_gradients(wide_mu, wide_logvar, *prior)):
            grads[i] = grads[i] + weight * gradient
    for i in (1, 3):
        log_variance = posterior[i]
        if log_variance is not None:
            outside = (log_variance < arguments.clamp_min) | (log_variance > arguments.clamp_max)
            grads[i] = torch.where(outside, 0.0, grads[i])
    return ops.BackwardResults(*(mu.new_empty((0,)) if g is None else g.to(mu.dtype).contiguous() for g in grads))


def _kl_gradients(mu, logvar, prior_mu, prior_logvar):
    """d KL / d (mu, logvar[, prior_mu, prior_logvar]) of each element."""
    if prior_mu is None:
        return mu, 0.5 * torch.expm1(logvar)
    precision, excess, delta = (-prior_logvar).exp(), torch.expm1(logvar - prior_logvar), mu - prior_mu
    scaled = delta * precision
    return scaled, 0.5 * excess, -scaled, -0.5 * (excess + delta * scaled)
