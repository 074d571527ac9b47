"""Finds in any module what the package computes faster, and swaps it in place."""

import ast
import builtins
import functools
import inspect
import math
import operator
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeGuard, cast

import torch
from torch import Tensor, fx, nn

from fastvae.functional._modules import call_obstacle, is_exactly, swap_obstacle, wrapped_tensor
from fastvae.nn.group_norm import GroupNormSiLU
from fastvae.nn.upsampling import UpsampleConv2d, conv_obstacle

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
    """The change of one module: the names of its GroupNorms that SiLU follows, each with the name of that SiLU, and the function that makes
    it."""

    pairs: dict[str, str]
    apply: Callable[[], None]


def optimize(module: nn.Module, *, channels_last: bool = False, report: Callable[[str], None] | None = print) -> nn.Module:
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
    """The findings of :func:`optimize`, without changing anything."""
    return list(_walk(module, change=False))


def _to_channels_last(module: nn.Module) -> None:
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


def _in_place(name: str, target: object, value: object) -> object:
    """``target += value`` and its like, as an expression."""
    return getattr(operator, name)(target, value)


def _recorder(name: str) -> Callable[[fx.Proxy, object], fx.Proxy]:
    return lambda self, value: self.tracer.create_proxy("call_function", _in_place, (name, self, value), {})


class _Proxy(fx.Proxy):
    """Records ``x += y`` as what it is: torch.fx takes it for ``x = x + y``, which would leave other names of ``x`` as they are."""

    __iadd__, __isub__, __imul__, __itruediv__ = map(_recorder, ("iadd", "isub", "imul", "itruediv"))
    __ifloordiv__, __imod__, __ipow__, __imatmul__ = map(_recorder, ("ifloordiv", "imod", "ipow", "imatmul"))
    __iand__, __ior__, __ixor__, __ilshift__, __irshift__ = map(_recorder, ("iand", "ior", "ixor", "ilshift", "irshift"))


class _Tracer(fx.Tracer):
    """Records the calls of submodules, into which it does not look, and the reading of parameters and buffers, by their names."""

    def is_leaf_module(self, module, qualified_name):
        return True

    def proxy(self, node):
        return _Proxy(node, self)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        # Only the root's own are read, see _CodeCheck. torch.fx would take the value of a buffer, and the first of a parameter's names.
        return self.create_proxy("get_attr", attr, (), {}) if isinstance(attr_val, Tensor) else attr_val


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


def _check_presence(value: object, present: bool, name: str) -> None:
    if (value is not None) != present:
        raise RuntimeError(f"{name}: is {'there' if value is not None else 'None'} now, which fastvae.optimize() did not find it to be")


def _plan_traced(parent: nn.Module, free: set[str]) -> _Plan | None:
    graph = _trace(parent, _check_code(parent))
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
    source, functions = _generate(graph)

    def apply():
        _fuse(parent, list(pairs))
        parent.__class__ = _rewritten(type(parent), source, functions)  # type: ignore[arg-type]  # mypy takes no class for hashable

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


# Names that the code of torch.fx may use.
_NAMES = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan, "NoneType": type(None)}


def _generate(graph: fx.Graph) -> tuple[str, tuple[tuple[str, Callable], ...]]:
    """The code of a graph as a method, and the functions of this file that it uses, by the names they have in it."""
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    known = {**vars(builtins), **_NAMES}
    used = {name: value for name, value in code.globals.items() if name in code.src and name not in known}
    functions = {name: value for name, value in used.items() if getattr(value, "__module__", None) == __name__}
    if foreign := used.keys() - functions.keys():
        raise NotUnderstood(f"its code uses {', '.join(sorted(foreign))}")
    return code.src, tuple(functions.items())


@functools.cache
def _rewritten(cls: type[nn.Module], source: str, functions: tuple[tuple[str, Callable], ...]) -> type[nn.Module]:
    """The subclass of ``cls``, of the same name, with the ``forward`` of ``source``. Modules that are alike share it."""
    namespace = {**_NAMES, **dict(functions)}
    exec(compile(source, f"<fastvae.optimize: {cls.__qualname__}.forward>", "exec"), namespace)

    def reduce(self, protocol):
        reduced = cls.__reduce_ex__(self, protocol)
        # For copy and pickle: the class is made anew, as it cannot be imported. A subclass, such as FSDP's, has to say how itself.
        return (_restore, (cls, source, functions), *reduced[2:]) if type(self) is subclass else reduced

    members = {
        "forward": namespace["forward"],
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    metaclass: type = type(cls)
    subclass = metaclass(cls.__name__, (cls,), members)
    return subclass


def _restore(cls: type[nn.Module], source: str, functions: tuple[tuple[str, Callable], ...]) -> nn.Module:
    return object.__new__(_rewritten(cls, source, functions))  # type: ignore[arg-type]  # as above


def _trace(parent: nn.Module, presence: dict[str, bool]) -> fx.Graph:
    """The graph of ``forward``, the same in training and in evaluation mode, for attributes that are there or None as ``presence`` says."""
    training, graphs = parent.training, []
    try:
        for mode in (True, False):
            parent.training = mode
            graphs.append(_Tracer().trace(parent))
    except (AttributeError, LookupError, NameError, RuntimeError, TypeError, ValueError) as error:
        raise NotUnderstood(f"torch.fx cannot trace it: {error}") from error
    finally:
        parent.training = training
    first, second = (graph.python_code("self").src for graph in graphs)
    if first != second:
        raise NotUnderstood("its code depends on the mode, training or evaluation")
    graph = graphs[0]
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        for name, present in presence.items():
            graph.call_function(_check_presence, (graph.get_attr(name), present, name))
    return graph


def _check_code(parent: nn.Module) -> dict[str, bool]:
    """Raises where tracing ``forward`` once might miss something that it does. Gives the attributes on whose presence its course depends,
    and whether they are there."""
    if "forward" in vars(parent):
        raise NotUnderstood("its forward was replaced")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(parent).forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotUnderstood("its code cannot be read") from error
    if type(parent).__reduce__ is not object.__reduce__ or type(parent).__reduce_ex__ is not object.__reduce_ex__:
        raise NotUnderstood("its class is copied in a way of its own")
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef):
        raise NotUnderstood("its forward is not a function")
    arguments = function.args
    if function.decorator_list or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or not arguments.args:
        raise NotUnderstood("its forward takes other than plain arguments, or is decorated")
    check = _CodeCheck(parent, function)
    check.visit_body(function.body)
    return check.presence


class _CodeCheck(ast.NodeVisitor):
    """Straight code over submodules, parameters, buffers and torch's functions, whose only branches ask whether one of those is there.
    Submodules are called, and not read."""

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
        self.presence: dict[str, bool] = {}

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
        if not isinstance(test, ast.Compare) or not _is_test_for_none(test) or not self._is_own(test.left):
            raise NotUnderstood(f"its forward branches on {ast.unparse(test)}")
        self._look_up(test.left, tested=True)

    def _is_own(self, node: ast.expr) -> TypeGuard[ast.Attribute]:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.self_name

    def _look_up(self, node: ast.Attribute, tested: bool = False) -> object:
        """The submodule, parameter or buffer that is read; its presence is noted where it decides what the code does."""
        # The attributes of the instance hold None for a submodule that is left out.
        for values in (self.module._modules, self.module._parameters, self.module._buffers, self.module.__dict__):
            if node.attr in values:
                value = values[node.attr]
                if values is self.module.__dict__ and value is not None:
                    break
                if tested or value is None:
                    self.presence[node.attr] = value is not None
                return value
        raise NotUnderstood(f"its forward reads {ast.unparse(node)}")

    def visit_Call(self, node):
        if self._submodule(node.func) is None:
            self.visit(node.func)
        for argument in (*node.args, *node.keywords):
            self.visit(argument)

    def _submodule(self, node: ast.expr) -> nn.Module | None:
        """The module that an expression such as ``self.conv``, ``self.block.conv`` or ``self.layers[0]`` names, or None."""
        found = None
        if self._is_own(node):
            found = self._look_up(node)
        elif isinstance(node, ast.Attribute):
            owner = self._submodule(node.value)
            found = None if owner is None else owner._modules.get(node.attr)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            owner = self._submodule(node.value)
            found = None if owner is None else owner._modules.get(str(node.slice.value))
        return found if isinstance(found, nn.Module) else None

    def visit_Attribute(self, node):
        if not self._is_own(node):
            self.visit(node.value)
        elif isinstance(self._look_up(node), nn.Module):
            raise NotUnderstood(f"its forward uses {ast.unparse(node)} other than by calling it")

    def visit_Name(self, node):
        found = self.globals.get(node.id)
        home = found.__name__ if inspect.ismodule(found) else getattr(found, "__module__", None)
        if node.id not in self.locals and (home or "").split(".")[0] != "torch":
            raise NotUnderstood(f"its forward uses {node.id}")

    def generic_visit(self, node):
        if not isinstance(node, self.ALLOWED):
            raise NotUnderstood(f"its forward has a {type(node).__name__}")
        super().generic_visit(node)


def _is_test_for_none(test: ast.Compare) -> bool:
    """Whether it says ``is None`` or ``is not None`` of something."""
    constant = test.comparators[0]
    one_identity = len(test.ops) == 1 and isinstance(test.ops[0], ast.Is | ast.IsNot)
    return one_identity and isinstance(constant, ast.Constant) and constant.value is None
