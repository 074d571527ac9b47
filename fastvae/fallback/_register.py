"""How a function becomes an operator of this backend."""

from collections.abc import Callable

import torch

from fastvae.ops._operator import Operator


def implements(operator: Operator) -> Callable:
    """Decorates the implementation of ``operator``, for every device that torch has."""

    def register(function):
        # Autograd does not look into an operator, but make_fx does, and then refuses `out=`.
        operator.implement("fallback")(torch.no_grad()(function))
        return function

    return register
