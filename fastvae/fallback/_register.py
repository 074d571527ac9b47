"""How a function becomes an operator of this backend."""

from collections.abc import Callable

import torch


def implements(operator: str) -> Callable:
    """Decorates the implementation of ``operator``, for every device that torch has."""

    def register(function):
        torch.library.impl(f"fastvae::{operator}.fallback", "CompositeExplicitAutograd", function)
        return function

    return register
