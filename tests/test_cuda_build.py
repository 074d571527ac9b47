"""The CUDA library without a GPU: it compiles without a warning, spills nothing, and asks for nothing but torch's
stable shim and the C and C++ libraries; its registers are those of a table."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _calls import ENTROPIES
from _helpers import brief

from fastvae.ops import OPERATORS

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests are not in a checkout")
# nvcc takes minutes, so these are proofs; tools/compat.py runs them on what it builds, for an architecture a day.
compiles = pytest.mark.prove
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed, so the CUDA kernels cannot be compiled here")


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("cuda_table", ROOT / "tools/cuda_table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_table"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def objects(table) -> Path:
    """Compiled with -Werror all-warnings, for TORCH_CUDA_ARCH_LIST or all architectures: ninja compiles again what has changed."""
    return table.build()


@pytest.fixture(scope="module")
def library(table, objects) -> Path:
    return table.library()


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    settings = ("FASTVAE_", "CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited | environment, capture_output=True, text=True)


STAND_IN = """#!/usr/bin/env bash
# Writes down when it starts and ends, and makes the file that it is asked for.
case "$*" in
  *--list-gpu-arch*) printf 'compute_80\\ncompute_90\\ncompute_120\\n'; exit ;;
  *--version*) echo 'release 13.0, V13.0.48'; exit ;;
  *-fsyntax-only*) exit ;;
esac
echo "start $*" >> {log}
while [ "$1" != -o ]; do shift; done
sleep 0.05
touch "$2"
echo end >> {log}
"""


class StandIns:
    """A compiler and an nvcc that write down how they are called; nvcc knows 8.0, 9.0 and 12.0."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "calls"
        (folder / "bin").mkdir()
        for name in ("nvcc", "g++", "ccache"):
            (folder / "bin" / name).write_text(STAND_IN.format(log=self.log))
            (folder / "bin" / name).chmod(0o755)

    def build(self, **environment: str) -> list[str]:
        """The lines of the log."""
        places = ("--build-temp", self.folder / "temp", "--build-lib", self.folder / "lib")
        defaults = {"FORCE_CUDA": "1", "CUDA_HOME": str(self.folder), "CXX": str(self.folder / "bin/g++")}
        result = setup("build_ext", *map(str, places), **defaults | environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.log.read_text().splitlines()


@pytest.fixture
def stand_ins(tmp_path) -> StandIns:
    return StandIns(tmp_path)


def architectures(calls: list[str]) -> set[str]:
    return set(re.findall(r"arch=compute_\d+,code=(\w+)", "\n".join(calls)))


@needs_source
@pytest.mark.parametrize("asked", brief(["8.0;9.0+PTX", "8.0 9.0+PTX", "8.0; 9.0+PTX;"], ["8.0; 9.0+PTX;"]))
def test_architectures_are_those_that_torch_s_own_extensions_are_built_for(stand_ins, asked):
    assert architectures(stand_ins.build(TORCH_CUDA_ARCH_LIST=asked)) == {"sm_80", "sm_90", "compute_90"}


@needs_source
@pytest.mark.parametrize("environment", brief({"not set": {}, "empty": {"TORCH_CUDA_ARCH_LIST": ""}}, ["empty"]))
def test_architectures_are_those_of_the_default_that_nvcc_knows(stand_ins, environment):
    assert architectures(stand_ins.build(**environment)) == {"sm_80", "sm_90", "sm_120", "compute_120"}


@needs_source
def test_no_more_compilers_run_at_a_time_than_max_jobs(stand_ins):
    lines = stand_ins.build(MAX_JOBS="1")
    assert [line.split()[0] for line in lines] == ["start", "end"] * (len(lines) // 2)
    assert all("--threads 1 " in line for line in lines if ".cu " in line)


@needs_source
def test_a_launcher_before_the_compiler_is_not_nvcc_s_host_compiler(stand_ins):
    compiler = stand_ins.folder / "bin/g++"
    lines = stand_ins.build(CXX=f"{stand_ins.folder}/bin/ccache {compiler}")
    assert all(f"-ccbin {compiler} " in line for line in lines if ".cu " in line)


@compiles
@needs_source
@needs_nvcc
def test_no_kernel_spills(table, objects):
    found = table.kernels(objects)
    assert found
    assert [kernel for kernel in found if kernel.spill_bytes or kernel.stack_bytes] == []


@compiles
@needs_source
@needs_nvcc
def test_registers_are_those_of_the_table(table, objects):
    """Another nvcc allocates otherwise: a few registers more are none of our doing, a kernel that is missing is."""
    compiled, listed = table.kernels(objects), table.read()
    both = {kernel.architecture for kernel in compiled} & {kernel.architecture for kernel in listed}
    kernels = [kernel for kernel in compiled if kernel.architecture in both]
    found = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    assert len(found) == len(kernels), "two kernels of one name"
    expected = {(kernel.name, kernel.architecture): kernel for kernel in listed if kernel.architecture in both}
    assert found.keys() == expected.keys(), "run tools/cuda_table.py"
    grown = [name for name, kernel in found.items() if kernel.registers > expected[name].registers + 8]
    assert grown == [], "run tools/cuda_table.py if this is meant"
    assert all(kernel.shared_bytes <= expected[name].shared_bytes for name, kernel in found.items())


@compiles
@needs_source
@needs_nvcc
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_library_asks_for_stable_symbols_alone(library):
    listing = subprocess.run(["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[-1] for line in listing.splitlines()]
    versioned = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
    own = [symbol for symbol in symbols if not versioned.search(symbol)]
    # Templates of the standard library that some releases of torch export too have no version.
    shim = re.compile(r"(aoti_)?torch_\w+|__gmon_start__|_ITM_\w+|_ZNK?St\w+")
    assert "aoti_torch_get_current_cuda_stream" in own
    assert [symbol for symbol in own if not shim.fullmatch(symbol)] == []


@compiles
@needs_source
@needs_nvcc
@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) is not installed")
def test_library_brings_its_own_cuda_runtime(library):
    """So that torch's may be of another version; none of its symbols is to be seen from outside."""
    needed = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cuda.so" in needed
    assert "libcudart" not in needed
    defined = subprocess.run(["nm", "--dynamic", "--defined-only", library], capture_output=True, text=True, check=True).stdout
    assert re.findall(r" cuda\w+| __cuda\w+", defined) == []


@compiles
@needs_source
@needs_nvcc
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has a CUDA library of its own, and loads this one")
def test_library_loads_and_registers_beside_a_stand_in_for_torch_s_cuda_library(library, objects):
    program = (
        "from fastvae import _backend, _load, ops\n"
        f"_load.add_cuda({str(library)!r}); _backend.refresh()\n"
        "print(*(op for op in ops.OPERATORS if 'cuda' in _backend._served[op, 'cuda']))"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(objects)}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The entropies of binary codes are torch's products.
    assert result.stdout.split() == [op for op in OPERATORS if op not in ENTROPIES]


@compiles
@needs_source
@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, on which the kernels run")
def test_without_a_driver_the_library_says_that_no_kernel_runs(library, objects):
    program = f"from fastvae import _load; _load.CUDA_LIBRARY = {str(library)!r}; print(_load.cuda_refusal())"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(objects)}
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.match(r"its kernels, of nvcc .*, do not run on this GPU: (CUDA driver version|no CUDA-capable)", result.stdout), result.stderr


@needs_source
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FORCE_CUDA": "yes"}, "FORCE_CUDA: got 'yes', takes 0 or 1"),
        ({"FORCE_CUDA": "1", "CUDA_HOME": "/nonexistent"}, "FORCE_CUDA=1 but no nvcc was found"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS: got '0', takes a positive integer"),
        ({"MAX_JOBS": "all"}, "MAX_JOBS: got 'all', takes a positive integer"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_met_are_errors(environment, message):
    result = setup("build_ext", **environment)
    assert result.returncode != 0
    assert message in result.stderr


@needs_source
@needs_nvcc
@pytest.mark.parametrize("asked", brief(["9.0 1.5", "9.0a", "Hopper", "9.0,8.0", ";"], ["9.0,8.0"]))
def test_unknown_architectures_are_an_error(asked):
    result = setup("build_ext", FORCE_CUDA="1", TORCH_CUDA_ARCH_LIST=asked)
    assert result.returncode != 0
    assert f"TORCH_CUDA_ARCH_LIST: got {asked!r}, takes compute capabilities that nvcc knows" in result.stderr
