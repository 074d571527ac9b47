"""What every ``torch.autograd.Function`` of the package shares."""

import functools

import torch
from torch import Tensor


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
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def graph_is_retained() -> bool:
    """Whether another backward pass may follow, for which a saved gradient must stay as it is: it is not handed out then."""
    return not transformed() and torch._C._autograd._get_current_graph_task_keep_graph()


def apply(function: type[torch.autograd.Function], *args):
    """``function.apply(*args)`` at half its cost.

    ``args`` are complete and positional, so binding them to the signature, which takes 30 us, is left out.
    """
    if transformed():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)
