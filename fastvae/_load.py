"""How each backend is loaded: by importing its implementations, which register themselves with the operators.

A function returns why its backend is missing, or None. One that is here but broken (a library of another Python or torch, a file cut short,
a Triton of another version) raises one of ``LOAD_ERRORS``.
"""

import ctypes
import importlib
import importlib.machinery
import os
import struct
import sys
from pathlib import Path

import torch

from fastvae.ops import codebook, jacobian
from fastvae.ops._gram_chunks import gram_in_chunks
from fastvae.ops._residual_steps import residual_backward_in_steps, residual_in_steps

# By the name under which this package is loaded: a copy of it may have another.
EXTENSION = f"{__package__}._C"
EXTENSION_PATHS = [Path(__file__).with_name(f"_C{suffix}") for suffix in importlib.machinery.EXTENSION_SUFFIXES]
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")

# The exceptions of a broken installation: the loader of shared libraries raises ImportError and OSError, the start of a module and the
# registration of operators SystemError and RuntimeError, a Triton that lacks names or arguments AttributeError and TypeError.
LOAD_ERRORS = (ImportError, OSError, SystemError, RuntimeError, AttributeError, TypeError)


def message(error: BaseException) -> str:
    """With the cause: torch says which library did not load, and the error behind it says why."""
    cause = f" ({message(error.__cause__)})" if error.__cause__ else ""
    return f"{type(error).__name__}: {error}{cause}"


def load_fallback() -> None:
    importlib.import_module(f"{__package__}.fallback")


def load_reference() -> None:
    importlib.import_module(f"{__package__}.reference")


def _check_length(library: Path) -> None:
    """Raises where the end of a file of Linux's format is missing, since mapping such a file ends the process with a bus error."""
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return
        segments, sections, _, _, segment_size, segment_count, section_size, section_count = struct.unpack_from("<QQIHHHHH", header, 32)
        file.seek(segments)
        table = file.read(segment_size * segment_count)
    length = sections + section_size * section_count
    for start in range(0, len(table) - segment_size + 1, segment_size):
        _, _, offset, _, _, size = struct.unpack_from("<IIQQQQ", table, start)
        length = max(length, offset + size)
    if library.stat().st_size < length:
        raise OSError(f"{library} is cut short: it has {library.stat().st_size} bytes of {length}")


def load_cpp() -> str | None:
    for library in EXTENSION_PATHS:
        if library.exists():
            _check_length(library)
    if not _import(EXTENSION, missing=EXTENSION):
        others = sorted(path.name for path in Path(__file__).parent.glob("_C.*.so"))
        if others:
            raise ImportError(f"{', '.join(others)} was built for another Python than this one ({sys.implementation.cache_tag})")
        return "built without C++ (with a compiler: pip install --no-build-isolation .)"
    return None


def load_triton() -> str | None:
    if not (torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1"):
        return "this torch has no GPU support (TRITON_INTERPRET=1 serves CPU tensors, for tests)"
    return None if _import(f"{__package__}.kernels", missing="triton") else "Triton is not installed (pip install triton)"


def _import(module: str, missing: str) -> bool:
    """False where ``missing`` is not installed; what else is missing is an error."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != missing:
            raise
        return False
    return True


def load_cuda() -> str | None:
    """The library asks for torch's own CUDA library, so it loads where torch has one."""
    if not CUDA_LIBRARY.exists():
        return "built without CUDA C++: there was no nvcc, or torch had no CUDA (see FORCE_CUDA)"
    if torch.version.cuda is None:
        return "built with CUDA C++, but this torch has no CUDA"
    add_cuda(CUDA_LIBRARY)
    return None


def add_cuda(library: Path, key: str = "CUDA") -> None:
    """The backend's kernels, and the operators that are made of them; for tensors of a dispatch key."""
    _check_length(Path(library))
    torch.ops.load_library(str(library))
    jacobian.gram.implement("cuda", key)(gram_in_chunks("cuda"))
    codebook.residual.implement("cuda", key)(residual_in_steps("cuda"))
    codebook.residual_backward.implement("cuda", key)(residual_backward_in_steps("cuda"))


def cuda_build() -> str:
    """The compiler and the architectures of the CUDA library, which has to be loaded."""
    return _text_from_cuda("fastvae_cuda_build") or ""


def cuda_refusal() -> str | None:
    """Why no kernel of the CUDA library, which has to be loaded, runs on the current GPU; or None."""
    reason = _text_from_cuda("fastvae_cuda_refusal")
    return f"its kernels, of {cuda_build()}, do not run on this GPU: {reason}" if reason else None


def _text_from_cuda(function: str) -> str | None:
    describe = getattr(ctypes.CDLL(str(CUDA_LIBRARY)), function)
    describe.restype = ctypes.c_char_p
    text = describe()
    return None if text is None else text.decode()
