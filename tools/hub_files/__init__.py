"""Fused operators for autoencoders and VAEs: functions, and layers that take the place of a module's ``forward``."""

from . import functional, layers
from ._backend import BackendError, load_backends, use_backend

load_backends()

__all__ = ["BackendError", "functional", "layers", "use_backend"]
