"""Imports the implementations, each of which registers itself with the operators."""

import ctypes
import importlib
import os
from pathlib import Path

import torch

from fastvae import _backend
from fastvae.reference.jacobian import gram_in_chunks

CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")


def load_implementations() -> None:
    # Plain PyTorch: these two are always there.
    importlib.import_module("fastvae.reference")
    importlib.import_module("fastvae.fallback")
    _load("cpp", "fastvae._C", "built without C++ (with a compiler: pip install --no-build-isolation .)")
    if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
        _load("triton", "fastvae.kernels", "Triton is not installed (pip install triton)")
    else:
        _backend.UNAVAILABLE["triton"] = "this torch has no GPU support (TRITON_INTERPRET=1 serves CPU tensors, for tests)"
    _load_cuda()
    _backend.refresh()


def _load(backend: str, module: str, reason: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, "triton"):
            raise
        _backend.UNAVAILABLE[backend] = reason


def _load_cuda() -> None:
    """The library asks for torch's own CUDA library, so it loads where torch has one."""
    if not CUDA_LIBRARY.exists():
        _backend.UNAVAILABLE["cuda"] = "built without CUDA C++: there was no nvcc, or torch had no CUDA (see FORCE_CUDA)"
    elif torch.version.cuda is None:
        _backend.UNAVAILABLE["cuda"] = "built with CUDA C++, but this torch has no CUDA"
    else:
        add_cuda(CUDA_LIBRARY)


def add_cuda(library: Path, key: str = "CUDA") -> None:
    """The backend's kernels, and the operator that is made of them; for tensors of a dispatch key."""
    torch.ops.load_library(str(library))
    torch.library.impl("fastvae::jacobian_gram.cuda", key, gram_in_chunks("cuda"))


def cuda_build() -> str | None:
    """What the CUDA library was built with and for; ``None`` where it is not loaded."""
    if "cuda" in _backend.UNAVAILABLE:
        return None
    describe = ctypes.CDLL(str(CUDA_LIBRARY)).fastvae_cuda_build
    describe.restype = ctypes.c_char_p
    return describe().decode()
