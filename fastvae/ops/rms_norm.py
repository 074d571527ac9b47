"""RMS normalisation and its activation: the operators and their autograd.Function."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops._autograd import first_derivative_only
from fastvae.ops._operator import Operator
from fastvae.ops._results import accumulation_dtype, empty_in_layout, empty_like

# Mirrored by csrc/common/rms_norm_formulas.h and by the constexprs in kernels/.
EPS_MODES = {"add": 0, "clamp": 1}


def limit_of_rrms(channels, eps: float) -> float:
    """The largest 1 / RMS in the mode ``"clamp"``, which bounds the Euclidean norm of a position's channels from below by ``eps``."""
    return math.sqrt(channels) / eps if eps > 0.0 else math.inf


def modulated(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of ``(normal * weight + bias) * (1 + scale) + shift``, whose scale and shift are ``(batch, channels)``."""
    dtype = accumulation_dtype(input.dtype)
    if scale is not None:
        factor = 1.0 + scale.to(dtype)
        weight = factor if weight is None else factor * weight.to(dtype)
        bias = None if bias is None else factor * bias.to(dtype)
    if shift is not None:
        bias = shift.to(dtype) if bias is None else shift.to(dtype) + bias.to(dtype)
    return weight, bias


class ForwardResults(NamedTuple):
    """``rrms``, 1 / RMS, is that of the channels of each position, ``(batch, ...)`` without the channels, in the dtype of sums."""

    output: Tensor  # in the memory layout of input
    rrms: Tensor


class ForwardArguments(NamedTuple):
    """``weight`` and ``bias`` are those of the channels, ``(channels,)``, or of each sample's, ``(batch, channels)``."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    eps_mode: int
    activation: int

    def allocate(self) -> ForwardResults:
        shape = (self.input.shape[0], *self.input.shape[2:])
        return ForwardResults(empty_in_layout(self.input), self.input.new_empty(shape, dtype=accumulation_dtype(self.input.dtype)))


class BackwardResults(NamedTuple):
    """The gradient of an absent parameter has no elements."""

    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


class BackwardArguments(NamedTuple):
    grad_output: Tensor
    input: Tensor
    rrms: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    eps_mode: int
    activation: int

    def allocate(self) -> BackwardResults:
        grads = (self.input.new_empty((0,)) if t is None else empty_like(t) for t in (self.weight, self.bias))
        return BackwardResults(empty_in_layout(self.input), *grads)


forward = Operator("rms_norm_forward", ForwardArguments)
backward = Operator("rms_norm_backward", BackwardArguments)


class RMSNorm(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, bias, *ctx.numbers, ctx.backend = inputs
        _, rrms = output
        ctx.mark_non_differentiable(rrms)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, rrms, weight, bias)

    @staticmethod
    @first_derivative_only("fastvae.reference.rms_norm")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return forward.gradients()
        *_, weight, bias = saved = ctx.saved_tensors
        grad_input, grad_weight, grad_bias = backward.overloads[ctx.backend](grad_output, *saved, *ctx.numbers)
        return forward.gradients(
            input=grad_input,
            weight=None if weight is None else grad_weight,
            bias=None if bias is None else grad_bias,
        )
