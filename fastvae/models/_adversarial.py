"""Gradients of a model two parts of which have opposite goals."""

from typing import Any

from torch import nn
from torch.func import functional_call


def with_fixed_weights(module: nn.Module, *inputs: Any) -> Any:
    """Calls a module so that gradients reach its inputs and not its weights.

    For the loss that a discriminator gives to the model it judges: the weights of the discriminator have a loss of their own.
    """
    return functional_call(module, {name: parameter.detach() for name, parameter in module.named_parameters()}, inputs)
