"""Mixtures of discretized logistics: the operators and their autograd.Function."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops._autograd import first_derivative_only, may_use_written, scale_written
from fastvae.ops._operator import Operator, Written
from fastvae.ops._results import empty_if, empty_like, empty_reduced

# Log scales below this count as this and have no gradient. csrc/common/logistic_mixture_formulas.h has the same number.
MIN_LOG_SCALE = -7.0


def parameters_per_position(num_mixtures: int, channels: int) -> int:
    """The numbers that ``input`` has for each position: a logit for each component (none for a single one), and for each component a mean
    and a log scale of each channel and a coefficient for each pair of channels."""
    logits = num_mixtures if num_mixtures > 1 else 0
    return logits + num_mixtures * (2 * channels + channels * (channels - 1) // 2)


def one_plane(input: Tensor) -> Tensor:
    """One value for each position: a tensor of the loss's shape, ``(batch, ...)``, where ``input`` is ``(batch, parameters, ...)``."""
    return input.select(1, 0)


class ForwardResults(NamedTuple):
    """The gradient has no elements where it was not asked for."""

    loss: Tensor
    grad_input: Tensor


class ForwardArguments(NamedTuple):
    """``with_grad``, for scalar reductions only, asks for ``grad_scale`` times the gradient of the loss."""

    input: Tensor
    target: Tensor
    num_mixtures: int
    reduction: int
    grad_scale: float
    with_grad: bool

    def allocate(self) -> ForwardResults:
        return ForwardResults(empty_reduced(one_plane(self.input), self.reduction), empty_if(self.with_grad, self.input))


class BackwardArguments(NamedTuple):
    grad_output: Tensor
    input: Tensor
    target: Tensor
    num_mixtures: int
    reduction: int

    def allocate(self) -> Tensor:
        return empty_like(self.input)


class BackwardInPlaceArguments(NamedTuple):
    """A gradient that was written for an incoming one of ``expected`` is computed again where ``grad_output`` is another. The device
    compares the two numbers, so that nothing waits for it."""

    grad_input: Written
    grad_output: Tensor
    expected: float
    input: Tensor
    target: Tensor
    num_mixtures: int
    reduction: int

    def allocate(self) -> None:
        """The operator only writes."""


forward = Operator("logistic_mixture_forward", ForwardArguments)
backward = Operator("logistic_mixture_backward", BackwardArguments)
backward_ = Operator("logistic_mixture_backward_", BackwardInPlaceArguments)


class LogisticMixture(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, target, ctx.num_mixtures, ctx.reduction, ctx.grad_scale, ctx.with_grad, ctx.backend = inputs
        _, grad_input = output
        ctx.mark_non_differentiable(grad_input)
        ctx.set_materialize_grads(False)
        # The inputs too: a backward pass over a retained graph starts from them.
        ctx.save_for_backward(input, target, grad_input)

    @staticmethod
    @first_derivative_only("fastvae.reference.logistic_mixture")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return forward.gradients()
        grad_input = _written_gradient(ctx, grad_output)
        if grad_input is None:
            input, target, _ = ctx.saved_tensors
            grad_input = backward.overloads[ctx.backend](grad_output, input, target, ctx.num_mixtures, ctx.reduction)
        return forward.gradients(input=grad_input)


def _written_gradient(ctx, grad_output: Tensor) -> Tensor | None:
    """The gradient that the forward pass wrote, brought to ``grad_output``; None where it has to be computed again."""
    if not ctx.with_grad or not may_use_written(grad_output):
        return None
    input, target, grad_input = ctx.saved_tensors
    if grad_input.is_cpu:
        scaled = scale_written([grad_input], grad_output, ctx.grad_scale)
        return None if scaled is None else scaled[0]
    # An alias, because autograd's version check would see a write to the gradient itself.
    alias = grad_input.data
    backward_.overloads[ctx.backend](alias, grad_output, ctx.grad_scale, input, target, ctx.num_mixtures, ctx.reduction)
    return grad_input
