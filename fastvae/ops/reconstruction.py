"""Reconstruction losses: the operators and their autograd.Function."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops._autograd import first_derivative_only, may_use_written, scale_written
from fastvae.ops._operator import Operator, Written
from fastvae.ops._results import empty_if, empty_like, empty_reduced

# Mirrored by csrc/common/reconstruction_formulas.h and by the constexprs in kernels/.
LIKELIHOODS = {"bce_with_logits": 0, "bce": 1, "mse": 2, "gaussian": 3}


class ForwardResults(NamedTuple):
    """The gradients have no elements where they were not asked for."""

    loss: Tensor
    grad_input: Tensor
    grad_logvar: Tensor


class ForwardArguments(NamedTuple):
    """``with_grad``, for scalar reductions only, asks for ``grad_scale`` times the gradients of the loss."""

    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    logvar: Tensor | None
    likelihood: int
    reduction: int
    grad_scale: float
    with_grad: bool

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self[:5]

    def allocate(self) -> ForwardResults:
        grad_logvar = self.input.new_empty((0,)) if self.logvar is None or not self.with_grad else empty_like(self.logvar)
        return ForwardResults(empty_reduced(self.input, self.reduction), empty_if(self.with_grad, self.input), grad_logvar)


class BackwardResults(NamedTuple):
    """The gradient of ``target`` has no elements where it was not asked for, nor has that of an absent ``logvar``."""

    grad_input: Tensor
    grad_target: Tensor
    grad_logvar: Tensor


class BackwardArguments(NamedTuple):
    grad_output: Tensor
    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    logvar: Tensor | None
    likelihood: int
    reduction: int
    with_target: bool

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self[1:6]

    def allocate(self) -> BackwardResults:
        grad_logvar = self.input.new_empty((0,)) if self.logvar is None else empty_like(self.logvar)
        return BackwardResults(empty_like(self.input), empty_if(self.with_target, self.target), grad_logvar)


class RescaleArguments(NamedTuple):
    """``grad``, which was written for an incoming gradient of ``expected``, is multiplied with ``grad_output / expected``.

    The device compares the two numbers and returns early where they are the same, so that nothing waits for it.
    """

    grad: Written
    grad_output: Tensor
    expected: float

    def allocate(self) -> None:
        """The operator only writes."""


class BackwardInPlaceArguments(NamedTuple):
    """Gradients that were written for an incoming one of ``expected`` are computed again where ``grad_output`` is another: a product with
    a 16-bit number would be rounded twice. The device compares the two numbers."""

    grad_input: Written
    grad_logvar: Written
    grad_output: Tensor
    expected: float
    input: Tensor
    target: Tensor
    weight: Tensor | None
    pos_weight: Tensor | None
    logvar: Tensor | None
    likelihood: int
    reduction: int

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self[4:9]

    def allocate(self) -> None:
        """The operator only writes."""


forward = Operator("reconstruction_forward", ForwardArguments)
backward = Operator("reconstruction_backward", BackwardArguments)
rescale_ = Operator("reconstruction_rescale_", RescaleArguments)
backward_ = Operator("reconstruction_backward_", BackwardInPlaceArguments)


class Reconstruction(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *operands, ctx.likelihood, ctx.reduction, ctx.grad_scale, ctx.with_grad, ctx.backend = inputs
        _, grad_input, grad_logvar = output
        ctx.mark_non_differentiable(grad_input, grad_logvar)
        ctx.set_materialize_grads(False)
        # The inputs too: a backward pass over a retained graph starts from them.
        ctx.save_for_backward(*operands, grad_input, grad_logvar)

    @staticmethod
    @first_derivative_only("fastvae.reference.reconstruction")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return forward.gradients()
        grads = _written_gradients(ctx, grad_output)
        if grads is None:
            operands = ctx.saved_tensors[:5]
            with_target = ctx.needs_input_grad[1]
            grads = backward.overloads[ctx.backend](grad_output, *operands, ctx.likelihood, ctx.reduction, with_target)
        grad_input, grad_target, grad_logvar = grads
        return forward.gradients(
            input=grad_input,
            target=grad_target if ctx.needs_input_grad[1] else None,
            logvar=None if ctx.saved_tensors[4] is None else grad_logvar,
        )


def _written_gradients(ctx, grad_output: Tensor) -> tuple[Tensor, None, Tensor] | None:
    """The gradients that the forward pass wrote, brought to ``grad_output``; None where they have to be computed again.

    On another device than the CPU the kernels compare ``grad_output`` with what it was expected to be, as nothing may wait for it.
    """
    if not ctx.with_grad or not may_use_written(grad_output):
        return None
    *operands, grad_input, grad_logvar = ctx.saved_tensors
    if grad_input.is_cpu:
        scaled = scale_written([grad_input, grad_logvar], grad_output, ctx.grad_scale)
        return None if scaled is None else (scaled[0], None, scaled[1])
    # Aliases, because autograd's version check would see a write to the gradients themselves.
    aliases = grad_input.data, grad_logvar.data
    if any(alias.element_size() == 2 for alias in aliases):
        backward_.overloads[ctx.backend](*aliases, grad_output, ctx.grad_scale, *operands, ctx.likelihood, ctx.reduction)
    else:
        for alias in aliases:
            rescale_.overloads[ctx.backend](alias, grad_output, ctx.grad_scale)
    return grad_input, None, grad_logvar
