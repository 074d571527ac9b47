"""How a function calls its ``torch.autograd.Function``."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._torch_private import in_forward_mode, in_functorch
from fastvae.ops._autograd import transformed

_expected_gradient: ContextVar[float] = ContextVar("expected_gradient", default=1.0)


@contextmanager
def expected_gradient(scale: float) -> Iterator[None]:
    """Multiplies ``grad_scale`` of the losses that are computed inside: for a training loop that divides the loss of any model, and does
    not make the call of the loss itself. Results are right whatever gradient comes in.

    A loss scale is left to the backward pass: the host would have to wait for its value.
    """
    token = _expected_gradient.set(scale)
    try:
        yield
    finally:
        _expected_gradient.reset(token)


def total_scale(grad_scale: float) -> float:
    """The gradient that the backward pass is expected to bring in: the caller's ``grad_scale`` times that of the training loop."""
    # A compiled graph writes no gradient in its forward pass, and would be compiled again for another number.
    return grad_scale if torch.compiler.is_compiling() else grad_scale * _expected_gradient.get()


def writes_gradient(learners: list[Tensor], reduction: str, grad_scale: float) -> bool:
    """Whether the forward pass is to write the gradients of ``learners``: some are wanted, one number will scale them, and nothing looks at
    the call, which would have to compute them again.

    A float16 gradient that waits for its loss scale underflows, so it is written only where ``grad_scale`` names the scale.
    """
    if not learners or reduction not in ("batchmean", "sum", "mean") or not torch.is_grad_enabled() or transformed():
        return False
    return grad_scale != 1.0 or all(t.dtype != torch.float16 for t in learners)


def apply(function: Any, arguments: tuple, backend: str):
    """``function.apply(*arguments, backend)`` at half its cost.

    The arguments are complete and positional, so binding them to the signature, which takes 30 us, is left out.

    ``function.in_plain_torch`` is taken where no Function serves: in forward mode, as torch.compile refuses a Function with a rule for
    that; and inside torch.func inside torch.compile, which may trace ``forward`` and ignore ``backward`` (torch 2.13: the gradient of what
    the transformation hands in is 0, without an error).
    """
    if torch.compiler.is_compiling():
        return _apply_plain(function, arguments) if in_functorch() else function.apply(*arguments, backend)
    if in_forward_mode():
        return _apply_plain(function, arguments)
    if in_functorch():
        return function.apply(*arguments, backend)
    return super(torch.autograd.Function, function).apply(*arguments, backend)


def _apply_plain(function, arguments: tuple):
    _backend.check_plain_torch()
    return function.in_plain_torch(arguments)
