"""Which activations a norm may take over, and the functions that code written by optimize() calls: each looks whether the norm has the
activation in it, as the modules are then."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvae._types import NormActivation
from fastvae.functional._modules import call_obstacle, describe
from fastvae.nn._fused_norms import fused_activation
from fastvae.ops.group_norm import NORM_ACTIVATIONS, TORCH_ACTIVATIONS, activated

_MODULES = {activation.module: cast("NormActivation", name) for name, activation in TORCH_ACTIVATIONS.items()}
_FUNCTIONS: dict[Callable, NormActivation] = {
    nn.functional.silu: "silu",
    nn.functional.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    nn.functional.gelu: "gelu",
}
_METHODS: dict[str, NormActivation] = {"relu": "relu", "relu_": "relu"}
APPROXIMATE_GELU = "GELU by tanh follows it, and not the exact one"


def plain_activation(act: object) -> NormActivation | None:
    """The activation of a function or a module that is one which norms may take over and nothing more."""
    if not isinstance(act, nn.Module):
        return _FUNCTIONS.get(cast("Callable", act))
    if is_approximate_gelu(act) or call_obstacle(act) is not None:
        return None
    return _MODULES.get(type(act))


def activation_of_call(target: Any, options: Mapping[str, Any]) -> NormActivation | None:
    """The same of a call that torch.fx has recorded: of a function, or of a method, of which there is the name."""
    if is_approximate_gelu(target, options):
        return None
    return _METHODS.get(target) if isinstance(target, str) else _FUNCTIONS.get(target)


def is_approximate_gelu(act: object, options: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a module, or a function that is called with these options, is the approximation of GELU by tanh."""
    if act is nn.functional.gelu:
        return options.get("approximate", "none") != "none"
    return type(act) is nn.GELU and act.approximate != "none"


def norm_then_act(norm: nn.Module, input: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``act(norm(input))``, in one where ``norm`` has an activation in it and ``act`` is that and nothing more."""
    fused = fused_activation(norm)
    if fused is None:
        return act(norm(input))
    return norm(input) if plain_activation(act) == fused else act(norm(input, activation="none"))


def norm_then_named(norm: nn.Module, input: Tensor, activation: NormActivation) -> Tensor:
    """The norm and a function of torch behind it, in one where ``norm`` has that in it."""
    fused = fused_activation(norm)
    if fused == activation:
        return norm(input)
    return activated(norm(input) if fused is None else norm(input, activation="none"), NORM_ACTIVATIONS[activation])


def act_behind(norm: nn.Module, act: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``act(input)`` of what ``norm`` gave, which has gone through ``act`` already where ``norm`` has it in it."""
    fused = fused_activation(norm)
    if fused is None:
        return act(input)
    if isinstance(act, nn.Module) and plain_activation(act) != fused:
        name = TORCH_ACTIVATIONS[fused].module.__name__
        raise RuntimeError(
            f"activation: got {describe(act)}, takes {name} alone, which fastvae.optimize() found there and the norm does since"
        )
    return input
