"""Finds in any module what the package computes faster, and swaps it in place."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeGuard, cast, get_args

import torch
from torch import Tensor, fx, nn

from fastvae._types import Memory, check_choice
from fastvae.functional._modules import call_obstacle, is_exactly, swap_obstacle, wrapped_tensor
from fastvae.nn._forward_code import NotUnderstood, generate, rewritten, trace
from fastvae.nn._lean_modules import RESIDUAL_BLOCK_FORWARD, LeanSequential, lean_pairs, residual_block, residual_block_obstacle
from fastvae.nn.group_norm import GroupNormSiLU
from fastvae.nn.upsampling import UpsampleConv2d, conv_obstacle

MEMORY_FORMATS = {
    nn.Conv2d: torch.channels_last,
    UpsampleConv2d: torch.channels_last,
    nn.ConvTranspose2d: torch.channels_last,
    nn.Conv3d: torch.channels_last_3d,
    nn.ConvTranspose3d: torch.channels_last_3d,
}


@dataclass(frozen=True)
class Finding:
    """A GroupNorm in a module, or an upsampling.

    Args:
        name: its name in the module.
        followed_by: the SiLU, or the convolution, that becomes one with it; ``None`` where it is left alone.
        reason: why it is left alone.
        lean: whether the two keep one input, by ``memory="lean"``.
    """

    name: str
    followed_by: str | None = None
    reason: str | None = None
    lean: bool = False

    def __str__(self) -> str:
        if self.followed_by is None:
            return f"left {self.name}: {self.reason}"
        if self.lean:
            return f"{self.name} and {self.followed_by} keep one input"
        return f"fused {self.name} with {self.followed_by}"


@dataclass(frozen=True)
class _Plan:
    """The change of one module: the names of its GroupNorms that SiLU follows, each with the name of that SiLU, and the function that makes
    it."""

    pairs: dict[str, str]
    apply: Callable[[], None]


def optimize(
    module: nn.Module, *, channels_last: bool = False, memory: Memory = "full", report: Callable[[str], None] | None = print
) -> nn.Module:
    """Swaps, in place, each GroupNorm that SiLU follows for one :class:`GroupNormSiLU` that does both, and each upsampling by repetition
    that a convolution of size 3 follows for one :class:`UpsampleConv2d`.

    Found are pairs in an :class:`torch.nn.Sequential`; pairs of GroupNorm and SiLU in the code of a ``forward`` that torch.fx can trace and
    that has no branches but on whether a submodule is there; and the residual blocks, encoders and decoders of diffusers. What is not
    understood with certainty is left alone, and so is a module that is more than its class says: one with hooks, a subclass, a parametrized
    or a sharded one. The modules of an ``nn.Sequential`` are taken to be called by it alone.

    Parameters are the same objects under the same names: the ``state_dict`` and an optimizer stay valid. A module in whose ``forward`` a
    pair is found becomes one of a subclass of the same name. Its ``forward`` takes everything from the module at each call, so submodules,
    parameters and buffers may be replaced, hooked and parametrized as before; norm and activation are called one after the other again
    where somebody replaces the norm by one without SiLU, or the activation by another.

    Args:
        module: any module; it is changed.
        channels_last: also puts the weights of convolutions into ``torch.channels_last`` (``channels_last_3d``); their outputs follow.
            Sharded weights stay as they are, and FSDP does not shard weights in this layout.
        memory: ``"lean"`` also lets a GroupNorm with SiLU and the convolution behind it keep one input for the backward pass, see
            :func:`fastvae.functional.norm_act_conv`: in an :class:`torch.nn.Sequential` and in the residual blocks of diffusers. Results
            and gradients are the same to the last bit.
        report: called with one line for each GroupNorm and each upsampling, what was done or why nothing was; ``None`` for silence.
            :func:`examine` gives the same without a change.

    Returns:
        ``module``.
    """
    check_choice("memory", memory, get_args(Memory))
    for finding in [*_walk(module, change=True), *(_make_lean(module) if memory == "lean" else ())]:
        if report is not None:
            report(str(finding))
    if channels_last:
        to_channels_last(module)
    return module


def examine(module: nn.Module) -> list[Finding]:
    """The findings of :func:`optimize`, without changing anything."""
    return list(_walk(module, change=False))


def to_channels_last(module: nn.Module) -> None:
    """Puts the weights of convolutions into ``torch.channels_last`` or ``channels_last_3d``, in place; sharded ones stay as they are."""
    for layer in module.modules():
        if type(layer) in MEMORY_FORMATS and wrapped_tensor(layer) is None:
            layer.to(memory_format=MEMORY_FORMATS[type(layer)])  # type: ignore[call-overload]  # not in the annotations of torch


def _walk(root: nn.Module, change: bool) -> Iterator[Finding]:
    uses = Counter(id(child) for parent in root.modules() for child in parent._modules.values())
    yield from _walk_norms(root, uses, change)
    yield from _walk_upsamplings(root, uses, change)


def _walk_norms(root: nn.Module, uses: Counter, change: bool) -> Iterator[Finding]:
    for prefix, parent in list(root.named_modules()):
        norms = {name: child for name, child in parent._modules.items() if _is_group_norm(child)}
        if not norms:
            continue
        reasons = {name: _norm_obstacle(norm, uses) for name, norm in norms.items()}
        plan, reason = _plan(parent, {name for name in norms if reasons[name] is None})
        if plan is not None and change:
            plan.apply()
        for name in norms:
            full = f"{prefix}.{name}".removeprefix(".")
            if plan is not None and name in plan.pairs:
                yield Finding(full, plan.pairs[name])
            else:
                yield Finding(full, reason=reasons[name] or reason or "no SiLU follows it")
    if _is_group_norm(root):
        yield Finding("", reason="it is the module itself")


def _make_lean(root: nn.Module) -> Iterator[Finding]:
    """Changes the modules of a tree whose norms are fused already."""
    for prefix, parent in list(root.named_modules()):
        pairs = _lean_pairs(parent)
        if pairs and type(parent) is nn.Sequential:
            parent.__class__ = LeanSequential
        elif pairs and not _is_lean(parent):
            functions = ("residual_block", residual_block), ("original", type(parent).forward)
            parent.__class__ = rewritten(type(parent), RESIDUAL_BLOCK_FORWARD, functions)  # type: ignore[arg-type]  # a class is hashable
        for norm, conv in pairs.items():
            yield Finding(f"{prefix}.{norm}".removeprefix("."), conv, lean=True)


def _is_lean(parent: nn.Module) -> bool:
    return isinstance(parent, LeanSequential) or type(parent).forward.__globals__.get("residual_block") is residual_block


def _lean_pairs(parent: nn.Module) -> dict[str, str]:
    if type(parent) in (nn.Sequential, LeanSequential):
        return lean_pairs(cast("nn.Sequential", parent))
    if _is_of_diffusers(parent, "ResnetBlock2D") and residual_block_obstacle(parent) is None:
        return {"norm1": "conv1", "norm2": "conv2"}
    return {}


def _is_group_norm(module: nn.Module | None) -> bool:
    return isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNormSiLU)


def _norm_obstacle(norm: nn.Module, uses: Counter) -> str | None:
    reason = swap_obstacle(norm, nn.GroupNorm)
    if reason is None:
        return "it is used in more than one place" if uses[id(norm)] > 1 else None
    return f"it {reason}"


def _plan(parent: nn.Module, free: set[str]) -> tuple[_Plan | None, str | None]:
    """The change of a module that has GroupNorms, of which those in ``free`` may be swapped; or the reason why there is none."""
    try:
        if _is_sequential(parent):
            return _plan_sequential(parent, free), None
        if _is_of_diffusers(parent, *_DIFFUSERS):
            return _plan_diffusers(parent, free), None
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            raise NotUnderstood(f"it is in a {type(parent).__name__}, which other code calls")
        return _plan_traced(parent, free), None
    except NotUnderstood as why:
        return None, str(why)


def _is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a call of ``module`` calls its modules one after the other."""
    if not isinstance(module, nn.Sequential) or not is_exactly(module, nn.Sequential):
        return False
    return type(module).__iter__ is nn.Sequential.__iter__ and "forward" not in module.__dict__


def _is_of_diffusers(module: nn.Module, *names: str) -> bool:
    known = type(module).__module__.startswith("diffusers.") and type(module).__name__ in names
    return known and "forward" not in module.__dict__


def _fuse(parent: nn.Module, norms: list[str]) -> None:
    for name in norms:
        norm = cast("nn.GroupNorm", parent.get_submodule(name))
        parent.set_submodule(name, GroupNormSiLU.sharing(norm))


def _plan_sequential(parent: nn.Sequential, free: set[str]) -> _Plan | None:
    names = list(parent._modules)
    pairs = {norm: act for norm, act in pairwise(names) if norm in free and _is_plain_silu(parent.get_submodule(act))}

    def apply():
        _fuse(parent, list(pairs))
        for act in pairs.values():
            parent.set_submodule(act, nn.Identity())

    return _Plan(pairs, apply) if pairs else None


def _is_plain_silu(act: object) -> bool:
    return act is nn.functional.silu or (type(act) is nn.SiLU and call_obstacle(act) is None)


# Classes of diffusers: the names of their norms, and the name of the SiLU that follows those. The classes are known by name because their
# forwards have branches, which cannot be traced; their parts are checked.
_DIFFUSERS = {
    "ResnetBlock2D": (("norm1", "norm2"), "nonlinearity"),
    "Encoder": (("conv_norm_out",), "conv_act"),
    "Decoder": (("conv_norm_out",), "conv_act"),
}


def _plan_diffusers(parent: nn.Module, free: set[str]) -> _Plan:
    norms, act = _DIFFUSERS[type(parent).__name__]
    for name in norms:
        if name not in free:
            raise NotUnderstood(f"{name}, whose activation is the same, cannot be swapped")
    if not _is_plain_silu(getattr(parent, act, None)):
        raise NotUnderstood(f"{act} is not SiLU alone")
    if type(parent).__name__ == "ResnetBlock2D":
        if parent.time_emb_proj is not None:
            raise NotUnderstood(f"{act} is applied to a time embedding too")
        if parent.time_embedding_norm == "scale_shift":
            raise NotUnderstood("a scale and a shift come between norm2 and its activation")

    def apply():
        _fuse(parent, list(norms))
        parent.set_submodule(act, nn.Identity())

    return _Plan(dict.fromkeys(norms, act), apply)


@dataclass(frozen=True)
class _Upsampling:
    """An upsampling to twice the size: its name, the module that has what follows it and under which name, and how to turn it off."""

    name: str
    owner: nn.Module
    conv: str
    turn_off: Callable[[], None]


def _walk_upsamplings(root: nn.Module, uses: Counter, change: bool) -> Iterator[Finding]:
    for found in _upsamplings(root):
        conv = found.owner.get_submodule(found.conv)
        reason = conv_obstacle(conv) or ("is used in more than one place" if uses[id(conv)] > 1 else None)
        if reason:
            yield Finding(found.name, reason=f"what follows it, {found.conv}, {reason}")
            continue
        if change:
            found.owner.set_submodule(found.conv, UpsampleConv2d.sharing(cast("nn.Conv2d", conv)))
            found.turn_off()
        yield Finding(found.name, found.conv)


def _upsamplings(root: nn.Module) -> Iterator[_Upsampling]:
    for prefix, parent in list(root.named_modules()):
        if _is_sequential(parent):
            for name, follower in pairwise(list(parent._modules)):
                if _doubles(parent.get_submodule(name)):
                    turn_off = partial(parent.set_submodule, name, nn.Identity())
                    yield _Upsampling(f"{prefix}.{name}".removeprefix("."), parent, follower, turn_off)
        elif _is_of_diffusers(parent, "UpDecoderBlock2D"):
            # This one asks its upsamplers for twice the size; others may ask for a size of their own.
            for name, upsampler in parent.named_modules():
                if _is_of_diffusers(upsampler, "Upsample2D") and _interpolates(upsampler):
                    turn_off = partial(setattr, upsampler, "interpolate", False)
                    yield _Upsampling(f"{prefix}.{name}".removeprefix("."), upsampler, "conv", turn_off)


def _interpolates(upsampler: nn.Module) -> bool:
    # Versions without the attribute cannot be told not to.
    return bool(getattr(upsampler, "interpolate", False) and upsampler.use_conv and upsampler.name == "conv")


def _doubles(module: nn.Module) -> bool:
    if type(module) not in (nn.Upsample, nn.UpsamplingNearest2d) or call_obstacle(module):
        return False
    return module.mode == "nearest" and module.size is None and module.scale_factor in (2, (2, 2))


def _norm_then_act(norm: nn.Module, input: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """``act(norm(input))``, in one where ``norm`` has SiLU in it and ``act`` is SiLU alone, as they are now."""
    if not _has_silu(norm):
        return act(norm(input))
    return norm(input) if _is_plain_silu(act) else act(norm(input, activation="none"))


def _norm_then_silu(norm: nn.Module, input: Tensor) -> Tensor:
    return _norm_then_act(norm, input, nn.functional.silu)


def _has_silu(norm: nn.Module) -> bool:
    # The norm may sit inside a wrapper, for example that of activation checkpointing.
    fused = norm if isinstance(norm, GroupNormSiLU) else next((m for m in norm.modules() if isinstance(m, GroupNormSiLU)), None)
    return fused is not None and fused.activation == "silu"


def _plan_traced(parent: nn.Module, free: set[str]) -> _Plan | None:
    graph = trace(parent)
    pairs = {}
    for norm in list(graph.nodes):
        if norm.op != "call_module" or norm.target not in free or len(norm.args) != 1 or norm.kwargs:
            continue
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == norm.target]
        users = list(norm.users)
        if len(calls) == 1 and len(users) == 1 and _is_silu(parent, users[0]):
            pairs[norm.target] = _describe(users[0])
            _merge(graph, norm, users[0])
    if not pairs:
        return None
    source, functions = generate(graph, _norm_then_act, _norm_then_silu)

    def apply():
        _fuse(parent, list(pairs))
        parent.__class__ = rewritten(type(parent), source, functions)  # type: ignore[arg-type]  # mypy takes no class for hashable

    return _Plan(pairs, apply)


def _is_silu(parent: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_plain_silu(parent.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target is nn.functional.silu


def _describe(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else "functional.silu"


def _merge(graph: fx.Graph, norm: fx.Node, act: fx.Node) -> None:
    with graph.inserting_before(norm):
        arguments = graph.get_attr(str(norm.target)), *norm.args
        if act.op == "call_module":
            both = graph.call_function(_norm_then_act, (*arguments, graph.get_attr(str(act.target))))
        else:
            both = graph.call_function(_norm_then_silu, arguments)
    act.replace_all_uses_with(both)
    graph.erase_node(act)
    graph.erase_node(norm)
