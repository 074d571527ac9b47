"""Helpers that the ``torch.autograd.Function`` of every family shares."""

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastvae._torch_private import graph_is_retained, in_forward_mode, in_functorch, in_make_fx, is_batch_of_gradients


class _RefuseSecondDerivative(torch.autograd.Function):
    """Passes gradients through and raises where somebody differentiates them again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor):
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)


def first_derivative_only(reference: str):
    """Decorates ``backward``: the gradients it returns are not differentiable, and differentiating them names ``reference``.

    ``torch.autograd.function.once_differentiable`` does not serve: it passes silently where the incoming gradient needs none.
    """
    message = f"a fastvae kernel has no second derivative: use {reference}, which is plain PyTorch, where one is needed"

    def decorate(backward):
        @functools.wraps(backward)
        def wrapper(ctx, *grads):
            if forward_mode() and any(carries_tangent(t) for t in (*ctx.saved_tensors, *grads)):
                raise RuntimeError(message)
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            gradients = [output for output in outputs if output is not None]
            sources = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.is_floating_point()]
            refused = iter(_RefuseSecondDerivative.apply(message, len(gradients), *gradients, *sources))
            return tuple(None if output is None else next(refused) for output in outputs)

        return wrapper

    return decorate


def transformed() -> bool:
    """Whether torch.compile or torch.func looks at the call, so that values cannot be read nor shortcuts taken."""
    return torch.compiler.is_compiling() or in_functorch()


def forward_mode() -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, jacfwd and hessian, torch.autograd.forward_ad) is under way."""
    return not torch.compiler.is_compiling() and in_forward_mode()


def carries_tangent(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and forward_ad.unpack_dual(value).tangent is not None


def may_use_written(grad_output: Tensor) -> bool:
    """Whether the backward pass may hand out, and write over, a gradient that the forward pass wrote.

    Not where another pass over a retained graph may follow, for which a saved gradient must stay as it is. Nor where values cannot be
    read.
    """
    return not graph_is_retained() and has_values(grad_output)


def has_values(grad_output: Tensor) -> bool:
    """Whether the backward pass runs on the gradient's own values: not in a transformation, in vmap of the older kind
    (``is_grads_batched``), on a subclass such as a tensor without data, or while make_fx traces."""
    if type(grad_output) is not Tensor or transformed():
        return False
    return not in_make_fx() and not is_batch_of_gradients(grad_output)


def has_autocast(device: torch.device) -> bool:
    """Whether torch.autocast takes the device; meta, for one, it does not."""
    # torch.compile of torch 2.10 and 2.11 cannot trace the question, which need not be asked of these devices.
    return device.type in ("cpu", "cuda") or torch.amp.is_autocast_available(device.type)


def under_autocast(device: torch.device) -> bool:
    return has_autocast(device) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device):
    """A context without autocast."""
    return torch.autocast(device.type, enabled=False) if under_autocast(device) else contextlib.nullcontext()


def scale_written(written: list[Tensor], grad_output: Tensor, expected: float) -> list[Tensor] | None:
    """The gradients that the forward pass wrote for an incoming one of ``expected``, brought to ``grad_output`` in place.

    For the CPU, where a number can be read without waiting. ``None`` for 16-bit gradients, which would be rounded twice: they have to be
    computed again.
    """
    factor = grad_output.item() / expected
    # The comparison of the tensor rounds `expected` to its dtype, as torch does with the number that divides a loss.
    if factor == 1.0 or grad_output == expected:
        return written
    if any(gradient.element_size() == 2 for gradient in written):
        return None
    # An alias, because autograd's version check would see a write to the gradient itself.
    return [gradient.data.mul_(factor) for gradient in written]


def in_plain_torch(function: Any):
    """Decorates the definition of ``function`` in plain PyTorch, which torch differentiates in either mode and as often as one likes."""

    def register(definition):
        function.in_plain_torch = staticmethod(definition)
        return definition

    return register
