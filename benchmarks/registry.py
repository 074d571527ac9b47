"""The cases that are measured, of every family, each with its inputs and the providers that compete in it.

A family's file, ``bench_<stem>.py``, ends in a tuple ``CASES``::

    CASES = (
        Case(
            family="reconstruction",
            name="mse_loss",
            size=(32, 3, 256, 256),
            tiny=(2, 3, 5, 7),
            setup=make_inputs,
            providers={"eager": forward_backward(eager), "compile": compiled(eager), "fastvae": forward_backward(fused)},
            outputs=("loss",),
            work=bytes_moved,
        ),
    )

A provider is a function from inputs to a call without arguments, so one that needs more than :func:`forward_backward` and :func:`compiled`
is written out: it imports a peer and raises :class:`Unavailable` where that is not installed, converts its inputs, or builds a training
step whose parameters are the leaves.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import benchmarks
from fastvae import BackendError, use_backend

OURS = "fastvae"

Results = dict[str, Tensor]
Operation = Callable[[], Tensor | Sequence[Tensor]]


class Unavailable(RuntimeError):
    """A provider cannot run here; the message is the reason, which is printed."""


class WrongResult(RuntimeError):
    """A provider disagrees with the first one of its case, so its time means nothing."""


@dataclass(frozen=True)
class Inputs:
    """The data of one operation.

    Args:
        leaves: what gradients are taken of, by name; a training step puts its parameters here.
        others: further arguments, by name.
        incoming: the gradient that flows into each output; ``None`` stands for 1, for a scalar.
    """

    leaves: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)
    incoming: tuple[Tensor | None, ...] = (None,)

    def clear_gradients(self) -> None:
        for leaf in self.leaves.values():
            leaf.grad = None

    @property
    def nbytes(self) -> int:
        values = (*self.leaves.values(), *self.others.values(), *self.incoming)
        return sum(value.nbytes for value in values if isinstance(value, Tensor))


Provider = Callable[[Inputs], Operation]


def _as_they_are(results: Results, inputs: Inputs) -> Results:
    return results


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    Args:
        family, name: the family's stem and the operation.
        size: what ``setup`` gets; ``tiny`` is a size at which the tests check the providers against each other.
        setup: ``(size, dtype, device) -> Inputs``. It runs under a fixed seed, once for each provider.
        providers: from the inputs to a call without arguments that does the operation once and returns its outputs. A provider that
            cannot run here raises :class:`Unavailable`. The first is what the others are checked against.
        outputs: the names of the outputs; with the gradients, ``"grad <leaf>"``, they are what is compared.
        work: what one call of the fused kernels moves (``unit="B"``) or computes (``unit="FLOP"``), from the inputs.
        compare: from the results to what has to agree between providers; raises :class:`WrongResult` for what can be judged alone.
        remark: from a call of the fused kernels to what else its figures should say.
        quick: whether ``--quick`` measures it.
    """

    family: str
    name: str
    size: tuple[int, ...]
    tiny: tuple[int, ...]
    setup: Callable[[tuple[int, ...], torch.dtype, torch.device], Inputs]
    providers: Mapping[str, Provider]
    outputs: tuple[str, ...]
    work: Callable[[Inputs], float]
    unit: str = "B"
    dtype: torch.dtype = torch.float32
    compare: Callable[[Results, Inputs], Results] = _as_they_are
    remark: Callable[[Operation], str] | None = None
    quick: bool = False

    @property
    def size_name(self) -> str:
        return "x".join(map(str, self.size))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        return f"{self.name}-{self.size_name}-{self.dtype_name}"

    def make_inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        torch.manual_seed(seed)
        return self.setup(self.size, self.dtype, device)


def forward_backward(function: Callable[..., Tensor | Sequence[Tensor]]) -> Provider:
    """The provider that calls ``function(**leaves, **others)`` and takes the gradients of the leaves."""

    def provide(inputs: Inputs) -> Operation:
        arguments = {**inputs.leaves, **inputs.others}

        def operation():
            inputs.clear_gradients()
            outputs = function(**arguments)
            torch.autograd.backward(outputs, inputs.incoming)
            return outputs

        return operation

    return provide


def compiled(function: Callable[..., Tensor | Sequence[Tensor]]) -> Provider:
    """:func:`forward_backward` of ``torch.compile(function)`` in its default mode."""

    def provide(inputs: Inputs) -> Operation:
        _start_compiler(next(iter(inputs.leaves.values())).device)
        return forward_backward(torch.compile(function))(inputs)

    return provide


@functools.cache
def _start_compiler(device: torch.device) -> None:
    """Compiles something small, so that the first case's compile time is its own."""
    try:
        torch.compile(torch.neg)(torch.ones(8, device=device))
    except RuntimeError as error:
        raise Unavailable(f"torch.compile does not work here: {error}") from error


def forced(provider: Provider, backend: str) -> Provider:
    """The provider on one of fastvae's backends."""

    def provide(inputs: Inputs) -> Operation:
        with use_backend(backend):
            operation = provider(inputs)

        def on_backend():
            with use_backend(backend):
                try:
                    return operation()
                except BackendError as error:
                    raise Unavailable(str(error)) from error

        return on_backend

    return provide


def families() -> tuple[str, ...]:
    """The stems of the files ``bench_<stem>.py``."""
    names = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    return tuple(name.removeprefix("bench_") for name in sorted(names) if name.startswith("bench_"))


@functools.cache
def cases(family: str) -> tuple[Case, ...]:
    """The cases of a family."""
    return importlib.import_module(f"benchmarks.bench_{family}").CASES


def all_cases() -> tuple[Case, ...]:
    return tuple(case for family in families() for case in cases(family))
