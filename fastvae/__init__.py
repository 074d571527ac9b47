"""Fused operators for autoencoders and VAEs in PyTorch."""

import importlib
from typing import TYPE_CHECKING

from fastvae import _checkout, functional
from fastvae._backend import BackendError, load_backends, use_backend
from fastvae.functional import vae_loss

if TYPE_CHECKING:
    from fastvae import compat, distributions, export, models, nn, reference
    from fastvae.models.tiling import tiled
    from fastvae.nn.optimize import optimize

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "compat",
    "distributions",
    "export",
    "functional",
    "models",
    "nn",
    "optimize",
    "reference",
    "tiled",
    "use_backend",
    "vae_loss",
]

# Functions of the layers above functional, and where they are.
_FUNCTIONS = {"optimize": "fastvae.nn.optimize", "tiled": "fastvae.models.tiling"}

_checkout.map_kernels()
load_backends()


def __getattr__(name: str):
    # The layers above functional are imported when something asks for them: `import fastvae` stays quick.
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in __all__:
        return importlib.import_module(f"fastvae.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
