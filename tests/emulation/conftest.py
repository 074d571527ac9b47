"""The CUDA kernels on the CPU: csrc/cuda/ compiled by the C++ compiler against include/ here, as a backend ``cuda`` for CPU tensors.

In a process of its own: the operators that it registers stay.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastvae import _backend
from fastvae._load import add_cuda

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "emulation"
LIBRARY = BUILD / "emulated_cuda.so"
# An access to a vector that is not aligned, an error on a GPU, traps.
SANITIZE = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", *SANITIZE)
DEFINES = (
    "-DUSE_CUDA",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DFASTVAE_MAX_NORM_BLOCKS=16",
    "-DFASTVAE_NORM_GROUP_BYTES=16384",
    "-DFASTVAE_MANY_NORM_GROUPS=8",
    "-include",
    "cuda_runtime.h",
)


def build() -> None:
    from ninja import ninja_syntax
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler = os.environ.get("CXX", "c++")
    includes = [f"-I{HERE}/include", f"-I{ROOT}/csrc", *(f"-isystem {path}" for path in include_paths())]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=1000)
        flags = " ".join((*FLAGS, *includes, *DEFINES))
        ninja.rule("compile", f"{compiler} {flags} -MMD -MF $out.d -x c++ -c $in -o $out", depfile="$out.d")
        directories = " ".join(f"-L{directory}" for directory in library_paths())
        ninja.rule("link", f"{compiler} -shared $in {directories} -ltorch_cpu -o $out")
        sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), HERE / "device.cpp"]
        for source in sources:
            ninja.build(f"{source.stem}.o", "compile", str(source))
        ninja.build(str(LIBRARY), "link", [f"{source.stem}.o" for source in sources])
    result = subprocess.run([sys.executable, "-m", "ninja", "-C", str(BUILD)], capture_output=True, text=True)
    if result.returncode:
        pytest.exit(result.stdout + result.stderr, returncode=1)


def can_build() -> bool:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return not torch.cuda.is_available() and shutil.which(compiler) is not None


def pytest_sessionstart(session):
    """Where several processes share the tests, the one that starts them builds."""
    if not hasattr(session.config, "workerinput") and can_build():
        build()


@pytest.fixture(scope="session", autouse=True)
def emulated() -> ctypes.CDLL:
    """The library; once it is loaded the backend serves CPU tensors."""
    # A conftest that skips where it is imported would end pytest.
    if not can_build():
        pytest.skip("the kernels are emulated where there is no GPU and a C++ compiler")
    add_cuda(LIBRARY, "CPU")
    _backend.refresh()
    return ctypes.CDLL(str(LIBRARY))
