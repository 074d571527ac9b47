"""Reconstruction losses in plain PyTorch, block by block; the forward pass writes the gradient where it is asked for."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fallback._blocks import Block, Reduced, Rooms, blocks, gradient_matrix, matrix_shape, shared_matrix, take, written
from fastvae.fallback._register import implements
from fastvae.ops import reconstruction as ops
from fastvae.ops._results import accumulation_dtype, empty_if, empty_like, reduction_scale
from fastvae.ops.reconstruction import LIKELIHOODS

_LOG_2PI = math.log(2.0 * math.pi)
_BCE_LOGITS, _BCE, _MSE = (LIKELIHOODS[name] for name in ("bce_with_logits", "bce", "mse"))

# Input, target, weight, pos_weight and logvar; a tensor or None each.
Operands = tuple[Any, Any, Any, Any, Any]


class _Matrices:
    """The operands of a loss as matrices (samples, elements of a sample), in which those that are shared are broadcast."""

    def __init__(self, input, target, weight, pos_weight, logvar):
        self.dtype, self.size = accumulation_dtype(input.dtype), matrix_shape(input.shape)
        self.full = input.reshape(self.size), target.reshape(self.size)
        shared = (weight, pos_weight, logvar)
        self.shared: list[Any] = [None if t is None else shared_matrix(t.to(self.dtype), input.shape) for t in shared]
        self.device = input.device

    def blocks(self):
        return blocks(*self.size, self.device)

    def at(self, block: Block) -> Operands:
        """Input, target, weight, pos_weight and logvar of a block in the accumulation dtype."""
        input, target = (take(t, block) for t in self.full)
        target = target.to(self.dtype).div_(255.0) if target.dtype == torch.uint8 else target.to(self.dtype)
        weight, pos_weight, logvar = (None if t is None else take(t, block) for t in self.shared)
        return input.to(self.dtype), target, weight, pos_weight, logvar


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

    def __init__(self, matrices: _Matrices, operands, scale: float | Tensor, likelihood: int, with_target: bool):
        self.matrices, self.scale, self.likelihood = matrices, scale, likelihood
        input, target, _, _, self.logvar = operands
        self.input, self.target = empty_like(input), empty_if(with_target, target)
        # Blocks add to the gradient of a shared argument, so it is rounded to its dtype at the end.
        self.shared = None if self.logvar is None else torch.zeros_like(matrices.shared[2], memory_format=torch.contiguous_format)

    def write(self, block: Block, values: Operands, rooms: Rooms) -> None:
        scale = self.scale if isinstance(self.scale, float) else take(self.scale, block)
        for output, fill in ((self.input, _write_input_gradients), (self.target, _write_target_gradients)):
            if output.numel():
                with written(take(output.view(self.matrices.size), block), rooms["gradient"]) as gradients:
                    fill(gradients, *values, self.likelihood, scale)
        if self.shared is not None:
            part = take(self.shared, block)
            part.add_(_logvar_gradients(values[0], values[1], values[4]).mul_(scale).sum_to_size(part.shape))

    def results(self) -> ops.BackwardResults:
        if self.shared is None:
            return ops.BackwardResults(self.input, self.target, self.input.new_empty((0,)))
        return ops.BackwardResults(self.input, self.target, _sum_shared(self.shared, self.logvar, self.input.shape))


def _sum_shared(gradient: Tensor, value: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of :func:`shared_matrix`, in the shape and dtype of ``value``."""
    if len(shape):
        trailing = shape[1:] if gradient.shape[1] != 1 else value.shape[1:]
        gradient = gradient.view(gradient.shape[0], *trailing)
    return gradient.sum_to_size(value.shape).to(value.dtype).contiguous()


@implements(ops.forward)
def reconstruction_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, likelihood = arguments.input, arguments.likelihood
    matrices, reduced = _Matrices(*arguments.operands), Reduced(input, arguments.reduction)
    scale = arguments.grad_scale * reduction_scale(input.shape, arguments.reduction)
    gradients = _Gradients(matrices, arguments.operands, scale, likelihood, with_target=False) if arguments.with_grad else None
    with Rooms(matrices.dtype) as rooms:
        for block in matrices.blocks():
            values = matrices.at(block)
            reduced.add(block, _losses(*values, likelihood))
            if gradients is not None:
                gradients.write(block, values, rooms)
    if gradients is None:
        return ops.ForwardResults(reduced.result(), input.new_empty((0,)), input.new_empty((0,)))
    grads = gradients.results()
    return ops.ForwardResults(reduced.result(), grads.grad_input, grads.grad_logvar)


@implements(ops.backward)
def reconstruction_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    return _gradients(arguments, arguments.with_target)


def _gradients(arguments: ops.BackwardArguments | ops.BackwardInPlaceArguments, with_target: bool) -> ops.BackwardResults:
    matrices = _Matrices(*arguments.operands)
    scale = gradient_matrix(arguments.grad_output, arguments.input.shape, arguments.reduction, matrices.dtype)
    gradients = _Gradients(matrices, arguments.operands, scale, arguments.likelihood, with_target)
    with Rooms(matrices.dtype) as rooms:
        for block in matrices.blocks():
            gradients.write(block, matrices.at(block), rooms)
    return gradients.results()


@implements(ops.backward_)
def reconstruction_backward_(arguments: ops.BackwardInPlaceArguments) -> None:
    # Where grad_output is what was expected, the gradients are computed again all the same: nothing here may wait for the device.
    grads = _gradients(arguments, with_target=False)
    arguments.grad_input.copy_(grads.grad_input)
    arguments.grad_logvar.copy_(grads.grad_logvar)


@implements(ops.rescale_)
def reconstruction_rescale_(arguments: ops.RescaleArguments) -> None:
    arguments.grad.mul_(arguments.grad_output / arguments.expected)
