"""What is installed: the shared library's symbols and instructions, wheels, a bare checkout, and builds that must fail or say so."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import fastvae

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = ("csrc", "fastvae", "kernels", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
NO_COMPILER = {"CXX": "/nonexistent/c++"}

needs_source = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="the tests are not in a checkout")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def run(*arguments, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """In an environment without this process's FASTVAE_ and compiler settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVAE_", "CXX", "PYTHONPATH"))}
    return subprocess.run([*map(str, arguments)], cwd=cwd, env=inherited | environment, capture_output=True, text=True)


def python(program: str, cwd: Path, **environment: str) -> str:
    result = run(sys.executable, "-c", program, cwd=cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def build_wheel(source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    # Verbose: pip shows what the build says only then.
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", out)
    return run(*pip, source, cwd=out, **environment)


def install(wheel: Path, target: Path) -> Path:
    result = run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", target, wheel, cwd=target.parent)
    assert result.returncode == 0, result.stderr
    return target


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the sources without anything built."""
    return copy_source(tmp_path / "source")


def copy_source(target: Path) -> Path:
    target.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pure")
    result = build_wheel(copy_source(directory / "source"), directory, FASTVAE_BUILD="0")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WITHOUT" not in result.stdout + result.stderr
    return next(directory.glob("*.whl"))


@pytest.fixture(scope="module")
def library() -> Path:
    """The shared library that this process uses."""
    if fastvae._backend.BACKENDS["cpp"].missing:
        assert shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0]) is None, "there is a compiler, but the C++ module is not built"
        pytest.skip("a pure-Python install: there is no C++ compiler")
    return Path(sys.modules["fastvae._C"].__file__)


def libraries_of_the_package(library: Path) -> list[Path]:
    return sorted(library.parent.glob("*.so"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is not installed")
def test_libraries_import_only_torch_s_stable_symbols(library):
    unstable = re.compile(r"\b(at|c10|c10d|caffe2|torch)::")
    for path in libraries_of_the_package(library):
        listing = run("nm", "--dynamic", "--undefined-only", "--demangle", path, cwd=ROOT)
        assert "aoti_torch_" in listing.stdout, listing.stderr
        assert [line for line in listing.stdout.splitlines() if unstable.search(line)] == []


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump (binutils) is not installed")
def test_avx_instructions_lie_only_in_the_functions_compiled_for_them(library):
    """A function outside them runs on every processor: also one that the linker shares among them, or an initialiser."""
    if "avx2" not in sys.modules["fastvae._C"].instruction_sets():
        pytest.skip("this processor has no AVX2, or is none of x86-64's")
    listing = run("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", library, cwd=ROOT).stdout
    with_avx = set()
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = header[1]
        elif re.search(r"\tv[a-z]", line):
            with_avx.add(function)
    guarded = {function for function in with_avx if re.search(r"\bavx(2|512|512_vnni)::", function)}
    assert guarded, "no AVX code was found, so this test sees nothing"
    assert with_avx - guarded == set()


@needs_source
def test_x86_intrinsics_are_guarded():
    """Each include of an intrinsics header stands inside an #if that asks for the instruction set."""
    found = []
    for path in sorted((ROOT / "csrc").rglob("*")):
        conditions = []
        for line in path.read_text().splitlines() if path.is_file() else ():
            directive = line.replace(" ", "")
            if directive.startswith("#if"):
                conditions.append(directive)
            elif directive.startswith("#endif"):
                conditions.pop()
            elif re.match(r"#include<\w*intrin\.h>", directive):
                found.append((path.name, any(re.search(r"__AVX|__x86_64__|__SSE", condition) for condition in conditions)))
    assert [name for name, guarded in found if not guarded] == []


@needs_source
@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="aarch64-linux-gnu-g++ is not installed")
@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cpu/simd").glob("*.cpp")), ids=lambda path: path.stem)
def test_kernels_compile_for_aarch64(path, tmp_path):
    flags = ("-std=c++17", "-O1", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror", "-DFASTVAE_ISA=baseline")
    result = run("aarch64-linux-gnu-g++", *flags, "-c", path, "-o", tmp_path / "kernel.o", cwd=ROOT)
    assert result.returncode == 0, result.stderr


@needs_source
def test_wheel_holds_every_module_and_the_kernels(pure_wheel):
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "fastvae").rglob("*.py")}
    expected |= {f"fastvae/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert expected | {"fastvae/py.typed"} <= contents(pure_wheel)
    assert all(name.startswith(("fastvae/", "fastvae_kernels-")) for name in contents(pure_wheel))


@needs_source
def test_wheel_metadata(pure_wheel):
    with zipfile.ZipFile(pure_wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    assert "\nName: fastvae-kernels\n" in metadata
    assert f"\nVersion: {fastvae.__version__}\n" in metadata
    assert "\nRequires-Dist: torch>=2.10\n" in metadata
    assert "\nLicense-File: LICENSE\n" in metadata
    extras = re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)
    assert {"train", "bench", "dev"} <= set(extras)


@needs_source
def test_pure_wheel_works_outside_the_checkout(pure_wheel, tmp_path):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    target = install(pure_wheel, tmp_path / "site")
    program = "import fastvae, torch; fastvae.functional.mse_loss(torch.ones(3), torch.zeros(3)); print(fastvae.__file__)"
    assert Path(python(program, tmp_path, PYTHONPATH=str(target))).parent == target / "fastvae"


@needs_source
@needs_triton
def test_installed_kernels_are_part_of_the_package(pure_wheel, tmp_path):
    target = install(pure_wheel, tmp_path / "site")
    program = "import fastvae.kernels; print(fastvae.kernels.__file__)"
    assert Path(python(program, tmp_path, PYTHONPATH=str(target))).parent == target / "fastvae/kernels"


@needs_source
@needs_triton
def test_bare_checkout_works(source):
    program = "import fastvae, fastvae.kernels; print(fastvae.__file__, fastvae.kernels.__file__)"
    package, kernels = (Path(path).parent for path in python(program, source).split())
    assert (package, kernels) == (source / "fastvae", source / "kernels")


def assert_names_no_folder(wheel: Path, *folders: Path) -> None:
    """No file of a wheel, shared libraries among them, names the folders in which it was built."""
    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert contents
    assert [name for name, content in contents.items() for folder in folders if str(folder).encode() in content] == []


@needs_source
def test_pure_wheel_names_no_folder_of_its_build(pure_wheel):
    assert_names_no_folder(pure_wheel, pure_wheel.parent, ROOT, Path(sys.prefix))


@pytest.mark.prove
@needs_source
def test_wheel_with_the_library(library, source, tmp_path):
    """Unoptimised, which compiles quickly: this is about where the library goes, that it loads there, and what it tells of the build."""
    result = build_wheel(source, tmp_path, FASTVAE_BUILD="1", CXXFLAGS="-O0")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"fastvae/{library.name}" in contents(wheel)
    assert not wheel.name.endswith("-any.whl")
    assert_names_no_folder(wheel, tmp_path, ROOT, Path(sys.prefix), Path(sys.base_prefix))
    target = install(wheel, tmp_path / "site")
    program = (
        "import torch, fastvae; from fastvae import _C\n"
        "with fastvae.use_backend('cpp'): fastvae.functional.mse_loss(torch.ones(3), torch.zeros(3))\n"
        "print(_C.__file__)"
    )
    assert Path(python(program, tmp_path, PYTHONPATH=str(target))) == target / "fastvae" / library.name


@needs_source
def test_source_distribution_holds_all_that_a_build_reads(source):
    result = run(sys.executable, "setup.py", "-q", "sdist", cwd=source, FASTVAE_BUILD="0")
    assert result.returncode == 0, result.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    folders = ("csrc", "fastvae", "kernels")
    expected = {
        str(p.relative_to(source)) for folder in folders for p in (source / folder).rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".py")
    }
    assert expected | {"setup.py", "pyproject.toml", "LICENSE"} <= held


@needs_source
def test_source_distribution_builds_the_wheel_that_the_checkout_builds(pure_wheel, source, tmp_path):
    """From the archive alone, in another folder."""
    result = run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", tmp_path, cwd=source, FASTVAE_BUILD="0")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.rmtree(source)
    result = build_wheel(archive, tmp_path, FASTVAE_BUILD="0")
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == pure_wheel.name
    assert contents(wheel) == contents(pure_wheel)


def environment(folder: Path) -> Path:
    """The Python of a virtual environment without packages of its own, which sees torch and numpy and not this checkout."""
    result = run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    # The environment's own setuptools, which some Pythons bring, would come before the one that this environment has.
    result = run(folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "uninstall", "--yes", "setuptools", cwd=folder)
    assert result.returncode == 0, result.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # Python processes the .pth files of a folder on PYTHONPATH, and so an editable installation, nowhere but in its own site-packages.
    (site / "torch_and_numpy.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")
    return folder / "bin/python"


USE = """
import fastvae, torch
with fastvae.use_backend(BACKEND): loss = fastvae.functional.mse_loss(torch.ones(3), torch.zeros(3))
assert float(loss) == 1.0
print(fastvae.__file__)
"""


def check_install(source: Path, folder: Path, backend: str, *options: str, **variables: str) -> Path:
    """Installs with pip, uses the package in another folder, uninstalls, and finds nothing left. Returns where the package was."""
    interpreter = environment(folder / "environment")
    pip = (interpreter, "-m", "pip", "--disable-pip-version-check")
    result = run(*pip, "install", "--no-index", "--no-build-isolation", "--no-deps", *options, cwd=source.parent, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    used = run(interpreter, "-c", USE.replace("BACKEND", repr(backend)), cwd=folder)
    assert used.returncode == 0, used.stderr
    reported = run(interpreter, "-m", "fastvae.info", cwd=folder)
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.startswith(f"versions\n  fastvae               {fastvae.__version__}\n")
    result = run(*pip, "uninstall", "--yes", "fastvae-kernels", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert run(interpreter, "-c", "import fastvae", cwd=folder).returncode != 0
    return Path(used.stdout.strip()).parent


@needs_source
@pytest.mark.prove
def test_a_pure_wheel_is_installed_used_and_removed(pure_wheel, tmp_path):
    package = check_install(pure_wheel, tmp_path, "fallback", pure_wheel)
    assert package.is_relative_to(tmp_path / "environment")


@needs_source
@pytest.mark.prove
@pytest.mark.parametrize("kind", ["checkout", "editable"])
def test_a_checkout_is_built_installed_used_and_removed(library, source, tmp_path, kind):
    """With its C++ kernels, unoptimised."""
    options = (source,) if kind == "checkout" else ("--editable", source)
    package = check_install(source, tmp_path, "cpp", *options, FASTVAE_BUILD="1", FORCE_CUDA="0", CXXFLAGS="-O0")
    assert package.is_relative_to(source if kind == "editable" else tmp_path / "environment")


@needs_source
def test_without_a_compiler_the_install_is_pure_python_and_says_so(source, tmp_path):
    result = build_wheel(source, tmp_path, **NO_COMPILER)
    assert result.returncode == 0, result.stderr
    assert "WITHOUT the C++ kernels" in result.stdout + result.stderr
    assert [path.name.endswith("-py3-none-any.whl") for path in tmp_path.glob("*.whl")] == [True]


@needs_source
def test_required_build_without_a_compiler_is_an_error(source):
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, FASTVAE_BUILD="1", **NO_COMPILER)
    assert result.returncode != 0
    assert "no C++ compiler was found" in result.stderr


@needs_source
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_compile_error_is_an_error(library, source, mode):
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, FASTVAE_BUILD=mode, CXXFLAGS="--no-such-flag")
    assert result.returncode != 0
    assert "--no-such-flag" in result.stdout + result.stderr


@needs_source
def test_unknown_build_mode_is_an_error(source):
    result = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=source, FASTVAE_BUILD="maybe")
    assert result.returncode != 0
    assert "FASTVAE_BUILD: got 'maybe', takes auto, 0 or 1" in result.stderr


def test_import_loads_nothing_that_a_user_may_not_have():
    optional = {"jsonargparse", "matplotlib", "mlxtend", "scipy", "sklearn", "tqdm"}
    if not (torch.version.cuda or torch.version.hip):
        optional.add("triton")
    program = f"import sys, torch; before = set(sys.modules); import fastvae; print(*({optional} & (set(sys.modules) - before)))"
    assert python(program, ROOT) == ""


def test_import_creates_no_cuda_context():
    assert python("import fastvae, torch; print(torch.cuda.is_initialized())", ROOT) == "False"
