"""Reconstruction losses in plain PyTorch: the definition and the oracle of the tests."""

import math
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._outputs import ELBO
from fastvae._types import BoundReduction, Likelihood, Reduction, check_choice
from fastvae.ops import reconstruction as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import accumulation_dtype, reduction_number
from fastvae.ops.reconstruction import LIKELIHOODS
from fastvae.reference._reduce import expand_gradient, reduce_elements
from fastvae.reference.latent import kl_normal

_LOG_2PI = math.log(2.0 * math.pi)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in the accumulation dtype; an 8-bit image in [0, 1]."""
    if tensor is None:
        return None
    return tensor.to(dtype) / 255.0 if tensor.dtype == torch.uint8 else tensor.to(dtype)


def loss_elements(input, target, weight=None, pos_weight=None, logvar=None, *, likelihood: int) -> Tensor:
    """The loss of each element, all arguments in one dtype. ``logvar`` broadcasts to ``input``."""
    if likelihood == LIKELIHOODS["bce_with_logits"]:
        # torch's own function is not differentiable with respect to pos_weight.
        factor = 1.0 if pos_weight is None else 1.0 + (pos_weight - 1.0) * target
        losses = (1.0 - target) * input - factor * F.logsigmoid(input)
    elif likelihood == LIKELIHOODS["bce"]:
        log_one, log_zero = torch.log(input).clamp(min=-100.0), torch.log1p(-input).clamp(min=-100.0)
        losses = -(target * log_one + (1.0 - target) * log_zero)
    elif likelihood == LIKELIHOODS["mse"]:
        losses = (input - target) ** 2
    else:
        losses = 0.5 * (_LOG_2PI + logvar + (input - target) ** 2 * torch.exp(-logvar))
    return losses if weight is None else losses * weight


def loss_gradients(input, target, weight=None, pos_weight=None, logvar=None, *, likelihood: int):
    """d loss / d (input, target, logvar) of each element; the last is ``None`` without ``logvar``."""
    grad_logvar = None
    if likelihood == LIKELIHOODS["bce_with_logits"]:
        excess = 0.0 if pos_weight is None else pos_weight - 1.0
        factor = 1.0 + excess * target
        grad_input = (1.0 - target) - factor * torch.sigmoid(-input)
        grad_target = excess * F.softplus(-input) - input
    elif likelihood == LIKELIHOODS["bce"]:
        # The denominator's floor is torch's.
        grad_input = (input - target) / ((1.0 - input) * input).clamp(min=1e-12)
        grad_target = torch.log1p(-input).clamp(min=-100.0) - torch.log(input).clamp(min=-100.0)
    elif likelihood == LIKELIHOODS["mse"]:
        grad_input = 2.0 * (input - target)
        grad_target = -grad_input
    else:
        scaled = (input - target) * torch.exp(-logvar)
        grad_input, grad_target = scaled, -scaled
        grad_logvar = 0.5 * (1.0 - (input - target) * scaled)
    if weight is not None:
        grad_input, grad_target = grad_input * weight, grad_target * weight
    return grad_input, grad_target, grad_logvar


def promote(input: Tensor, target: Tensor) -> torch.dtype:
    """The dtype of an elementwise loss: torch's promotion, but for uint8 targets, which are images."""
    return torch.promote_types(input.dtype, target.dtype) if target.is_floating_point() else input.dtype


def loss(input, target, weight, pos_weight, logvar, likelihood: int, reduction: int) -> Tensor:
    """The operator's loss, differentiable any number of times in either mode."""
    promoted = promote(input, target)
    dtype = accumulation_dtype(promoted)
    arguments = [_wide(t, dtype) for t in (input, target, weight, pos_weight, logvar)]
    return reduce_elements(loss_elements(*arguments, likelihood=likelihood), reduction, promoted)


def _number(weight: Tensor | None) -> Tensor | None:
    """A weight of integers or bools, which are numbers and no image, as one of floats."""
    return weight if weight is None or weight.is_floating_point() else weight.to(torch.float32)


def _check_unit_interval(**tensors: Tensor) -> None:
    for name, values in tensors.items():
        if values.dtype != torch.uint8 and not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name}: got values outside [0, 1], takes values in [0, 1]")


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
    """:func:`fastvae.functional.binary_cross_entropy_with_logits`, differentiable any number of times; the arguments may learn too.

    ``grad_scale`` changes nothing: no gradient is written in the forward pass.
    """
    if validate:
        _check_unit_interval(target=target)
    return loss(input, target, _number(weight), _number(pos_weight), None, LIKELIHOODS["bce_with_logits"], reduction_number(reduction))


def binary_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    *,
    grad_scale: float = 1.0,
    validate: bool = False,
) -> Tensor:
    """:func:`fastvae.functional.binary_cross_entropy`, differentiable any number of times; the weight may learn too.

    ``grad_scale`` changes nothing: no gradient is written in the forward pass.
    """
    if validate:
        _check_unit_interval(input=input, target=target)
    return loss(input, target, _number(weight), None, None, LIKELIHOODS["bce"], reduction_number(reduction))


def mse_loss(input: Tensor, target: Tensor, reduction: Reduction = "mean", *, grad_scale: float = 1.0) -> Tensor:
    """:func:`fastvae.functional.mse_loss`, differentiable any number of times.

    ``grad_scale`` changes nothing: no gradient is written in the forward pass.
    """
    target = target if target.is_floating_point() or target.dtype == torch.uint8 else target.to(input.dtype)
    return loss(input, target, None, None, None, LIKELIHOODS["mse"], reduction_number(reduction))


def gaussian_nll(
    input: Tensor, target: Tensor, logvar: Tensor | float, reduction: Reduction = "batchmean", *, grad_scale: float = 1.0
) -> Tensor:
    """:func:`fastvae.functional.gaussian_nll`, differentiable any number of times.

    ``grad_scale`` changes nothing: no gradient is written in the forward pass.
    """
    logvar = torch.as_tensor(logvar, device=input.device)
    return loss(input, target, None, None, logvar, LIKELIHOODS["gaussian"], reduction_number(reduction))


_ELBO_LIKELIHOODS: dict[str, Callable[..., Tensor]] = {
    "bernoulli_logits": binary_cross_entropy_with_logits,
    "bernoulli": binary_cross_entropy,
    "gaussian": lambda input, target, **kwargs: gaussian_nll(input, target, 0.0, **kwargs),
}


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
    """:func:`fastvae.functional.elbo_loss`, differentiable any number of times."""
    check_choice("reduction", reduction, get_args(BoundReduction))
    recon_loss = _ELBO_LIKELIHOODS[check_choice("likelihood", likelihood, _ELBO_LIKELIHOODS)](recon, target, reduction=reduction)
    kl = kl_normal(mu, logvar, reduction=reduction, free_bits=free_bits)
    samples = mu.shape[0] if reduction == "sum" else 1
    penalty = kl if capacity is None else (kl - capacity * samples).abs()
    return ELBO(recon_loss + beta * penalty, recon_loss, kl)


def vae_loss(x: Tensor, x_recon: Tensor, mu: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fastvae.functional.vae_loss`, differentiable any number of times."""
    loss, recon_loss, kl_loss = elbo_loss(x_recon, x, mu, log_var, likelihood="bernoulli", reduction="sum")
    return loss, recon_loss, kl_loss


def _widen(operands) -> list[Tensor | None]:
    dtype = accumulation_dtype(operands[0].dtype)
    return [_wide(t, dtype) for t in operands]


def _sum_to(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of a broadcast argument, in its shape and dtype."""
    return gradient.sum_to_size(like.shape).to(like.dtype).contiguous()


def _gradients(grad_elements: Tensor, operands, likelihood: int, with_target: bool) -> ops.BackwardResults:
    input, target, *_, logvar = operands
    grads: list[Any] = [None if g is None else g * grad_elements for g in loss_gradients(*_widen(operands), likelihood=likelihood)]
    grad_target = grads[1].to(target.dtype).contiguous() if with_target else target.new_empty((0,))
    grad_logvar = input.new_empty((0,)) if logvar is None else _sum_to(grads[2].expand(input.shape), logvar)
    return ops.BackwardResults(grads[0].to(input.dtype).contiguous(), grad_target, grad_logvar)


@in_plain_torch(ops.Reconstruction)
def _in_plain_torch(arguments: ops.ForwardArguments) -> tuple[Tensor]:
    # torch.compile of torch 2.10 traces the fields of a named tuple, and no property.
    input, target, weight, pos_weight, logvar, likelihood, reduction, _, _ = arguments
    return (loss(input, target, weight, pos_weight, logvar, likelihood, reduction),)


@ops.forward.implement("reference")
def _reconstruction_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input = arguments.input
    losses = loss_elements(*_widen(arguments.operands), likelihood=arguments.likelihood)
    reduced = reduce_elements(losses, arguments.reduction, input.dtype)
    if not arguments.with_grad:
        return ops.ForwardResults(reduced, input.new_empty((0,)), input.new_empty((0,)))
    scale = torch.full((), arguments.grad_scale, dtype=accumulation_dtype(input.dtype), device=input.device)
    grad_elements = expand_gradient(scale, input.shape, arguments.reduction)
    grads = _gradients(grad_elements, arguments.operands, arguments.likelihood, with_target=False)
    return ops.ForwardResults(reduced, grads.grad_input, grads.grad_logvar)


@ops.backward.implement("reference")
def _reconstruction_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    grad_elements = expand_gradient(arguments.grad_output, arguments.input.shape, arguments.reduction)
    return _gradients(grad_elements, arguments.operands, arguments.likelihood, arguments.with_target)


@ops.rescale_.implement("reference")
def _reconstruction_rescale_(arguments: ops.RescaleArguments) -> None:
    arguments.grad.mul_(arguments.grad_output / arguments.expected)


@ops.backward_.implement("reference")
def _reconstruction_backward_(arguments: ops.BackwardInPlaceArguments) -> None:
    grad_elements = expand_gradient(arguments.grad_output, arguments.input.shape, arguments.reduction)
    grads = _gradients(grad_elements, arguments.operands, arguments.likelihood, with_target=False)
    arguments.grad_input.copy_(grads.grad_input)
    arguments.grad_logvar.copy_(grads.grad_logvar)
