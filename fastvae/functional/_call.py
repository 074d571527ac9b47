"""How a function calls its ``torch.autograd.Function``."""

from typing import Any

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._torch_private import in_forward_mode, in_functorch
from fastvae.ops._autograd import transformed


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
