"""Finds the normalisations that an activation follows: in an ``nn.Sequential``, in blocks of diffusers that are known, and in code that
torch.fx can trace."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TypeGuard

from torch import fx, nn

from fastvae._types import NormActivation
from fastvae.functional._modules import is_exactly
from fastvae.nn._activation_calls import (
    APPROXIMATE_GELU,
    activation_of_call,
    is_approximate_gelu,
    norm_then_act,
    norm_then_named,
    plain_activation,
)
from fastvae.nn._diffusers_blocks import plan_of_diffusers
from fastvae.nn._finding import Finding
from fastvae.nn._forward_code import NotUnderstood, generate, rewritten, trace
from fastvae.nn._fused_norms import fuse, is_fused, is_norm, norm_obstacle
from fastvae.nn._plan import Plan


def walk_norms(root: nn.Module, uses: Counter, change: bool, refused: Mapping[str, str]) -> Iterator[Finding]:
    """Finds, and changes where ``change`` is true, all but the norms in ``refused``, whose names have reasons there."""
    for prefix, parent in list(root.named_modules()):
        # A norm of diffusers around a GroupNorm is one.
        if is_norm(parent) or is_fused(parent):
            continue
        full = {name: f"{prefix}.{name}".removeprefix(".") for name, child in parent._modules.items() if is_norm(child)}
        if not full:
            continue
        reasons = {name: refused.get(full[name]) or norm_obstacle(parent.get_submodule(name), uses) for name in full}
        plan, reason = _plan(parent, {name for name in full if reasons[name] is None})
        if plan is not None and change:
            plan.apply()
        for name in full:
            if plan is not None and name in plan.pairs:
                yield Finding(full[name], plan.pairs[name])
            else:
                left = reason if plan is None else plan.left.get(name)
                yield Finding(full[name], reason=reasons[name] or left or "no SiLU, ReLU or GELU follows it")
    if is_norm(root):
        yield Finding("", reason="it is the module itself")


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a call of ``module`` calls its modules one after the other."""
    if not isinstance(module, nn.Sequential) or not is_exactly(module, nn.Sequential):
        return False
    return type(module).__iter__ is nn.Sequential.__iter__ and "forward" not in module.__dict__


def _plan(parent: nn.Module, free: set[str]) -> tuple[Plan | None, str | None]:
    """The change of a module that has norms, of which those in ``free`` may be swapped; or the reason why there is none."""
    try:
        if is_sequential(parent):
            return _plan_sequential(parent, free), None
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            raise NotUnderstood(f"it is in a {type(parent).__name__}, which other code calls")
        return plan_of_diffusers(parent, free) or _plan_traced(parent, free), None
    except NotUnderstood as why:
        return None, str(why)


def _plan_sequential(parent: nn.Sequential, free: set[str]) -> Plan:
    behind = {norm: act for norm, act in pairwise(parent._modules) if norm in free}
    activations = {norm: plain_activation(parent.get_submodule(act)) for norm, act in behind.items()}
    fused = {norm: activation for norm, activation in activations.items() if activation is not None}

    def apply():
        for norm, activation in fused.items():
            fuse(parent, norm, activation)
            parent.set_submodule(behind[norm], nn.Identity())

    left = {norm: APPROXIMATE_GELU for norm, act in behind.items() if is_approximate_gelu(parent.get_submodule(act))}
    return Plan({norm: behind[norm] for norm in fused}, apply, left)


def _plan_traced(parent: nn.Module, free: set[str]) -> Plan:
    graph = trace(parent)
    fused, pairs, left = {}, {}, {}
    for norm in list(graph.nodes):
        if norm.op != "call_module" or norm.target not in free or len(norm.args) != 1 or norm.kwargs:
            continue
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == norm.target]
        users = list(norm.users)
        if len(calls) != 1 or len(users) != 1:
            continue
        activation = _activation(parent, users[0])
        if activation is not None:
            fused[norm.target], pairs[norm.target] = activation, _describe(users[0], activation)
            _merge(graph, norm, users[0], activation)
        elif _is_approximate(parent, users[0]):
            left[norm.target] = APPROXIMATE_GELU
    if not pairs:
        return Plan({}, lambda: None, left)
    source, functions = generate(graph, norm_then_act, norm_then_named)

    def apply():
        for norm, activation in fused.items():
            fuse(parent, norm, activation)
        parent.__class__ = rewritten(type(parent), source, functions)

    return Plan(pairs, apply, left)


def _activation(parent: nn.Module, node: fx.Node) -> NormActivation | None:
    """The activation that a node computes of its first argument, where that is all it does."""
    if node.op == "call_module":
        return plain_activation(parent.get_submodule(str(node.target)))
    return activation_of_call(node.target, node.kwargs) if len(node.args) == 1 else None


def _is_approximate(parent: nn.Module, node: fx.Node) -> bool:
    act = parent.get_submodule(str(node.target)) if node.op == "call_module" else node.target
    return is_approximate_gelu(act, node.kwargs)


def _describe(node: fx.Node, activation: NormActivation) -> str:
    return str(node.target) if node.op == "call_module" else f"functional.{activation}"


def _merge(graph: fx.Graph, norm: fx.Node, act: fx.Node, activation: NormActivation) -> None:
    with graph.inserting_before(norm):
        arguments = graph.get_attr(str(norm.target)), *norm.args
        if act.op == "call_module":
            both = graph.call_function(norm_then_act, (*arguments, graph.get_attr(str(act.target))))
        else:
            both = graph.call_function(norm_then_named, (*arguments, activation))
    act.replace_all_uses_with(both)
    graph.erase_node(act)
    graph.erase_node(norm)
