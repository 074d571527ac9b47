"""Finds the normalisations that SiLU follows: in an ``nn.Sequential``, in blocks of diffusers that are known, and in code that torch.fx can
trace."""

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TypeGuard

from torch import fx, nn

from fastvae.functional._modules import is_exactly
from fastvae.nn._activation_calls import is_plain_silu, norm_then_act, norm_then_silu
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
                yield Finding(full[name], reason=reasons[name] or left or "no SiLU follows it")
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


def _plan_sequential(parent: nn.Sequential, free: set[str]) -> Plan | None:
    names = list(parent._modules)
    pairs = {norm: act for norm, act in pairwise(names) if norm in free and is_plain_silu(parent.get_submodule(act))}

    def apply():
        for norm, act in pairs.items():
            fuse(parent, norm)
            parent.set_submodule(act, nn.Identity())

    return Plan(pairs, apply) if pairs else None


def _plan_traced(parent: nn.Module, free: set[str]) -> Plan | None:
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
    source, functions = generate(graph, norm_then_act, norm_then_silu)

    def apply():
        for norm in pairs:
            fuse(parent, norm)
        parent.__class__ = rewritten(type(parent), source, functions)

    return Plan(pairs, apply)


def _is_silu(parent: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return is_plain_silu(parent.get_submodule(str(node.target)))
    return node.op == "call_function" and node.target is nn.functional.silu


def _describe(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else "functional.silu"


def _merge(graph: fx.Graph, norm: fx.Node, act: fx.Node) -> None:
    with graph.inserting_before(norm):
        arguments = graph.get_attr(str(norm.target)), *norm.args
        if act.op == "call_module":
            both = graph.call_function(norm_then_act, (*arguments, graph.get_attr(str(act.target))))
        else:
            both = graph.call_function(norm_then_silu, arguments)
    act.replace_all_uses_with(both)
    graph.erase_node(act)
    graph.erase_node(norm)
