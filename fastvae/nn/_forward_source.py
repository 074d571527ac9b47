"""Changes the source of a module's ``forward``: what stands behind a norm and may be in it is asked for by name."""

import ast
import inspect
import re
import textwrap

from torch import nn

from fastvae.nn._activation_calls import act_behind
from fastvae.nn._forward_code import NotUnderstood
from fastvae.nn._lean_modules import conv_of_delayed, delayed_norm


class _ActivationCalls(ast.NodeTransformer):
    """Makes a call of the activation, where it is the first one behind the call of a norm, one of :func:`act_behind`.

    Nodes are visited in the order of the source, and of the branches of an ``if`` each may call the norm.
    """

    def __init__(self, norms: tuple[str, ...], activation: str):
        self.norms = {f"self.{name}": name for name in norms}
        self.activation = activation
        self.norm: str | None = None
        self.found: set[str] = set()

    def visit_Call(self, node):
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called in self.norms:
            self.norm = called
        elif called == self.activation and self.norm is not None and len(node.args) == 1 and not node.keywords:
            self.found.add(self.norms[self.norm])
            arguments = [ast.parse(self.norm, mode="eval").body, node.func, *node.args]
            node, self.norm = ast.Call(ast.Name(act_behind.__name__, ast.Load()), arguments, []), None
        return node


def with_activations_asked_for(cls: type[nn.Module], norms: tuple[str, ...], activation: str) -> str:
    """The source of the ``forward`` of a class, with :func:`act_behind` for the activation behind each of the norms.

    Args:
        norms: the names of the norms.
        activation: what is called behind each of them, as it stands in the source: ``"self.nonlinearity"`` or ``"F.silu"``.
    """
    function = _function_of(cls)
    calls = _ActivationCalls(norms, activation)
    calls.visit(function)
    if missing := set(norms) - calls.found:
        raise NotUnderstood(f"its forward does not call {activation} behind {', '.join(sorted(missing))}")
    return ast.unparse(ast.fix_missing_locations(function))


def _function_of(cls: type[nn.Module]) -> ast.FunctionDef:
    """The ``forward`` of a class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotUnderstood("its code cannot be read") from error
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or cls.forward.__closure__:
        raise NotUnderstood("its forward is not a plain function")
    return function


class _Delay(ast.NodeTransformer):
    """Makes a call of the norm one of :func:`delayed_norm`, and a call of the convolution one of :func:`conv_of_delayed`."""

    def __init__(self, norm: str, act: str, conv: str):
        self.modules = norm, act, conv
        self.functions = {f"self.{norm}": delayed_norm.__name__, f"self.{conv}": conv_of_delayed.__name__}

    def visit_Call(self, node):
        self.generic_visit(node)
        name = self.functions.get(ast.unparse(node.func))
        if name is None or len(node.args) != 1 or node.keywords:
            return node
        names = [ast.Constant(module) for module in self.modules]
        return ast.Call(ast.Name(name, ast.Load()), [ast.Name("self", ast.Load()), *names, *node.args], [])


def with_norm_delayed(cls: type[nn.Module], norm: str, act: str, conv: str) -> str:
    """The source of the ``forward`` of a class that ends with the calls of these three modules, in which the convolution normalises.

    The norm may be called in the branches of an ``if``.
    """
    function = _function_of(cls)
    end = [ast.unparse(statement) for statement in function.body[-4:]]
    match = re.fullmatch(r"return (\w+)", end[-1])
    calls = [f"{match[1]} = self.{name}({match[1]})" for name in (norm, act, conv)] if match else []
    if not match or end[1:3] != calls[1:] or calls[0] not in map(str.strip, end[0].splitlines()):
        raise NotUnderstood(f"its forward does not end with {norm}, {act} and {conv}")
    _Delay(norm, act, conv).visit(function)
    return ast.unparse(ast.fix_missing_locations(function))
