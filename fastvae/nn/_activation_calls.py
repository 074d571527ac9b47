"""The functions that code written by optimize() calls: each looks whether the norm has the activation in it, as the modules are then."""

from collections.abc import Callable

from torch import Tensor, nn

from fastvae.functional._modules import call_obstacle, describe
from fastvae.nn._fused_norms import has_silu


def is_plain_silu(act: object) -> bool:
    return act is nn.functional.silu or (type(act) is nn.SiLU and call_obstacle(act) is None)


def norm_then_act(norm: nn.Module, input: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``act(norm(input))``, in one where ``norm`` has SiLU in it and ``act`` is SiLU alone."""
    if not has_silu(norm):
        return act(norm(input))
    return norm(input) if is_plain_silu(act) else act(norm(input, activation="none"))


def norm_then_silu(norm: nn.Module, input: Tensor) -> Tensor:
    return norm_then_act(norm, input, nn.functional.silu)


def act_behind(norm: nn.Module, act: Callable[[Tensor], Tensor], input: Tensor) -> Tensor:
    """``act(input)`` of what ``norm`` gave, which has gone through SiLU already where ``norm`` has it in it."""
    if not has_silu(norm):
        return act(input)
    if isinstance(act, nn.Module) and not is_plain_silu(act):
        raise RuntimeError(
            f"activation: got {describe(act)}, takes SiLU alone, which fastvae.optimize() found there and the norm does since"
        )
    return input
