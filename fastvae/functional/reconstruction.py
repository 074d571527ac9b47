"""Reconstruction losses whose gradient is written in the forward pass, and the ELBO."""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._backend import FLOATS
from fastvae._outputs import ELBO
from fastvae._types import BoundReduction, Likelihood, Reduction, check_choice
from fastvae.functional._call import apply, total_scale, writes_gradient
from fastvae.functional._checks import (
    check_device,
    check_expands,
    check_interval,
    check_nonnegative,
    check_posterior,
    check_scale,
    check_shape,
    check_tensor,
)
from fastvae.functional._documentation import documented
from fastvae.functional.latent import kl_normal
from fastvae.ops._results import reduction_number
from fastvae.ops.reconstruction import LIKELIHOODS, ForwardArguments, Reconstruction
from fastvae.reference import reconstruction as reference

# The kernels sum the gradient of a shared log variance of at most so many values themselves. A longer one is expanded, and torch sums its
# gradient.
MAX_SHARED_LOGVAR = 4096


@documented
def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pos_weight: Tensor | None = None,
    *,
    grad_scale: float = 1.0,
    validate: bool = False,
) -> Tensor:
    r"""Binary cross-entropy from logits, in nats: a Bernoulli decoder's reconstruction term.

    .. math:: w \left[ (1 - t)\, x + (1 + (p - 1)\, t) \log(1 + e^{-x}) \right]

    The arguments of :func:`torch.nn.functional.binary_cross_entropy_with_logits`, and more reductions.

    Args:
        input: logits :math:`x`, any shape; float32, bfloat16, float16 or float64.
        $probability_target
        $weight
        $reduction
        pos_weight: :math:`p`, broadcast to ``input``.
        $grad_scale
        validate: checks the target (a device synchronisation) and raises ``ValueError`` where one lies outside [0, 1]: for debugging.

    Returns:
        $loss

    Raises:
        $errors
    """
    if validate:
        check_unit_interval("target", target)
    return _loss("bce_with_logits", input, target, weight, pos_weight, None, reduction, grad_scale)


@documented
def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    grad_scale: float = 1.0,
    validate: bool = False,
) -> Tensor:
    r"""Binary cross-entropy from probabilities, in nats: :math:`-w \left[ t \log x + (1 - t) \log(1 - x) \right]`.

    Each logarithm is clamped at -100 as in :func:`torch.nn.functional.binary_cross_entropy`. Prefer
    :func:`binary_cross_entropy_with_logits`: it needs no sigmoid and does not saturate.

    Args:
        input: probabilities :math:`x` in [0, 1], any shape; float32, bfloat16, float16 or float64.
        $probability_target
        $weight
        $reduction
        $grad_scale
        validate: checks ``input`` and ``target`` (a device synchronisation) and raises ``ValueError`` where one lies outside [0, 1].

    Returns:
        $loss

    Raises:
        $errors
    """
    if validate:
        check_unit_interval("input", input)
        check_unit_interval("target", target)
    return _loss("bce", input, target, weight, None, None, reduction, grad_scale)


@documented
def mse_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean", *, grad_scale: float = 1.0) -> Tensor:
    r"""Squared error :math:`(x - t)^2`; the arguments of :func:`torch.nn.functional.mse_loss`, and more reductions.

    Args:
        input: :math:`x`, any shape; float32, bfloat16, float16 or float64.
        target: :math:`t`, the shape of ``input``; a floating dtype, uint8, which means value / 255, or as in torch another integer dtype,
            which means the number.
        $reduction
        $grad_scale

    Returns:
        $loss

    Raises:
        $errors
    """
    return _loss("mse", input, target, None, None, None, reduction, grad_scale)


@documented
def gaussian_nll(
    input: Tensor, target: Tensor, logvar: Tensor | float, reduction: Reduction = "batchmean", *, grad_scale: float = 1.0
) -> Tensor:
    r"""Negative log-likelihood of a Gaussian decoder, in nats, with its full constant.

    .. math:: \tfrac12 \left( \log 2\pi + \log\sigma^2 + \frac{(t - x)^2}{\sigma^2} \right)

    Args:
        input: the mean :math:`x`, any shape; float32, bfloat16, float16 or float64.
        target: :math:`t`, the shape of ``input``; a floating dtype, or uint8, which means value / 255.
        $logvar
            It receives a gradient.
        $reduction
        $grad_scale

    Returns:
        $loss

    Raises:
        $errors
    """
    check_tensor("input", input)
    if isinstance(logvar, int | float):
        logvar = input.new_full((), logvar)
    check_tensor("logvar", logvar)
    return _loss("gaussian", input, target, None, None, logvar, reduction, grad_scale)


_ELBO_LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    "bernoulli_logits": binary_cross_entropy_with_logits,
    "bernoulli": binary_cross_entropy,
    "gaussian": lambda input, target, **kwargs: gaussian_nll(input, target, 0.0, **kwargs),
}


@documented
def elbo_loss(
    recon: Tensor,
    target: Tensor,
    mu: Tensor,
    logvar: Tensor,
    *,
    likelihood: Likelihood = "bernoulli_logits",
    beta: float | Tensor = 1.0,
    free_bits: float = 0.0,
    capacity: float | Tensor | None = None,
    reduction: BoundReduction = "batchmean",
) -> ELBO:
    r"""The negative ELBO of a VAE with a standard normal prior: reconstruction :math:`+ \beta\, KL`.

    With ``capacity`` :math:`C` the second term is :math:`\beta\, |KL - C|` (Burgess et al., *Understanding disentangling in beta-VAE*,
    2018).

    Args:
        recon: what the decoder gives, the shape of ``target``: logits, probabilities or means.
        target: the data; a floating dtype, or uint8, which means value / 255.
        $posterior
        $likelihood
        beta: weight of the KL (Higgins et al., *beta-VAE*, 2017).
        $free_bits
        capacity: :math:`C` in nats per sample.
        $bound_reduction

    Returns:
        ``ELBO(loss, recon_loss, kl)``; ``kl`` is without ``beta`` and ``capacity``.

    Raises:
        $errors
    """
    check_choice("likelihood", likelihood, _ELBO_LIKELIHOODS)
    check_choice("reduction", reduction, get_args(BoundReduction))
    check_tensor("recon", recon)
    _check_target("target", target, "recon", recon)
    check_posterior("mu", mu, "logvar", logvar)
    check_nonnegative("free_bits", free_bits)
    recon_loss = _ELBO_LIKELIHOODS[likelihood](recon, target, reduction=reduction)
    kl = kl_normal(mu, logvar, reduction=reduction, free_bits=free_bits)
    penalty = kl
    if capacity is not None:
        penalty = (kl - (capacity * mu.shape[0] if reduction == "sum" else capacity)).abs()
    return ELBO(recon_loss + beta * penalty, recon_loss, kl)


@documented
def vae_loss(x: Tensor, x_recon: Tensor, mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss function of a hundred tutorials: summed binary cross-entropy of probabilities plus summed KL.

    Args:
        x: data in [0, 1].
        x_recon: probabilities from a sigmoid, the shape of ``x``.
        mu, log_var: mean and log variance of the posterior, ``(batch, latent)``.

    Returns:
        ``(loss, recon_loss, kl_loss)``, sums over the batch. :func:`elbo_loss` gives nats per sample and takes logits.

    Raises:
        $errors
    """
    check_tensor("x_recon", x_recon)
    _check_target("x", x, "x_recon", x_recon)
    check_posterior("mu", mu, "log_var", log_var)
    loss, recon_loss, kl_loss = elbo_loss(x_recon, x, mu, log_var, likelihood="bernoulli", reduction="sum")
    return loss, recon_loss, kl_loss


def check_unit_interval(name: str, values: Tensor) -> None:
    """Raises where a tensor has values outside [0, 1] (NaN is), with how many and where the first are."""
    check_tensor(name, values, (*FLOATS, torch.uint8))
    if values.dtype != torch.uint8:
        check_interval(name, values, 0, 1)


def _loss(likelihood, input, target, weight, pos_weight, logvar, reduction, grad_scale):
    check_tensor("input", input)
    if likelihood == "mse":
        target = _as_number(target, input.dtype, kept=torch.uint8)
    _check_target("target", target, "input", input)
    weight, pos_weight = _as_number(weight, torch.float32), _as_number(pos_weight, torch.float32)
    for name, value in (("weight", weight), ("pos_weight", pos_weight), ("logvar", logvar)):
        if value is not None:
            _check_shared(name, value, input)
    if target.dtype != input.dtype:
        input = _promote(input, target, reduction)
    number, scale = reduction_number(reduction), total_scale(check_scale(grad_scale))
    with_grad = _writes_gradient(input, target, logvar, reduction, scale)
    order = None if input.is_contiguous() else _memory_order(input, reduction)
    weight, pos_weight = (_share(value, input.shape, order) for value in (weight, pos_weight))
    logvar = _share(logvar, input.shape, order, MAX_SHARED_LOGVAR)
    if order is not None:
        input, target = input.permute(order), target.permute(order)
    backend = _backend.resolve("reconstruction_forward", input.device, input.dtype)
    arguments = ForwardArguments(input, target, weight, pos_weight, logvar, LIKELIHOODS[likelihood], number, scale, with_grad)
    loss = apply(Reconstruction, arguments, backend)[0]
    if order is not None and reduction == "none":
        return loss.permute([order.index(d) for d in range(len(order))])
    return loss


def _writes_gradient(input, target, logvar, reduction, grad_scale) -> bool:
    learners = [t for t in (input, logvar) if t is not None and t.requires_grad]
    return not target.requires_grad and writes_gradient(learners, reduction, grad_scale)


def _promote(input: Tensor, target: Tensor, reduction: str) -> Tensor:
    """``input`` in the dtype of the loss: torch's promotion. The kernels widen 16-bit numbers themselves where the loss is reduced."""
    promoted = reference.promote(input, target)
    return input.to(promoted) if reduction == "none" or promoted == torch.float64 else input


def _as_number(value, dtype: torch.dtype, kept: torch.dtype | None = None):
    """Integers and bools, which torch takes as numbers, in a floating dtype; ``kept`` stays what it is."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == kept:
        return value
    return value.to(dtype)


def _check_target(name, target, like_name, like):
    check_tensor(name, target, (*FLOATS, torch.uint8))
    check_device(name, target, like_name, like)
    check_shape(name, target, like.shape, f"the shape of {like_name}")


def _check_shared(name, value, input):
    check_tensor(name, value)
    check_device(name, value, "input", input)
    check_expands(name, value, "input", input.shape)
    if name != "logvar" and value.requires_grad:
        raise ValueError(f"{name}: got a tensor that requires grad, takes one that does not (detach it, or use fastvae.reference)")


def _share(value: Tensor | None, shape: Sequence[int], order: list[int] | None, longest: float = math.inf) -> Tensor | None:
    """A broadcast argument in as many dimensions as the input, in its memory order, and expanded where a kernel could not index it."""
    if value is None:
        return None
    value = value.view((*(1,) * (len(shape) - value.ndim), *value.shape))
    if order is not None:
        value, shape = value.permute(order), [shape[d] for d in order]
    too_long = value.shape != tuple(shape) and value.numel() > longest
    return value.expand(shape) if too_long or not _is_one_run(value.shape, shape) else value


def _is_one_run(sizes, shape) -> bool:
    """Whether the dimensions that are not broadcast stand side by side: element e then reads value (e // inner) % period."""
    # The comparison is written as text because torch.compile with dynamic shapes then decides it one dimension at a time.
    read = "".join("x" if size != 1 else "." for size, full in zip(sizes, shape, strict=True) if full != 1)
    return "." not in read.strip(".")


def _memory_order(input: Tensor, reduction: str) -> list[int] | None:
    """The order of dimensions in which a dense permuted tensor is contiguous, so that it is served without a copy."""
    order = list(input.dim_order())
    needs_batch_first = reduction in ("sample", "batchmean")
    if (needs_batch_first and order[0] != 0) or not input.permute(order).is_contiguous():
        return None
    return order
