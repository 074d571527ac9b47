"""Finds in any module what the package computes faster, and swaps it in place."""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import fx, nn

from fastvae.nn.group_norm import GroupNormSiLU
from fastvae.nn.upsampling import UpsampleConv2d

MEMORY_FORMATS = {
    nn.Conv2d: torch.channels_last,
    UpsampleConv2d: torch.channels_last,
    nn.ConvTranspose2d: torch.channels_last,
    nn.Conv3d: torch.channels_last_3d,
    nn.ConvTranspose3d: torch.channels_last_3d,
}


class NotUnderstood(Exception):
    """A module's code cannot be followed with certainty; the message says what stands in the way."""


@dataclass(frozen=True)
class Finding:
    """A GroupNorm in a module, or an upsampling.

    Args:
        name: its name in the module.
        followed_by: the SiLU, or the convolution, that becomes one with it; ``None`` where it is left alone.
        reason: why it is left alone.
    """

    name: str
    followed_by: str | None = None
    reason: str | None = None

    def __str__(self) -> str:
        if self.followed_by is None:
            return f"left {self.name}: {self.reason}"
        return f"fused {self.name} with {self.followed_by}"


@dataclass(frozen=True)
class _Plan:
    """What to do with one module: the names of its GroupNorms that SiLU follows and how that is called, and the change itself."""

    pairs: dict[str, str]
    apply: Callable[[], None]


def optimize(module: nn.Module, *, channels_last: bool = False, report: Callable[[str], None] | None = print) -> nn.Module:
    """Swaps, in place, each GroupNorm that SiLU follows for one :class:`GroupNormSiLU` that does both, and each upsampling by repetition
    that a convolution of size 3 follows for one :class:`UpsampleConv2d`.

    Found are pairs in an :class:`torch.nn.Sequential`; pairs of GroupNorm and SiLU in the code of a ``forward`` that torch.fx can trace and
    that has no branches but on whether a submodule is there; and the residual blocks, encoders and decoders of diffusers. What is not
    understood with certainty is left alone. The modules of an ``nn.Sequential`` are taken to be called by it alone.

    Parameters are the same objects under the same names: the ``state_dict`` and an optimizer stay valid. Where ``forward`` calls SiLU as a
    function, the module gets a ``forward`` of its own with the rest of its code unchanged.

    Args:
        module: any module; it is changed.
        channels_last: also puts the weights of convolutions into ``torch.channels_last`` (``channels_last_3d``); their outputs follow.
        report: called with one line for each GroupNorm and each upsampling, what was done or why nothing was; ``None`` for silence.
            :func:`examine` gives the same without a change.

    Returns:
        ``module``.
    """
    for finding in _walk(module, change=True):
        if report is not None:
            report(str(finding))
    if channels_last:
        _to_channels_last(module)
    return module


def examine(module: nn.Module) -> list[Finding]:
    """What :func:`optimize` would do."""
    return list(_walk(module, change=False))


def _to_channels_last(module: nn.Module) -> None:
    for layer in module.modules():
        if type(layer) in MEMORY_FORMATS:
            layer.to(memory_format=MEMORY_FORMATS[type(layer)])


def _walk(root: nn.Module, change: bool) -> Iterator[Finding]:
    uses = Counter(id(child) for parent in root.modules() for child in parent._modules.values())
    yield from _walk_norms(root, uses, change)
    yield from _walk_upsamplings(root, uses, change)


def _walk_norms(root: nn.Module, uses: Counter, change: bool) -> Iterator[Finding]:
    for prefix, parent in list(root.named_modules()):
        norms = {name: child for name, child in parent._modules.items() if type(child) is nn.GroupNorm}
        if not norms:
            continue
        plan, reason = _plan(parent)
        shared = [name for name in norms if uses[id(norms[name])] > 1 or _has_hooks(norms[name])]
        if shared and plan is not None and not plan.pairs.keys().isdisjoint(shared):
            plan, reason = None, f"{', '.join(shared)}: used in more than one place, or has hooks"
        if plan is not None and change:
            plan.apply()
        for name in norms:
            full = f"{prefix}.{name}".removeprefix(".")
            if plan is not None and name in plan.pairs:
                yield Finding(full, plan.pairs[name])
            else:
                yield Finding(full, reason=reason or "no SiLU follows it")
    if type(root) is nn.GroupNorm:
        yield Finding("", reason="it is the module itself")


def _plan(parent: nn.Module) -> tuple[_Plan | None, str | None]:
    """What to do with a module that has GroupNorms, or why nothing."""
    try:
        if type(parent).forward is nn.Sequential.forward:
            return _plan_sequential(parent), None
        if type(parent).__module__.startswith("diffusers.") and type(parent).__name__ in _DIFFUSERS:
            return _plan_diffusers(parent), None
        if isinstance(parent, nn.ModuleList | nn.ModuleDict):
            raise NotUnderstood(f"it is in a {type(parent).__name__}, which other code calls")
        return _plan_traced(parent), None
    except NotUnderstood as why:
        return None, str(why)


def _has_hooks(module: nn.Module) -> bool:
    """Whether more happens at a call than the class says."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in vars(module)


def _fuse(parent: nn.Module, norms: list[str]) -> None:
    for name in norms:
        norm = parent.get_submodule(name)
        parent.set_submodule(name, GroupNormSiLU.sharing(norm))


def _plan_sequential(parent: nn.Sequential) -> _Plan | None:
    names = list(parent._modules)
    pairs = {
        norm: act
        for norm, act in pairwise(names)
        if type(parent.get_submodule(norm)) is nn.GroupNorm and _is_plain_silu(parent.get_submodule(act))
    }

    def apply():
        _fuse(parent, list(pairs))
        for act in pairs.values():
            parent.set_submodule(act, nn.Identity())

    return _Plan(pairs, apply) if pairs else None


def _is_plain_silu(module: nn.Module | None) -> bool:
    return type(module) is nn.SiLU and not _has_hooks(module)


# Of classes in diffusers, which norms the SiLU under which name follows. Their forwards have branches, so they are known by name, and their
# parts are checked.
_DIFFUSERS = {
    "ResnetBlock2D": (("norm1", "norm2"), "nonlinearity"),
    "Encoder": (("conv_norm_out",), "conv_act"),
    "Decoder": (("conv_norm_out",), "conv_act"),
}


def _plan_diffusers(parent: nn.Module) -> _Plan:
    norms, act = _DIFFUSERS[type(parent).__name__]
    for name in norms:
        if type(getattr(parent, name, None)) is not nn.GroupNorm:
            raise NotUnderstood(f"{name} is a {type(getattr(parent, name, None)).__name__}")
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
        if not _is_plain_conv(conv) or uses[id(conv)] > 1:
            yield Finding(found.name, reason="what follows it is not a convolution of size 3 with padding 1 in one place")
            continue
        if change:
            found.owner.set_submodule(found.conv, UpsampleConv2d.sharing(conv))
            found.turn_off()
        yield Finding(found.name, found.conv)


def _upsamplings(root: nn.Module) -> Iterator[_Upsampling]:
    for prefix, parent in list(root.named_modules()):
        if type(parent).forward is nn.Sequential.forward:
            for name, follower in pairwise(list(parent._modules)):
                if _doubles(parent.get_submodule(name)):
                    turn_off = partial(parent.set_submodule, name, nn.Identity())
                    yield _Upsampling(f"{prefix}.{name}".removeprefix("."), parent, follower, turn_off)
        elif type(parent).__module__.startswith("diffusers.") and type(parent).__name__ == "UpDecoderBlock2D":
            # This one asks its upsamplers for twice the size; others may ask for a size of their own.
            for name, upsampler in parent.named_modules():
                if type(upsampler).__name__ == "Upsample2D" and _interpolates(upsampler):
                    turn_off = partial(setattr, upsampler, "interpolate", False)
                    yield _Upsampling(f"{prefix}.{name}".removeprefix("."), upsampler, "conv", turn_off)


def _interpolates(upsampler: nn.Module) -> bool:
    # Versions without the attribute cannot be told not to.
    return getattr(upsampler, "interpolate", False) and upsampler.use_conv and upsampler.name == "conv"


def _doubles(module: nn.Module) -> bool:
    if type(module) not in (nn.Upsample, nn.UpsamplingNearest2d) or _has_hooks(module):
        return False
    return module.mode == "nearest" and module.size is None and module.scale_factor in (2, (2, 2))


def _is_plain_conv(module: nn.Module) -> bool:
    if type(module) is not nn.Conv2d or _has_hooks(module):
        return False
    sizes = module.kernel_size, module.stride, module.dilation, module.groups, module.padding_mode
    return sizes == ((3, 3), (1, 1), (1, 1), 1, "zeros") and module.padding in ((1, 1), "same")


class _Tracer(fx.Tracer):
    """Records the calls of submodules and looks into none."""

    def is_leaf_module(self, module, qualified_name):
        return True


def _plan_traced(parent: nn.Module) -> _Plan | None:
    _check_code(parent)
    graph = _trace(parent)
    pairs = {}
    for node in list(graph.nodes):
        if node.op != "call_module" or type(parent._modules.get(node.target)) is not nn.GroupNorm:
            continue
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == node.target]
        users = list(node.users)
        if len(calls) == 1 and len(users) == 1 and _is_silu(parent, users[0]):
            pairs[node.target] = _describe(users[0])
            users[0].replace_all_uses_with(node)
            graph.erase_node(users[0])
    if not pairs:
        return None

    def apply():
        _fuse(parent, list(pairs))
        parent.forward = fx.GraphModule(parent, graph, type(parent).__name__).forward

    return _Plan(pairs, apply)


def _is_silu(parent: nn.Module, node: fx.Node) -> bool:
    if node.op == "call_module":
        return _is_plain_silu(parent.get_submodule(node.target))
    return node.op == "call_function" and node.target is nn.functional.silu


def _describe(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else "functional.silu"


def _trace(parent: nn.Module) -> fx.Graph:
    """The graph of ``forward``, the same in training and in evaluation mode."""
    training, graphs = parent.training, []
    try:
        for mode in (True, False):
            parent.training = mode
            graphs.append(_Tracer().trace(parent))
    except (TypeError, ValueError, AttributeError, fx.proxy.TraceError) as error:
        raise NotUnderstood(f"torch.fx cannot trace it: {error}") from error
    finally:
        parent.training = training
    first, second = (graph.python_code("self").src for graph in graphs)
    if first != second:
        raise NotUnderstood("its code depends on the mode, training or evaluation")
    return graphs[0]


def _check_code(parent: nn.Module) -> None:
    """Raises where tracing ``forward`` once might miss something that it does."""
    if "forward" in vars(parent):
        raise NotUnderstood("its forward was replaced")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(parent).forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotUnderstood("its code cannot be read") from error
    function = tree.body[0]
    arguments = function.args
    if function.decorator_list or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or not arguments.args:
        raise NotUnderstood("its forward takes other than plain arguments, or is decorated")
    _CodeCheck(parent, function).visit_body(function.body)


class _CodeCheck(ast.NodeVisitor):
    """Straight code over submodules, parameters, buffers and torch's functions, whose only branches ask whether a submodule is there."""

    ALLOWED = (
        ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr, ast.Call, ast.keyword, ast.Name, ast.Attribute, ast.Subscript,
        ast.Slice, ast.Tuple, ast.List, ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.expr_context,
    )  # fmt: skip

    def __init__(self, module: nn.Module, function: ast.FunctionDef):
        self.module = module
        self.self_name = function.args.args[0].arg
        stored = (node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
        self.locals = {argument.arg for argument in function.args.args} | set(stored)
        self.globals = type(module).forward.__globals__

    def visit_body(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def visit_If(self, node):
        self._check_test(node.test)
        self.visit_body([*node.body, *node.orelse])

    def visit_IfExp(self, node):
        self._check_test(node.test)
        self.visit(node.body)
        self.visit(node.orelse)

    def _check_test(self, test: ast.expr) -> None:
        is_none = (
            isinstance(test, ast.Compare)
            and isinstance(test.ops[0], ast.Is | ast.IsNot)
            and isinstance(test.comparators[0], ast.Constant)
            and test.comparators[0].value is None
        )
        if not is_none or not self._is_own(test.left):
            raise NotUnderstood(f"its forward branches on {ast.unparse(test)}")

    def _is_own(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.self_name

    def visit_Attribute(self, node):
        if self._is_own(node):
            kept = (self.module._modules, self.module._parameters, self.module._buffers)
            if not any(node.attr in values for values in kept):
                raise NotUnderstood(f"its forward reads {ast.unparse(node)}")
        else:
            self.visit(node.value)

    def visit_Name(self, node):
        found = self.globals.get(node.id)
        home = found.__name__ if inspect.ismodule(found) else getattr(found, "__module__", None)
        if node.id not in self.locals and (home or "").split(".")[0] != "torch":
            raise NotUnderstood(f"its forward uses {node.id}")

    def generic_visit(self, node):
        if not isinstance(node, self.ALLOWED):
            raise NotUnderstood(f"its forward has a {type(node).__name__}")
        super().generic_visit(node)
