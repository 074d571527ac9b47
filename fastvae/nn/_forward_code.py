"""Follows the code of a module's ``forward``, and makes a subclass with another one."""

import ast
import builtins
import functools
import inspect
import math
import operator
import textwrap
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn


class NotUnderstood(Exception):
    """A module's code cannot be followed with certainty; the message says what stands in the way."""


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


def _check_presence(value: object, present: bool, name: str) -> None:
    if (value is not None) != present:
        raise RuntimeError(f"{name}: is {'there' if value is not None else 'None'} now, which fastvae.optimize() did not find it to be")


# Names that the code of torch.fx may use.
_NAMES = {"torch": torch, "device": torch.device, "inf": math.inf, "nan": math.nan, "NoneType": type(None)}


def generate(graph: fx.Graph, *functions: Callable) -> tuple[str, tuple[tuple[str, Callable], ...]]:
    """The code of a graph as a method, and those of ``functions`` and of this file that it uses, by the names they have in it."""
    for node in graph.nodes:
        node.type = None
    code = graph.python_code("self")
    known = {**vars(builtins), **_NAMES}
    used = {name: value for name, value in code.globals.items() if name in code.src and name not in known}
    own = (*functions, _in_place, _check_presence)
    if foreign := [name for name, value in used.items() if value not in own]:
        raise NotUnderstood(f"its code uses {', '.join(sorted(foreign))}")
    return code.src, tuple(used.items())


def rewritten(cls: type[nn.Module], source: str, functions: tuple[tuple[str, Callable], ...], method: str = "forward") -> type[nn.Module]:
    """The subclass of ``cls``, of the same name, with the ``method`` of ``source``, which may use the names that the original one may.
    Modules that are alike share it."""
    return _rewritten(cls, source, functions, method)  # type: ignore[arg-type]  # mypy takes no class for hashable


@functools.cache
def _rewritten(cls: type[nn.Module], source: str, functions: tuple[tuple[str, Callable], ...], method: str) -> type[nn.Module]:
    # Without the name of the original's module, where torch.compile would look for all of these.
    names = {name: value for name, value in getattr(cls, method).__globals__.items() if not name.startswith("__")}
    namespace = {**names, **_NAMES, **dict(functions)}
    exec(compile(source, f"<fastvae: {cls.__qualname__}.{method}>", "exec"), namespace)

    def reduce(self, protocol):
        reduced = cls.__reduce_ex__(self, protocol)
        # For copy and pickle: the class is made anew, as it cannot be imported. A subclass, such as FSDP's, has to say how itself.
        return (_restore, (cls, source, functions, method), *reduced[2:]) if type(self) is subclass else reduced

    members = {
        method: namespace[method],
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    metaclass: type = type(cls)
    subclass = metaclass(cls.__name__, (cls,), members)
    return subclass


def _restore(cls: type[nn.Module], source: str, functions: tuple[tuple[str, Callable], ...], method: str) -> nn.Module:
    return object.__new__(_rewritten(cls, source, functions, method))  # type: ignore[arg-type]  # mypy takes no class for hashable


def trace(parent: nn.Module) -> fx.Graph:
    """The graph of ``forward``, the same in training and in evaluation mode, for attributes that are there or None as they are now."""
    presence = _check_code(parent)
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
