"""Snake, a periodic activation: the operators and their autograd.Function."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops._autograd import first_derivative_only
from fastvae.ops._operator import Operator
from fastvae.ops._results import accumulation_dtype, empty_in_layout, empty_like


def gain_of(input: Tensor, alpha: Tensor, beta: Tensor | None, eps: float) -> Tensor:
    """``1 / (beta + eps)`` in the dtype of sums; ``beta`` is ``alpha`` where there is none."""
    return ((alpha if beta is None else beta).to(accumulation_dtype(input.dtype)) + eps).reciprocal()


class ForwardArguments(NamedTuple):
    """``frequency`` and ``gain`` are ``(channels,)``; the result is ``input + gain * sin(frequency * input)^2``, laid out as ``input``."""

    input: Tensor
    frequency: Tensor
    gain: Tensor

    def allocate(self) -> Tensor:
        return empty_in_layout(self.input)


class BackwardResults(NamedTuple):
    grad_input: Tensor
    grad_frequency: Tensor
    grad_gain: Tensor


class BackwardArguments(NamedTuple):
    grad_output: Tensor
    input: Tensor
    frequency: Tensor
    gain: Tensor

    def allocate(self) -> BackwardResults:
        return BackwardResults(empty_in_layout(self.input), empty_like(self.frequency), empty_like(self.gain))


forward = Operator("snake_forward", ForwardArguments)
backward = Operator("snake_backward", BackwardArguments)


class Snake(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    @first_derivative_only("fastvae.reference.snake")
    def backward(ctx, grad_output):
        if grad_output is None:
            return forward.gradients()
        grad_input, grad_frequency, grad_gain = backward.overloads[ctx.backend](grad_output, *ctx.saved_tensors)
        return forward.gradients(input=grad_input, frequency=grad_frequency, gain=grad_gain)
