"""The CUDA kernels on the CPU: csrc/cuda/ compiled by the C++ compiler against include/ here, as a backend ``cuda`` for CPU tensors.

In a process of its own: the operators that it registers stay. What the emulated GPU reports fails the test in which it happened.
"""

import ctypes
import os
import re
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
# An access to a vector that is not aligned, an error on a GPU, traps.
ALIGNMENT = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")
FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing")
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Small tensors reach the paths of large ones.
NORM_LIMITS = (
    *("-DFASTVAE_MAX_NORM_BLOCKS=16", "-DFASTVAE_NORM_GROUP_BYTES=16384", "-DFASTVAE_MANY_NORM_GROUPS=8"),
    *("-DFASTVAE_MAX_RMS_NORM_BLOCKS=12", "-DFASTVAE_MIN_RMS_NORM_BLOCKS=3", "-DFASTVAE_RMS_NORM_TILE_BYTES=16384"),
)
DEFINES = ("-DUSE_CUDA", TORCH_TARGET, *NORM_LIMITS, "-include", "cuda_runtime.h")
# What the builds differ in: flags of all sources, flags of the kernels alone, flags of the linker. "plain" is what `make test` runs, the
# others are proofs: see CONTRIBUTING.md.
BUILDS = {
    "plain": (("-O2",), ALIGNMENT, ()),
    "address": (
        ("-O1", "-g1", "-fsanitize=address", "-DEMULATION_SMALL_GRIDS"),
        (),
        ("-fsanitize=address",),
    ),
    "races": (("-O1", "-g1", "-DEMULATION_SMALL_GRIDS", "-DEMULATION_RACES"), ("-fsanitize=thread",), ("-Wl,-z,defs",)),
    "approximate": (("-O2", "-DEMULATION_APPROXIMATE"), ALIGNMENT, ()),
}
MACHINE = ("machine", "stream", "memory", "races")


def pytest_addoption(parser):
    parser.addoption("--emulation", choices=BUILDS, default="plain", help="the build of the emulated kernels")
    parser.addoption("--capturing", action="store_true", help="all streams are being captured, so that calls have workspaces of their own")


def library_of(name: str) -> Path:
    return ROOT / "build" / "emulation" / name / "emulated_cuda.so"


def build(name: str) -> None:
    from ninja import ninja_syntax
    from torch.utils.cpp_extension import include_paths, library_paths

    everywhere, kernels, linker = BUILDS[name]
    compiler = os.environ.get("CXX", "c++")
    includes = [f"-I{HERE}/include", f"-I{ROOT}/csrc", *(f"-isystem {path}" for path in include_paths())]
    library = library_of(name)
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=1000)
        command = f"{compiler} {' '.join((*FLAGS, *everywhere, *includes))} $flags -MMD -MF $out.d -x c++ -c $in -o $out"
        ninja.rule("compile", command, depfile="$out.d")
        directories = " ".join(f"-L{directory}" for directory in library_paths())
        ninja.rule("link", f"{compiler} -shared {' '.join(linker)} $in {directories} -ltorch_cpu -lc10 -ldl -o $out")
        sources = dict.fromkeys(sorted((ROOT / "csrc/cuda").glob("*.cu")), (*kernels, *DEFINES))
        sources |= {HERE / "faults.cpp": (*kernels, *DEFINES), HERE / "device.cpp": DEFINES}
        sources |= {HERE / f"{stem}.cpp": () for stem in MACHINE}
        for source, flags in sources.items():
            ninja.build(f"{source.stem}.o", "compile", str(source), variables={"flags": " ".join(flags)})
        ninja.build(str(library), "link", [f"{source.stem}.o" for source in sources])
    result = subprocess.run([sys.executable, "-m", "ninja", "-C", str(library.parent)], capture_output=True, text=True)
    if result.returncode:
        pytest.exit(result.stdout + result.stderr, returncode=1)


def can_build() -> bool:
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    return not torch.cuda.is_available() and shutil.which(compiler) is not None


def pytest_sessionstart(session):
    """Where several processes share the tests, the one that starts them builds."""
    if not hasattr(session.config, "workerinput") and can_build():
        build(session.config.getoption("--emulation"))


class Emulation(ctypes.CDLL):
    """The library, and what it says of the emulated GPU."""

    def take_reports(self) -> list[str]:
        """What went wrong since the last call; addresses of instructions become places in the sources."""
        text = ctypes.create_string_buffer(1 << 16)
        self["take_reports"](text, len(text))
        reports = text.value.decode().splitlines()
        return [re.sub("0x[0-9a-f]+", lambda address: self._place(address[0]), report) for report in reports]

    def _place(self, address: str) -> str:
        command = ["addr2line", "-e", self._name, "-i", address]
        places = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        # The innermost function of csrc/cuda/; the emulation's own are of no interest.
        inside = [place for place in places if "csrc/" in place] or places
        return " of ".join(Path(place.split(" ")[0]).name for place in inside[:2])

    def take_reached(self) -> set[tuple[str, int]]:
        """The barriers and fences that kernels came to since the last call: file and line."""
        text = ctypes.create_string_buffer(1 << 16)
        self["take_reached"](text, len(text))
        return {(file, int(line)) for file, line in (entry.split(":") for entry in text.value.decode().splitlines())}

    def reset(self, capturing: bool) -> None:
        """To what each test begins with: the first stream, nothing that fails, all barriers in their places."""
        self.set_stream(0)
        self.set_capturing(int(capturing))
        self.fail("allocation", -1)
        self.fail("launch", -1)
        self.remove_site(b"", 0)
        self.take_reports()

    def count(self, name: str) -> int:
        function = self[f"emulated_{name}"]
        function.restype = ctypes.c_int64
        return function()

    def fail(self, what: str, number: int) -> None:
        """Lets the allocation or launch fail that comes after so many others; none where ``number`` is -1."""
        self[f"fail_{what}"](ctypes.c_int64(number))


@pytest.fixture(scope="session", autouse=True)
def emulated(request) -> Emulation:
    """The library; once it is loaded the backend serves CPU tensors."""
    # A conftest that skips where it is imported would end pytest.
    if not can_build():
        pytest.skip("the kernels are emulated where there is no GPU and a C++ compiler")
    library = library_of(request.config.getoption("--emulation"))
    add_cuda(library, "CPU")
    _backend.refresh()
    return Emulation(str(library))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """A test that is marked with a build is one of that build alone."""
    marks = {item: item.get_closest_marker("build") for item in items}
    others = [item for item, mark in marks.items() if mark and config.getoption("--emulation") not in mark.args]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    emulation = pyfuncitem.funcargs.get("emulated")
    if emulation is None:
        return (yield)
    emulation.reset(capturing=pyfuncitem.config.getoption("--capturing"))
    result = yield
    reports = emulation.take_reports()
    assert not reports, "\n".join(reports)
    return result
