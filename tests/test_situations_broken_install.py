"""What a broken installation does: the package imports, says once what is broken, serves calls with what works, and forces nothing else."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest
from _helpers import brief

from fastvae import _backend

ROOT = Path(__file__).resolve().parent.parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

# Imports the package, counts the warnings, calls an operator as a user does, then with the backend forced, and prints all as JSON.
PROGRAM = """
import json, sys, traceback, warnings
import torch
# An editable installation of the tests' own environment would stand in for what is missing in the copy.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in str(finder)]
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastvae
from fastvae import functional as FV, info
backend, device = {backend!r}, {device!r}
x = torch.full((3,), 2.0)
loss = FV.mse_loss(x, torch.zeros(3))
facts = info.collect()
try:
    with fastvae.use_backend(backend):
        forced = float(FV.mse_loss(x.to(device), torch.zeros(3, device=device)))
except fastvae.BackendError as error:
    forced = traceback.format_exc()
warned = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
support, report = facts["backends"][device][backend], info.report(facts)
print(json.dumps(dict(warned=warned, loss=float(loss), forced=forced, support=support, report=report)))
"""


@dataclass(frozen=True)
class Findings:
    warned: list[str]
    loss: float
    forced: float | str
    support: dict
    report: str


@dataclass(frozen=True)
class Install:
    """A copy of the package in which something is broken."""

    folder: Path

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVAE_", "TRITON_", "PYTHON"))}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=self.folder, env=inherited | environment, capture_output=True, text=True)

    def findings(self, backend: str, device: str = "cpu", before: str = "", **environment: str) -> Findings:
        result = self.run("-c", PROGRAM.format(backend=backend, device=device, before=before), **environment)
        assert result.returncode == 0, result.stderr
        return Findings(**json.loads(result.stdout))


@pytest.fixture
def install(tmp_path) -> Install:
    for package in ("fastvae", "kernels"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return Install(tmp_path)


def assert_says_so_and_serves_nothing(found: Findings, backend: str, message: str) -> None:
    assert found.loss == 4.0
    assert len(found.warned) == 1
    assert found.warned[0].startswith(f"fastvae: the backend {backend!r} serves no call: it is installed but does not load: ")
    assert message in found.warned[0]
    assert found.support["dtypes"] == []
    assert message in found.support["reason"]
    assert message in found.report
    # The error of the import is the cause of the one that a forced call raises.
    assert "BackendError: backend" in found.forced
    assert message in found.forced
    assert "was the direct cause of the following exception" in found.forced


def built_module() -> Path:
    """The C++ module that this process uses."""
    if "fastvae._C" not in sys.modules:
        pytest.skip("a pure-Python install: there is no C++ module to break")
    return Path(sys.modules["fastvae._C"].__file__)


@pytest.mark.parametrize("share", brief([0, 0.0001, 0.001, 0.3, 0.7, 0.99], ["0", "0.7"]))
def test_module_that_was_cut_short(install, share):
    whole = built_module().read_bytes()
    (install.folder / f"fastvae/_C{SUFFIX}").write_bytes(whole[: int(len(whole) * share)])
    assert_says_so_and_serves_nothing(install.findings("cpp"), "cpp", f"fastvae/_C{SUFFIX}")


def test_module_that_is_no_library(install):
    (install.folder / f"fastvae/_C{SUFFIX}").write_text("version https://git-lfs.github.com/spec/v1\n" * 100)
    assert_says_so_and_serves_nothing(install.findings("cpp"), "cpp", "invalid ELF header")


def test_module_for_another_python(install):
    name = "_C.cpython-27-x86_64-linux-gnu.so"
    (install.folder / "fastvae" / name).write_bytes(b"never opened")
    message = f"{name} was built for another Python than this one ({sys.implementation.cache_tag})"
    assert_says_so_and_serves_nothing(install.findings("cpp"), "cpp", message)


needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not installed, so no broken library can be made")


def compile_library(source: str, path: Path) -> None:
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(path)]
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_compiler
def test_module_that_asks_for_a_symbol_which_torch_or_libstdcxx_lacks(install):
    source = 'extern "C" void* aoti_torch_of_the_future(); extern "C" void* PyInit__C() { return aoti_torch_of_the_future(); }'
    compile_library(source, install.folder / f"fastvae/_C{SUFFIX}")
    assert_says_so_and_serves_nothing(install.findings("cpp"), "cpp", "undefined symbol: aoti_torch_of_the_future")


@needs_compiler
def test_module_that_asks_for_a_library_which_is_not_there(install):
    gone = install.folder / "libgone.so.6"
    compile_library("int gone() { return 0; }", gone)
    command = ["c++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", str(gone), "-o", str(install.folder / f"fastvae/_C{SUFFIX}")]
    source = 'int gone(); extern "C" void* PyInit__C() { gone(); return 0; }'
    assert subprocess.run(command, input=source, text=True).returncode == 0
    gone.unlink()
    assert_says_so_and_serves_nothing(install.findings("cpp"), "cpp", "libgone.so.6: cannot open shared object file")


@needs_compiler
def test_module_whose_start_fails(install):
    """As one that pybind11 finds to be of another version of Python."""
    compile_library('extern "C" void* PyInit__C() { return 0; }', install.folder / f"fastvae/_C{SUFFIX}")
    assert_says_so_and_serves_nothing(install.findings("cpp"), "cpp", "SystemError")


FAILS_AFTER_ITS_LIBRARY_IS_LOADED = """
import importlib
real = importlib.import_module
def import_module(name):
    module = real(name)
    if name == "fastvae._C":
        del sys.modules[name]
        raise ImportError("the start failed")
    return module
importlib.import_module = import_module
"""


def test_module_that_registered_its_operators_before_it_failed_serves_none_of_them(install):
    shutil.copy(built_module(), install.folder / "fastvae")
    found = install.findings("cpp", before=FAILS_AFTER_ITS_LIBRARY_IS_LOADED)
    assert_says_so_and_serves_nothing(found, "cpp", "ImportError: the start failed")


TRITONS = {
    "a library of it does not load": ("raise ImportError('libtriton.so: undefined symbol: LLVM')", "undefined symbol: LLVM"),
    "something that it needs is missing": ("import setuptools_of_the_past", "No module named 'setuptools_of_the_past'"),
    "a driver is broken": ("raise RuntimeError('0 active drivers')", "RuntimeError: 0 active drivers"),
    "it is of another version": ("__version__ = '1.0'", "triton"),
}


@pytest.mark.parametrize("fault", brief(TRITONS.keys(), ["a library of it does not load"]))
def test_triton_that_does_not_import(install, fault):
    source, message = TRITONS[fault]
    (install.folder / "triton").mkdir()
    (install.folder / "triton/__init__.py").write_text(source)
    assert_says_so_and_serves_nothing(install.findings("triton", TRITON_INTERPRET="1"), "triton", message)


def test_missing_triton_is_no_fault(install):
    found = install.findings("triton", before="sys.modules['triton'] = None", TRITON_INTERPRET="1")
    assert found.warned == []
    assert found.support == {"dtypes": [], "reason": "Triton is not installed (pip install triton)"}


TORCH_WITH_CUDA = "torch.version.cuda = '13.0'"


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "file too short"), (b"version https://git-lfs" * 200, "invalid ELF header")], ids=["empty", "no library"]
)
def test_cuda_library_that_is_broken(install, content, message):
    (install.folder / "fastvae/_cuda.so").write_bytes(content)
    found = install.findings("cuda", before=TORCH_WITH_CUDA)
    assert_says_so_and_serves_nothing(found, "cuda", message)


def test_cuda_library_that_was_cut_short(install):
    whole = built_module().read_bytes()  # any library will do: it is not loaded
    (install.folder / "fastvae/_cuda.so").write_bytes(whole[: len(whole) // 2])
    found = install.findings("cuda", before=TORCH_WITH_CUDA)
    assert_says_so_and_serves_nothing(found, "cuda", f"is cut short: it has {len(whole) // 2} bytes of {len(whole)}")


@needs_compiler
def test_cuda_library_of_another_torch(install):
    source = 'extern "C" void aoti_torch_gone(); __attribute__((constructor)) void start() { aoti_torch_gone(); }'
    compile_library(source, install.folder / "fastvae/_cuda.so")
    found = install.findings("cuda", before=TORCH_WITH_CUDA)
    assert_says_so_and_serves_nothing(found, "cuda", "undefined symbol: aoti_torch_gone")


def test_command_that_reports_what_is_installed_explains_a_broken_module(install):
    (install.folder / f"fastvae/_C{SUFFIX}").write_bytes(b"")
    result = install.run("-m", "fastvae.info")
    assert result.returncode == 0, result.stderr
    assert "not loaded            it is installed but does not load: ImportError" in result.stdout
    assert result.stderr.count("file too short") == 1


def test_backend_that_the_environment_forces_raises_the_error_of_the_import(install):
    (install.folder / f"fastvae/_C{SUFFIX}").write_bytes(b"")
    program = "import torch; from fastvae import functional as FV; FV.mse_loss(torch.ones(3), torch.zeros(3))"
    result = install.run("-W", "ignore", "-c", program, FASTVAE_BACKEND="cpp")
    assert result.returncode == 1
    assert result.stderr.count("file too short") == 2
    assert "fastvae._backend.BackendError: backend 'cpp' cannot serve reconstruction_forward on cpu" in result.stderr


def test_nothing_that_is_installed_here_is_broken():
    assert [backend.error for backend in _backend.BACKENDS.values()] == [None] * len(_backend.BACKENDS)
