"""Reconstruction losses in plain PyTorch: the definition and the oracle of the tests."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops import reconstruction as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import REDUCTIONS, accumulation_dtype
from fastvae.ops.reconstruction import LIKELIHOODS
from fastvae.reference._reduce import expand_gradient, reduce_elements

_LOG_2PI = math.log(2.0 * math.pi)


def _wide(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The tensor in the accumulation dtype; an 8-bit image in [0, 1]."""
    if tensor is None:
        return None
    return tensor.to(dtype) / 255.0 if tensor.dtype == torch.uint8 else tensor.to(dtype)


def loss_elements(input, target, weight=None, pos_weight=None, logvar=None, *, likelihood: int) -> Tensor:
    """The loss of each element, all arguments in one dtype. ``logvar`` broadcasts to ``input``."""
    if likelihood == LIKELIHOODS["bce_with_logits"]:
        losses = F.binary_cross_entropy_with_logits(input, target, reduction="none", pos_weight=pos_weight)
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


def binary_cross_entropy_with_logits(input, target, weight=None, reduction="mean", pos_weight=None) -> Tensor:
    """:func:`fastvae.functional.binary_cross_entropy_with_logits`, differentiable any number of times."""
    return loss(input, target, weight, pos_weight, None, LIKELIHOODS["bce_with_logits"], REDUCTIONS[reduction])


def binary_cross_entropy(input, target, weight=None, reduction="mean") -> Tensor:
    """:func:`fastvae.functional.binary_cross_entropy`, differentiable any number of times."""
    return loss(input, target, weight, None, None, LIKELIHOODS["bce"], REDUCTIONS[reduction])


def mse_loss(input, target, reduction="mean") -> Tensor:
    """:func:`fastvae.functional.mse_loss`, differentiable any number of times."""
    target = target if target.is_floating_point() or target.dtype == torch.uint8 else target.to(input.dtype)
    return loss(input, target, None, None, None, LIKELIHOODS["mse"], REDUCTIONS[reduction])


def gaussian_nll(input, target, logvar, reduction="batchmean") -> Tensor:
    """:func:`fastvae.functional.gaussian_nll`, differentiable any number of times; ``logvar`` broadcasts to ``input``."""
    logvar = torch.as_tensor(logvar, device=input.device)
    return loss(input, target, None, None, logvar, LIKELIHOODS["gaussian"], REDUCTIONS[reduction])


def _widen(operands) -> list[Tensor | None]:
    dtype = accumulation_dtype(operands[0].dtype)
    return [_wide(t, dtype) for t in operands]


def _sum_to(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient of a broadcast argument, in its shape and dtype."""
    return gradient.sum_to_size(like.shape).to(like.dtype).contiguous()


def _gradients(grad_elements: Tensor, operands, likelihood: int, with_target: bool) -> ops.BackwardResults:
    input, target, *_, logvar = operands
    grads = [None if g is None else g * grad_elements for g in loss_gradients(*_widen(operands), likelihood=likelihood)]
    grad_target = grads[1].to(target.dtype).contiguous() if with_target else target.new_empty((0,))
    grad_logvar = input.new_empty((0,)) if logvar is None else _sum_to(grads[2].expand(input.shape), logvar)
    return ops.BackwardResults(grads[0].to(input.dtype).contiguous(), grad_target, grad_logvar)


@in_plain_torch(ops.Reconstruction)
def _in_plain_torch(arguments: ops.ForwardArguments) -> tuple[Tensor]:
    return (loss(*arguments.operands, arguments.likelihood, arguments.reduction),)


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
