"""Imports the implementations, each of which registers itself with the operators."""

import importlib
import os

import torch

from fastvae import _backend, reference  # noqa: F401


def load_implementations() -> None:
    _load("cpp", "fastvae._C", "built without C++ (with a compiler: pip install --no-build-isolation .)")
    if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
        _load("triton", "fastvae.kernels", "Triton is not installed (pip install triton)")
    else:
        _backend.UNAVAILABLE["triton"] = "this torch has no GPU support (TRITON_INTERPRET=1 serves CPU tensors, for tests)"
    _backend.UNAVAILABLE["cuda"] = "built without CUDA C++"
    _backend.refresh()


def _load(backend: str, module: str, reason: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, "triton"):
            raise
        _backend.UNAVAILABLE[backend] = reason
