"""Which backend serves an operator, and an error that says what would where the asked-for one cannot."""

import os
import threading
from contextlib import contextmanager

import torch

from fastvae import _ops

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# What the kernels of a backend are written for; which operators it has is asked of the dispatcher.
DTYPES = {
    "cpp": FLOATS,
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "fallback": FLOATS,
    "reference": FLOATS,
}
# Plain PyTorch, registered for every device that torch has.
ON_EVERY_DEVICE = ("fallback", "reference")
# In the order in which they are asked. On a GPU two may serve, which were not measured one against the other: C++ comes first because it
# takes less time to launch. The reference is the oracle of the tests: it serves only where it is forced.
PREFERENCE = {"cpu": ("cpp", "fallback"), "cuda": ("cuda", "triton", "fallback")}
# The backends that store drawn noise for the backward pass: drawing it again takes them longer than reading it.
KEEPS_NOISE = ("cpp", "fallback", "reference")
# For an operator, from how many elements on Triton was measured to be the faster of the two. Nothing was measured yet.
TRITON_FROM: dict[str, int] = {}
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

# Why a backend is missing, filled in by the modules that load it.
UNAVAILABLE: dict[str, str] = {}
# Of those, the backends that are installed but broken, with the error: they serve nothing, even where a part of them got registered.
ERRORS: dict[str, Exception] = {}


class BackendError(RuntimeError):
    """The backend that was asked for cannot serve the call."""


class _Forced(threading.local):
    # Set in __init__, not on the class: torch.compile guards on the value that the calling thread sees.
    def __init__(self):
        self.backend = None


_forced = _Forced()
_served: dict[tuple[str, str], tuple[str, ...]] = {}


def refresh() -> None:
    """Asks the dispatcher which backend implements which operator; called once the implementations are imported."""
    for device, key in _DISPATCH_KEYS.items():
        for op in _ops.operators():
            _served[op, device] = tuple(
                backend
                for backend in _ops.BACKENDS
                if backend not in ERRORS and torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastvae::{op}.{backend}", key)
            )


def serving(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends that can serve ``op``."""
    return tuple(b for b in _implementing(op, device_type) if dtype in DTYPES[b])


def _implementing(op: str, device_type: str) -> tuple[str, ...]:
    """The backends that implement ``op`` for a device, of any dtype."""
    return _served.get((op, device_type), ON_EVERY_DEVICE)


def preference(op: str, device_type: str, numel: int, triton_from: dict[str, int] = TRITON_FROM) -> tuple[str, ...]:
    """The backends for ``op`` on ``numel`` elements, in the order in which they are asked."""
    order = PREFERENCE.get(device_type, ("fallback",))
    if device_type == "cuda" and op in triton_from and numel >= triton_from[op]:
        return ("triton", *(backend for backend in order if backend != "triton"))
    return order


def choice(device_type: str) -> str:
    """The order of the backends in words, and how it was found."""
    order = ", ".join(PREFERENCE[device_type])
    if device_type != "cuda":
        return order
    measured = ", ".join(f"{op} from {numel} elements on" for op, numel in TRITON_FROM.items())
    return f"{order}; " + (f"triton first for {measured}" if measured else "cuda against triton is not measured")


def resolve(op: str, device: torch.device, dtype: torch.dtype, numel: int = 0) -> str:
    """The backend for ``op`` on ``numel`` elements of this device and dtype: the forced one, or the first that serves them."""
    served = _served.get((op, device.type), ON_EVERY_DEVICE)
    forced = _forced.backend or _from_environment
    if forced is not None:
        if forced not in served or dtype not in DTYPES[forced]:
            raise BackendError(_explain(forced, op, device.type, dtype)) from ERRORS.get(forced)
        return forced
    for backend in preference(op, device.type, numel):
        if backend in served and dtype in DTYPES[backend]:
            break
    # Every order ends with the fallback, which serves what is left.
    return backend


def _explain(backend: str, op: str, device_type: str, dtype: torch.dtype) -> str:
    able = ", ".join(serving(op, device_type, dtype)) or "none"
    if backend not in _implementing(op, device_type):
        reason = UNAVAILABLE.get(backend, f"it has no {op} for {device_type} tensors")
    else:
        reason = f"it takes {', '.join(str(d) for d in DTYPES[backend])}"
    return f"backend {backend!r} cannot serve {op} on {device_type} with {dtype}: {reason}. Backends that can: {able}."


def check_plain_torch() -> None:
    """Raises where a backend is forced and plain PyTorch is the only one that serves."""
    forced = _forced.backend or _from_environment
    if forced not in (None, "reference"):
        what = "forward-mode differentiation, or torch.func inside torch.compile"
        raise BackendError(f"backend {forced!r} cannot serve {what}: no kernel has a rule for it. Backends that can: reference.")


def _check_name(backend: str | None, source: str) -> str | None:
    if backend in (None, "auto"):
        return None
    if backend not in _ops.BACKENDS:
        raise ValueError(f"{source}: got {backend!r}, takes one of auto, {', '.join(_ops.BACKENDS)}")
    return backend


_from_environment = _check_name(os.environ.get("FASTVAE_BACKEND"), "FASTVAE_BACKEND")


@contextmanager
def use_backend(name: str | None):
    """Forces a backend for the calling thread: ``with fastvae.use_backend("reference"): ...``.

    Args:
        name: ``"cpp"``, ``"cuda"``, ``"triton"``, ``"fallback"``, ``"reference"``, or ``"auto"`` (also ``None``) for the first of them
            that serves a call; that is never ``"reference"``.

    A call that the backend cannot serve raises :class:`BackendError`; there is no silent fallback. A backward pass uses the backend of
    its forward pass. The environment variable ``FASTVAE_BACKEND`` does the same for a whole process.
    """
    previous, _forced.backend = _forced.backend, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _forced.backend = previous
