"""How an operator is declared: once, by a named tuple of its arguments, from which its schema, its fake and its gradients follow.

A backend is an overload. ``fastvae::latent_forward.cpp``, ``.cuda``, ``.triton``, ``.fallback`` and ``.reference`` share one schema and one
fake; Python implements an overload by :meth:`Operator.implement`, C++ by ``STABLE_TORCH_LIBRARY_IMPL``.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any

import torch
from torch import Tensor

from fastvae._namespace import NAMESPACE
from fastvae._torch_private import wrap_overload
from fastvae._types import BackendName

BACKENDS = typing.get_args(BackendName)
# Beside the overloads: the operator's definition in torch's own operators, which torch.export writes for other runtimes.
DEFINITION = "definition"

# The type of a number that torch.compile may make symbolic where shapes are dynamic.
Size = Annotated[int, "SymInt"]
# The type of a tensor that the operator writes to.
Written = Annotated[Tensor, "written"]

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Size: "SymInt",
    Size | None: "SymInt?",
    int: "int",
    float: "float",
    bool: "bool",
}

OPERATORS: dict[str, "Operator"] = {}


class Operator:
    """One operator: its arguments, and an overload for each backend.

    Args:
        name: of the operator in ``torch.ops.fastvae``.
        arguments: a named tuple class with one field an argument. Its method ``allocate`` returns empty results in their shapes, dtypes and
            layouts: a tensor, a named tuple of tensors, or ``None`` for an operator that only writes to its arguments. It is the fake of
            every overload, and what implementations in Python allocate their results with.
    """

    def __init__(self, name: str, arguments: Any):
        self.name, self.arguments = name, arguments
        # An autograd.Function takes these.
        self._inputs = *arguments._fields, "backend"
        self.overloads: dict[str, Callable] = {}
        schema = _arguments_schema(arguments) + " -> " + _results_schema(arguments)
        for backend in BACKENDS:
            qualified = f"{NAMESPACE}::{name}.{backend}"
            torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, self._of_one_object(arguments.allocate))
            self.overloads[backend] = getattr(getattr(getattr(torch.ops, NAMESPACE), name), backend)
        wrap_overload(self.overloads["cuda"], _with_out_of_memory_error)
        self.overloads[DEFINITION] = self.in_torch_operators
        self._definition: Callable | None = None
        OPERATORS[name] = self

    def implement(self, backend: str, dispatch_keys: str = "CompositeExplicitAutograd") -> Callable:
        """Decorates a function of the arguments, as one object, that is the backend's implementation.

        The implementation ``"reference"`` is the operator's definition too, unless :meth:`define` gives another.
        """

        def register(function):
            torch.library.impl(f"{NAMESPACE}::{self.name}.{backend}", dispatch_keys, self._of_one_object(function))
            if backend == "reference" and self._definition is None:
                self._definition = function
            return function

        return register

    def define(self, definition: Callable) -> Callable:
        """Decorates a function of the arguments, as one object: the operator in torch's own operators that other runtimes have and run
        fast. It reads no value of a tensor, and holds for all sizes."""
        self._definition = definition
        return definition

    def in_torch_operators(self, *inputs):
        """The results by the operator's definition, for tracing."""
        assert self._definition is not None, f"{self.name} has no implementation in fastvae.reference"
        return self._definition(self.arguments(*inputs))

    def takes_arguments(self, forward: Callable) -> Callable:
        """Decorates ``forward(*inputs)`` of an autograd.Function whose inputs are the arguments and the backend.

        torch.compile counts the parameters to know whether the first one is ctx.
        """
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in self._inputs]
        vars(forward)["__signature__"] = inspect.Signature(parameters)
        return forward

    def gradients(self, **by_name: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs of an autograd.Function, which are the arguments and the backend; None for the others."""
        return tuple(map(by_name.get, self._inputs))

    def _of_one_object(self, function: Callable) -> Callable:
        arguments = self.arguments

        def of_inputs(*inputs):
            return function(arguments(*inputs))

        return of_inputs


def _with_out_of_memory_error(call: Callable) -> Callable:
    """``call`` of a CUDA operator, from which an allocation that failed comes as what torch raises elsewhere, and retry code catches."""

    def checked(*arguments, **options):
        try:
            return call(*arguments, **options)
        except RuntimeError as error:
            message = str(error)
            # The sentence of csrc/cuda/errors.cu: the stable ABI turns every exception into a RuntimeError.
            if message.startswith("fastvae: CUDA out of memory"):
                raise torch.OutOfMemoryError(message) from None
            raise

    return checked


def _arguments_schema(arguments: type) -> str:
    hints = typing.get_type_hints(arguments, include_extras=True)
    letters = iter("abcdef")
    types = (f"Tensor({next(letters)}!)" if hint == Written else _SCHEMA_TYPES[hint] for hint in hints.values())
    return "(" + ", ".join(f"{kind} {name}" for kind, name in zip(types, hints, strict=True)) + ")"


def _results_schema(arguments: Any) -> str:
    results = typing.get_type_hints(arguments.allocate)["return"]
    if results is Tensor:
        return "Tensor"
    if results is type(None):
        return "()"
    return "(" + ", ".join(f"Tensor {name}" for name in results._fields) + ")"
