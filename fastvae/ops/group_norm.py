"""Group normalisation and its activation: the operators and their autograd.Function."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.ops._autograd import first_derivative_only
from fastvae.ops._operator import Operator, Size, Written
from fastvae.ops._results import empty_in_layout, empty_like, widest_dtype

# Mirrored by csrc/common/norm_activation.h and by the constexprs in kernels/.
NORM_ACTIVATIONS = {"none": 0, "silu": 1, "relu": 2, "gelu": 3}


class TorchActivation(NamedTuple):
    """An activation act as torch has it: its module, the operator that gives act(u), and what gives act'(u) * grad_output for grad_output
    and u, in ``grad_input`` where that is named."""

    module: type[nn.Module]
    forward: Any
    backward: Callable[..., Tensor]


_aten = torch.ops.aten
TORCH_ACTIVATIONS = {
    "silu": TorchActivation(nn.SiLU, _aten.silu, _aten.silu_backward),
    "relu": TorchActivation(nn.ReLU, _aten.relu, lambda grad_output, u, **out: _aten.threshold_backward(grad_output, u, 0, **out)),
    "gelu": TorchActivation(nn.GELU, _aten.gelu, _aten.gelu_backward),
}
_BY_NUMBER = {NORM_ACTIVATIONS[name]: activation for name, activation in TORCH_ACTIVATIONS.items()}


def torch_activation(number: int) -> TorchActivation | None:
    """The activation of a number of ``NORM_ACTIVATIONS``; None for the normalisation alone."""
    return _BY_NUMBER.get(number)


def activated(u: Tensor, number: int) -> Tensor:
    """act(u) by torch, differentiable any number of times."""
    activation = torch_activation(number)
    return u if activation is None else activation.forward(u)


class ForwardResults(NamedTuple):
    """``mean`` and ``rstd``, 1 / standard deviation, are those of each sample's groups, ``(batch, num_groups)``, in
    :func:`widest_dtype`: float32 does not hold a large mean to within a small standard deviation."""

    output: Tensor  # in the memory layout of input
    mean: Tensor
    rstd: Tensor


class ForwardArguments(NamedTuple):
    input: Tensor
    num_groups: Size
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    activation: int

    def allocate(self) -> ForwardResults:
        shape, dtype = (self.input.shape[0], self.num_groups), widest_dtype(self.input.device)
        mean, rstd = (self.input.new_empty(shape, dtype=dtype) for _ in range(2))
        return ForwardResults(empty_in_layout(self.input), mean, rstd)


class RecomputeArguments(NamedTuple):
    """The operands of the forward pass and its results, for a backward pass that needs the output again.

    The result does not depend on ``grad_output``: that it is an argument keeps torch.compile from computing the result in the forward pass,
    and from storing it for the backward pass.
    """

    grad_output: Tensor
    input: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_groups: Size
    eps: float
    activation: int

    def allocate(self) -> Tensor:
        return empty_in_layout(self.input)

    @property
    def forward(self) -> ForwardArguments:
        """The arguments of the forward pass."""
        return ForwardArguments(self.input, self.num_groups, self.weight, self.bias, self.eps, self.activation)


class BackwardResults(NamedTuple):
    """The gradient of an absent parameter has no elements."""

    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


class BackwardArguments(NamedTuple):
    grad_output: Tensor
    input: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_groups: Size
    activation: int

    def allocate(self) -> BackwardResults:
        grads = (self.input.new_empty((0,)) if t is None else empty_like(t) for t in (self.weight, self.bias))
        return BackwardResults(empty_in_layout(self.input), *grads)


class RestoringBackwardArguments(NamedTuple):
    """The operator leaves the output of the forward pass in ``grad_output``; ``eps`` is that of the forward pass."""

    grad_output: Written
    input: Tensor
    mean: Tensor
    rstd: Tensor
    weight: Tensor | None
    bias: Tensor | None
    num_groups: Size
    eps: float
    activation: int

    def allocate(self) -> BackwardResults:
        return self.backward.allocate()

    @property
    def recompute(self) -> RecomputeArguments:
        return RecomputeArguments(*self)

    @property
    def backward(self) -> BackwardArguments:
        return BackwardArguments(*self[:-2], self.activation)


forward = Operator("group_norm_forward", ForwardArguments)
backward = Operator("group_norm_backward", BackwardArguments)
# The output of the forward pass to the last bit.
recompute = Operator("group_norm_recompute", RecomputeArguments)
# Both at once, in the memory of the gradient.
restoring_backward = Operator("group_norm_restoring_backward", RestoringBackwardArguments)


class GroupNorm(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, ctx.num_groups, weight, bias, _, ctx.activation, ctx.backend = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input, mean, rstd, weight, bias)

    @staticmethod
    @first_derivative_only("fastvae.reference.group_norm")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return forward.gradients()
        *_, weight, bias = saved = ctx.saved_tensors
        results = backward.overloads[ctx.backend](grad_output, *saved, ctx.num_groups, ctx.activation)
        grad_input, grad_weight, grad_bias = results
        return forward.gradients(
            input=grad_input,
            weight=None if weight is None else grad_weight,
            bias=None if bias is None else grad_bias,
        )
