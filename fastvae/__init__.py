"""Fused operators for autoencoders and VAEs in PyTorch."""

from pathlib import Path

# In a checkout the Triton kernels lie beside this package, in kernels/; a wheel holds them as fastvae/kernels/.
if not (Path(__path__[0]) / "kernels").is_dir():
    __path__.append(str(Path(__path__[0]).parent))

from fastvae import functional
from fastvae._backend import BackendError, use_backend
from fastvae._load import load_implementations
from fastvae.functional import vae_loss

__version__ = "0.1.0"
__all__ = ["BackendError", "functional", "optimize", "use_backend", "vae_loss"]

load_implementations()


def __getattr__(name: str):
    # The layers above functional are imported where something of them is asked for.
    if name == "optimize":
        from fastvae.nn.optimize import optimize

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
