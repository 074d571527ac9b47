"""Changes the source of a module's ``forward``: what stands behind a norm and may be in it is asked for by name."""

import ast
import inspect
import textwrap

from torch import nn

from fastvae.nn._activation_calls import act_behind
from fastvae.nn._forward_code import NotUnderstood


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
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError) as error:
        raise NotUnderstood("its code cannot be read") from error
    function = tree.body[0]
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or cls.forward.__closure__:
        raise NotUnderstood("its forward is not a plain function")
    calls = _ActivationCalls(norms, activation)
    calls.visit(function)
    if missing := set(norms) - calls.found:
        raise NotUnderstood(f"its forward does not call {activation} behind {', '.join(sorted(missing))}")
    return ast.unparse(ast.fix_missing_locations(function))
