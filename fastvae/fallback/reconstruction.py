"""Reconstruction losses in plain PyTorch, block by block; the forward pass writes the gradient where it is asked for."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._ops import LIKELIHOODS, accumulation_dtype
from fastvae.fallback._blocks import Block, Reduced, blocks, gradient_matrix, matrix_shape, shared_matrix, take, written
from fastvae.fallback._register import implements
from fastvae.reference._reduce import reduction_scale

_LOG_2PI = math.log(2.0 * math.pi)
_BCE_LOGITS, _BCE, _MSE = (LIKELIHOODS[name] for name in ("bce_with_logits", "bce", "mse"))


class _Arguments:
    """The arguments of a loss as matrices (samples, elements of a sample), in which those that are shared are broadcast."""

    def __init__(self, input, target, weight, pos_weight, logvar):
        self.dtype, self.size = accumulation_dtype(input.dtype), matrix_shape(input.shape)
        self.full = input.reshape(self.size), target.reshape(self.size)
        shared = (weight, pos_weight, logvar)
        self.shared = [None if t is None else shared_matrix(t.to(self.dtype), input.shape) for t in shared]
        self.device = input.device

    def blocks(self):
        return blocks(*self.size, self.device)

    def at(self, block: Block) -> list[Tensor | None]:
        """Input, target, weight, pos_weight and logvar of a block in the accumulation dtype."""
        input, target = (take(t, block) for t in self.full)
        target = target.to(self.dtype).div_(255.0) if target.dtype == torch.uint8 else target.to(self.dtype)
        return [input.to(self.dtype), target, *(None if t is None else take(t, block) for t in self.shared)]


def _losses(input, target, weight, pos_weight, logvar, likelihood: int) -> Tensor:
    """The loss of each element."""
    if likelihood == _BCE_LOGITS:
        losses = F.binary_cross_entropy_with_logits(input, target, reduction="none", pos_weight=pos_weight)
    elif likelihood == _BCE:
        # torch's own raises where a probability lies outside [0, 1], and waits for the device to know.
        log_one, log_zero = _log_probabilities(input)
        losses = torch.lerp(log_zero, log_one, target).neg_()
    elif likelihood == _MSE:
        losses = F.mse_loss(input, target, reduction="none")
    else:
        losses = F.mse_loss(input, target, reduction="none").mul_(torch.exp(-logvar)).add_(logvar + _LOG_2PI).mul_(0.5)
    return losses if weight is None else losses.mul_(weight)


def _log_probabilities(input: Tensor) -> tuple[Tensor, Tensor]:
    return torch.log(input).clamp_(min=-100.0), torch.neg(input).log1p_().clamp_(min=-100.0)


def _write_input_gradients(out: Tensor, input, target, weight, pos_weight, logvar, likelihood: int, scale: float | Tensor) -> None:
    """``scale`` times d loss / d input of each element."""
    if likelihood == _BCE_LOGITS and pos_weight is None:
        torch.sigmoid(input, out=out).sub_(target)
    elif likelihood == _BCE_LOGITS:
        # (1 - t) - (1 + (p - 1) t) sigmoid(-x)
        factor = torch.mul(target, pos_weight - 1.0).add_(1.0)
        torch.neg(input, out=out).sigmoid_().mul_(factor).add_(target).neg_().add_(1.0)
    elif likelihood == _BCE:
        # The denominator's floor is torch's.
        torch.sub(input, target, out=out).div_(torch.rsub(input, 1.0).mul_(input).clamp_(min=1e-12))
    elif likelihood == _MSE:
        torch.sub(input, target, out=out)
        scale = 2.0 * scale
    else:
        torch.sub(input, target, out=out).mul_(torch.exp(-logvar))
    out.mul_(scale if weight is None else scale * weight)


def _write_target_gradients(out: Tensor, input, target, weight, pos_weight, logvar, likelihood: int, scale: float | Tensor) -> None:
    """``scale`` times d loss / d target of each element."""
    if likelihood == _BCE_LOGITS:
        torch.neg(input, out=out)
        if pos_weight is not None:
            out.sub_(F.logsigmoid(input).mul_(pos_weight - 1.0))
    elif likelihood == _BCE:
        log_one, log_zero = _log_probabilities(input)
        torch.sub(log_zero, log_one, out=out)
    else:
        _write_input_gradients(out, input, target, weight, pos_weight, logvar, likelihood, scale)
        out.neg_()
        return
    out.mul_(scale if weight is None else scale * weight)


def _logvar_gradients(input: Tensor, target: Tensor, logvar: Tensor) -> Tensor:
    """d loss / d logvar of each element."""
    return (input - target).square_().mul_(torch.exp(-logvar).neg_()).add_(1.0).mul_(0.5)


class _Gradients:
    """Fills the gradients of a loss block by block; ``scale`` is a number or a matrix that broadcasts."""

    def __init__(self, arguments: _Arguments, input, target, logvar, scale: float | Tensor, likelihood: int, with_target: bool):
        self.arguments, self.scale, self.likelihood = arguments, scale, likelihood
        self.input = input.new_empty(input.shape)
        self.target = target.new_empty(target.shape if with_target else (0,))
        self.logvar = logvar
        # Blocks add to the gradient of a shared argument, so it is rounded to its dtype at the end.
        self.shared = None if logvar is None else torch.zeros_like(arguments.shared[2], memory_format=torch.contiguous_format)

    def write(self, block: Block, values: list[Tensor | None]) -> None:
        scale = self.scale if isinstance(self.scale, float) else take(self.scale, block)
        size, dtype = self.arguments.size, self.arguments.dtype
        for output, fill in ((self.input, _write_input_gradients), (self.target, _write_target_gradients)):
            if output.numel():
                with written(take(output.view(size), block), dtype) as gradients:
                    fill(gradients, *values, self.likelihood, scale)
        if self.shared is not None:
            part = take(self.shared, block)
            part.add_(_logvar_gradients(values[0], values[1], values[4]).mul_(scale).sum_to_size(part.shape))

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.shared is None:
            return self.input, self.target, self.input.new_empty((0,))
        return self.input, self.target, _sum_shared(self.shared, self.logvar, self.input.shape)


def _sum_shared(gradient: Tensor, value: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of :func:`shared_matrix`, in the shape and dtype of ``value``."""
    if len(shape):
        trailing = shape[1:] if gradient.shape[1] != 1 else value.shape[1:]
        gradient = gradient.view(gradient.shape[0], *trailing)
    return gradient.sum_to_size(value.shape).to(value.dtype).contiguous()


@implements("reconstruction_forward")
def reconstruction_forward(input, target, weight, pos_weight, logvar, likelihood, reduction, grad_scale, with_grad):
    arguments = _Arguments(input, target, weight, pos_weight, logvar)
    reduced, scale = Reduced(input, reduction), grad_scale * reduction_scale(input.shape, reduction)
    gradients = _Gradients(arguments, input, target, logvar, scale, likelihood, False) if with_grad else None
    for block in arguments.blocks():
        values = arguments.at(block)
        reduced.add(block, _losses(*values, likelihood))
        if gradients is not None:
            gradients.write(block, values)
    if gradients is None:
        return reduced.result(), input.new_empty((0,)), input.new_empty((0,))
    grad_input, _, grad_logvar = gradients.results()
    return reduced.result(), grad_input, grad_logvar


@implements("reconstruction_backward")
def reconstruction_backward(grad_output, input, target, weight, pos_weight, logvar, likelihood, reduction, with_target):
    arguments = _Arguments(input, target, weight, pos_weight, logvar)
    scale = gradient_matrix(grad_output, input.shape, reduction, arguments.dtype)
    gradients = _Gradients(arguments, input, target, logvar, scale, likelihood, with_target)
    for block in arguments.blocks():
        gradients.write(block, arguments.at(block))
    return gradients.results()


@implements("reconstruction_backward_")
def reconstruction_backward_(
    grad_input, grad_logvar, grad_output, expected, input, target, weight, pos_weight, logvar, likelihood, reduction
):
    # Where grad_output is what was expected, the gradients are computed again all the same: nothing here may wait for the device.
    gradients = reconstruction_backward(grad_output, input, target, weight, pos_weight, logvar, likelihood, reduction, False)
    grad_input.copy_(gradients[0])
    grad_logvar.copy_(gradients[2])


@implements("reconstruction_rescale_")
def reconstruction_rescale_(grad, grad_output, expected):
    grad.mul_(grad_output / expected)
