"""The backends, and which of them serves an operator; an error says what would serve where the asked-for one cannot."""

import functools
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from fastvae import _load, ops
from fastvae._gpu import architecture, searches_on_tensor_cores
from fastvae._namespace import NAMESPACE
from fastvae._torch_private import constant_when_compiled, has_kernel
from fastvae._types import BackendName
from fastvae.ops._operator import DEFINITION

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
GPU_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Backend:
    """The facts about a set of implementations. The dispatcher knows which operators it has.

    ``load`` imports it and returns why it is missing, or None. ``missing`` is that reason; ``error`` the exception of a backend that is
    installed but broken, which serves nothing, even where a part of it got registered. ``refusal`` says why none of its kernels runs on the
    GPU that is the current one, or returns None.
    """

    load: Callable[[], str | None]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    # The types of the devices on which it is chosen; None for every device that torch has.
    devices: tuple[str, ...] | None = None
    # Whether drawn noise is stored for the backward pass, where drawing it again takes longer than reading it.
    keeps_noise: bool = True
    refusal: Callable[[], str | None] = lambda: None
    missing: str | None = None
    error: Exception | None = None


# resolve() asks the backends in this order; for two of them on a GPU see _gpu.py. The reference is the oracle of the tests and is chosen
# on no device: it serves where it is forced.
BACKENDS = {
    "cpp": Backend(_load.load_cpp, devices=("cpu",)),
    "cuda": Backend(_load.load_cuda, GPU_FLOATS, devices=("cuda",), keeps_noise=False, refusal=_load.cuda_refusal),
    "triton": Backend(_load.load_triton, GPU_FLOATS, devices=("cuda",), keeps_noise=False),
    "fallback": Backend(_load.load_fallback),
    "reference": Backend(_load.load_reference, devices=()),
}
# Plain PyTorch, registered for every device that torch has.
ON_EVERY_DEVICE = ("fallback", "reference")
_CPU = torch.device("cpu")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call."""


class _Forced(threading.local):
    # Set in __init__, not on the class: torch.compile guards on the value that the calling thread sees.
    def __init__(self):
        self.backend = None


_forced = _Forced()
_served: dict[tuple[str, str], tuple[str, ...]] = {}


def load_backends() -> None:
    """Loads all of them; one that cannot serve has its reason in ``missing``."""
    for name, backend in BACKENDS.items():
        try:
            backend.missing = backend.load()
        except _load.LOAD_ERRORS as error:
            backend.missing, backend.error = f"it is installed but does not load: {_load.message(error)}", error
            warnings.warn(f"fastvae: the backend {name!r} serves no call: {backend.missing}", RuntimeWarning, stacklevel=2)
    refresh()


def refresh() -> None:
    """Asks the dispatcher which backend implements which operator; called once the implementations are imported."""
    for device, key in _DISPATCH_KEYS.items():
        for op in ops.OPERATORS:
            _served[op, device] = tuple(name for name in BACKENDS if _is_registered(name, op, key))


def _is_registered(backend: str, op: str, dispatch_key: str) -> bool:
    if BACKENDS[backend].error:
        return False
    return has_kernel(f"{NAMESPACE}::{op}.{backend}", dispatch_key)


def serving(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that can serve ``op``."""
    return tuple(name for name in _implementing(op, device_type) if dtype in BACKENDS[name].dtypes)


def _implementing(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that implement ``op`` for a device, of any dtype."""
    return _served.get((op, device_type), ON_EVERY_DEVICE)


def preference(device_type: str) -> tuple[str, ...]:
    """The backends that are chosen on a device, in the order in which they are asked."""
    return tuple(name for name, backend in BACKENDS.items() if backend.devices is None or device_type in backend.devices)


@dataclass(frozen=True)
class Gpu:
    """The facts about one GPU: its architecture ("sm_90", "gfx942", ...; "" where a fake tensor is on none), and why backends that are
    loaded do not run on it."""

    architecture: str
    refusals: dict[str, str]


@functools.cache
def gpu(index: int | None) -> Gpu:
    """The facts about the GPU of that number, which are asked for once."""
    if not torch.cuda.is_available():
        return Gpu("", {})
    with torch.cuda.device(index):
        refusals = {name: backend.refusal() for name, backend in BACKENDS.items() if not backend.missing}
    return Gpu(architecture(index), {name: reason for name, reason in refusals.items() if reason})


# Constants for torch.compile, which does not trace how the facts are found.
@constant_when_compiled
def _refusal_on_gpu(backend: str, index: int | None) -> str | None:
    return gpu(index).refusals.get(backend)


@constant_when_compiled
def _order_on_gpu(index: int | None) -> tuple[str, ...]:
    return tuple(name for name in _preferences["cuda"] if name not in gpu(index).refusals)


@constant_when_compiled
def _architecture(index: int | None) -> str:
    return gpu(index).architecture


def _refusal(backend: str, device: torch.device) -> str | None:
    return _refusal_on_gpu(backend, device.index) if device.type == "cuda" else None


def _order(device_type: str, device: torch.device, multiply_adds: int, dim: int) -> tuple[str, ...]:
    """The backends that are chosen on a device, in the order in which they are asked."""
    if device_type != "cuda":
        return _preferences.get(device_type, ("fallback",))
    order = _order_on_gpu(device.index)
    if multiply_adds and "triton" in order and searches_on_tensor_cores(multiply_adds, dim, _architecture(device.index)):
        return "triton", *order
    return order


def resolve(op: str, device: torch.device, dtype: torch.dtype, multiply_adds: int = 0, dim: int = 0) -> str:
    """The backend for ``op`` on this device and dtype: the forced one, or the first that serves them. While torch.onnx.export traces it
    is the operator's definition.

    ``multiply_adds`` and ``dim`` are those of a search through a codebook, see :func:`fastvae._gpu.searches_on_tensor_cores`.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        # No other runtime has the package's operators.
        return DEFINITION
    # torch takes 3 us to make the name of a type.
    device_type = "cpu" if device == _CPU else device.type
    implementing = _served.get((op, device_type), ON_EVERY_DEVICE)
    forced = _forced.backend or _from_environment
    if forced is not None:
        if forced not in implementing or dtype not in BACKENDS[forced].dtypes or _refusal(forced, device):
            raise BackendError(_explain(forced, op, device, dtype)) from BACKENDS[forced].error
        return forced
    for name in _order(device_type, device, multiply_adds, dim):
        if name in implementing and dtype in BACKENDS[name].dtypes:
            break
    # Every order ends with the fallback, which serves what is left.
    return name


def keeps_noise(backend: str) -> bool:
    """Whether the noise that ``backend``, as :func:`resolve` names it, has drawn is stored for the backward pass."""
    return backend != DEFINITION and BACKENDS[backend].keeps_noise


def _explain(backend: str, op: str, device: torch.device, dtype: torch.dtype) -> str:
    able = ", ".join(name for name in serving(op, device.type, dtype) if not _refusal(name, device)) or "none"
    if backend not in _implementing(op, device.type):
        reason = BACKENDS[backend].missing or f"it has no {op} for {device.type} tensors"
    else:
        reason = _refusal(backend, device) or f"it takes {', '.join(str(d) for d in BACKENDS[backend].dtypes)}"
    return f"backend {backend!r} cannot serve {op} on {device.type} with {dtype}: {reason}. Backends that can: {able}."


def check_plain_torch() -> None:
    """Raises where a backend is forced and plain PyTorch is the only one that serves."""
    forced = _forced.backend or _from_environment
    if forced not in (None, "reference"):
        what = "forward-mode differentiation, or torch.func inside torch.compile"
        raise BackendError(f"backend {forced!r} cannot serve {what}: no kernel has a rule for it. Backends that can: reference.")


def _check_name(backend: str | None, source: str) -> str | None:
    if backend in (None, "auto"):
        return None
    if backend not in BACKENDS:
        raise ValueError(f"{source}: got {backend!r}, takes one of auto, {', '.join(BACKENDS)}")
    return backend


_preferences = {device_type: preference(device_type) for device_type in _DISPATCH_KEYS}
_from_environment = _check_name(os.environ.get("FASTVAE_BACKEND"), "FASTVAE_BACKEND")


@contextmanager
def use_backend(name: BackendName | Literal["auto"] | None):
    """Forces a backend for the calling thread: ``with fastvae.use_backend("reference"): ...``.

    Args:
        name: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"fallback"``, ``"reference"``, or ``"auto"`` (also ``None``) for the first of them
            that serves a call on its device and at its size; that is never ``"reference"``.

    A call that the backend cannot serve raises :class:`BackendError`; there is no silent fallback. A backward pass uses the backend of
    its forward pass. The environment variable ``FASTVAE_BACKEND`` does the same for a whole process.
    """
    previous, _forced.backend = _forced.backend, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _forced.backend = previous
