"""The normalisations that optimize() knows, and how each of them takes over the activation behind it.

torch's GroupNorm makes room for a GroupNormSiLU. A norm of diffusers keeps its parameters and their names and becomes one of a subclass,
whose ``forward`` is that of :data:`_FORWARD`.
"""

from collections import Counter
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastvae._types import NormActivation
from fastvae.functional._modules import read_obstacle, swap_obstacle
from fastvae.nn._diffusers_norms import NORM_KINDS, NormKind
from fastvae.nn._forward_code import rewritten
from fastvae.nn.group_norm import GroupNormSiLU
from fastvae.ops.group_norm import NORM_ACTIVATIONS, activated


def _kind(module: object) -> tuple[type[nn.Module], NormKind] | None:
    """The class of norms of diffusers that it belongs to, and what that computes."""
    known = (cls for cls in type(module).__mro__ if cls.__name__ in NORM_KINDS and cls.__module__.startswith("diffusers."))
    return next(((cls, NORM_KINDS[cls.__name__]) for cls in known), None)


def is_norm(module: object) -> bool:
    """Whether it is a normalisation that may take over an activation, and has not yet."""
    return (isinstance(module, nn.GroupNorm) or _kind(module) is not None) and not is_fused(module)


def is_fused(module: object) -> bool:
    """Whether it is a normalisation with an activation in it."""
    return isinstance(module, GroupNormSiLU) or hasattr(module, "fused_activation")


def fused_activation(norm: nn.Module) -> NormActivation | None:
    """The activation with which a call of ``norm`` ends. The norm may sit in a wrapper, for example that of activation checkpointing."""
    fused = next((module for module in norm.modules() if is_fused(module)), None)
    if fused is None:
        return None
    activation = fused.activation if isinstance(fused, GroupNormSiLU) else fused.fused_activation
    return None if activation == "none" else cast("NormActivation", activation)


def norm_obstacle(norm: nn.Module, uses: Counter) -> str | None:
    """Why a normalisation cannot take over an activation; None where it can.

    Args:
        uses: by the identity of a module, in how many places it is used.
    """
    kind = _kind(norm)
    reason = swap_obstacle(norm, nn.GroupNorm) if kind is None else _obstacle(norm, *kind)
    if reason is None:
        return "it is used in more than one place" if uses[id(norm)] > 1 else None
    return f"it {reason}"


def _obstacle(norm: nn.Module, cls: type[nn.Module], kind: NormKind) -> str | None:
    if is_parametrized(norm):
        return "is parametrized"
    if type(norm) is not cls:
        return f"is a {type(norm).__name__} and not a {cls.__name__}"
    inside = None if kind.inside is None else swap_obstacle(norm.get_submodule(kind.inside), nn.GroupNorm)
    return read_obstacle(norm) or inside or kind.obstacle(norm)


def fuse(parent: nn.Module, name: str, activation: NormActivation) -> None:
    """Makes a normalisation without an obstacle take over the activation behind it, in place."""
    norm = parent.get_submodule(name)
    if _kind(norm) is None:
        parent.set_submodule(name, GroupNormSiLU.sharing(cast("nn.GroupNorm", norm), activation))
        return
    cls = type(norm)
    functions = ("fused", _fused), ("original", cls.forward)
    norm.__class__ = rewritten(cls, _FORWARD.format(kind=cls.__name__), functions)
    vars(norm)["fused_activation"] = activation


# The code of a norm of diffusers that has taken over an activation. As with GroupNormSiLU, ``activation`` overrides its own for a call.
_FORWARD = """
def forward(self, input, *args, activation=None, **kwargs):
    return fused(self, "{kind}", original, input, activation or self.fused_activation, *args, **kwargs)
"""


def _fused(norm: nn.Module, kind: str, original: Callable, input: Tensor, activation: NormActivation, *args, **kwargs) -> Tensor:
    if _is_served(norm, NORM_KINDS[kind], input):
        return NORM_KINDS[kind].normalize(norm, input, activation, *args, **kwargs)
    return activated(original(norm, input, *args, **kwargs), NORM_ACTIVATIONS[activation])


def _is_served(norm: nn.Module, kind: NormKind, input: Tensor) -> bool:
    """Whether the operators take the tensors, of which the code of the class takes more, and a norm inside may be read."""
    if kind.inside is not None and swap_obstacle(norm.get_submodule(kind.inside), nn.GroupNorm):
        return False
    return input.ndim >= 2 and all(parameter.dtype in (input.dtype, torch.float32) for parameter in norm.parameters())
