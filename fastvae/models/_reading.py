"""Methods that look at a model without changing it."""

import functools
from collections.abc import Callable

import torch
from torch import nn


def reading(method: Callable) -> Callable:
    """Decorates a method of a model that reads: it runs without gradients and as in evaluation mode, whatever the model's mode.

    In training mode a call would move running statistics and codebooks and drop units at random. The modules have their modes back
    afterwards.
    """

    @functools.wraps(method)
    def wrapper(self: nn.Module, *args, **kwargs):
        # A subclass may have replaced eval(), and eval() does not remember which modules were in which mode.
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        finally:
            for module in training:
                module.training = True

    return wrapper
