"""Builds from source with another torch and runs the native tests there, then runs them again on the libraries that the pinned torch built:
``python tools/compat.py 2.10.0 --pinned .venv/bin/python``.

With ``--tests tenth`` it builds from source and runs the tenth of the tests that today's date chooses, and no more.

All is in ``.venv-compat-<torch>-py<version>/``: an environment of the Python that runs this with that torch, and in its ``source/`` a copy
of the checkout. What cannot be had, built or run is an error, and so is a compiler's warning.
"""

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ("setuptools>=77", "wheel", "pybind11", "ninja", "numpy")
OWN_PROCESSES = ("cuda", "emulation", "interpret", "offline")
NATIVE_TESTS = ("tests", *(f"--ignore=tests/{folder}" for folder in OWN_PROCESSES), "-q", "--numprocesses=auto", "--dist=loadfile")
# The tests that build, install, start or read the package: what they see of a library does not depend on the torch that built it.
OF_THE_PACKAGE = (
    *("benchmarks", "cuda_build", "demo", "dependencies", "documentation", "enums", "gpu_pass", "layers", "native_sources", "packaging"),
    *("public_names", "situations_broken_install", "situations_names"),
)
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")
# What another torch changes are its headers, so one architecture is enough, each on its day.
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
TODAY = datetime.date.today().toordinal()
ONE_ARCHITECTURE = {"TORCH_CUDA_ARCH_LIST": ARCHITECTURES[TODAY % len(ARCHITECTURES)]}
# The proofs of what nvcc makes, which find their objects built.
CUDA_TESTS = ("tests/test_cuda_build.py", "-q", "-m", "prove")


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    print("$", *command, flush=True)
    if subprocess.run([*map(str, command)], cwd=cwd, env=os.environ | environment).returncode:
        sys.exit(f"compat: failed: {' '.join(map(str, command))}")


def output_of(*command: str | Path, cwd: Path = ROOT) -> str:
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=True).stdout


def copy_checkout(target: Path) -> None:
    """All files that git does not ignore, with their times: of what an earlier run left in build/, what has changed is compiled again."""
    target.mkdir(parents=True, exist_ok=True)
    for path in target.iterdir():
        if path.name != "build":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in output_of("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def install(folder: Path, torch: str, source: Path) -> Path:
    """The Python of an environment that has this torch and what the tests need."""
    python = folder / "bin/python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={torch}\n")
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", constraints)
    # Together: some releases of torch refuse the newest setuptools.
    run(*pip, "torch", *BUILD_TOOLS)
    run(*pip, "--no-build-isolation", "--editable", f"{source}[dev]", FASTVAE_BUILD="0")
    return python


def build(python: Path, source: Path, *options: str, **environment: str) -> None:
    """Both libraries, the CUDA one where there is an nvcc."""
    command = [python, "setup.py", "build_ext", *options]
    print("$", *command, flush=True)
    whole = os.environ | {"FASTVAE_BUILD": "1", "FORCE_CUDA": str(int(has_nvcc()))} | environment
    result = subprocess.run([*map(str, command)], cwd=source, env=whole, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, flush=True)
    if result.returncode:
        sys.exit("compat: the build failed")
    if warned := re.findall(r"^.*\bwarning\b.*$", result.stdout, re.MULTILINE | re.IGNORECASE):
        sys.exit(f"compat: the build printed {len(warned)} warnings, the first: {warned[0]}")


def has_nvcc() -> bool:
    return bool(shutil.which("nvcc") or shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))


def take_libraries(pinned: Path, source: Path) -> None:
    """The libraries that the pinned torch builds, in place of those of this one."""
    build(pinned, ROOT, **ONE_ARCHITECTURE)
    newest = max(ROOT.glob("build/lib*/fastvae"), key=lambda folder: folder.stat().st_mtime)
    for library in newest.glob("*.so"):
        shutil.copy2(library, source / "fastvae")


def test(python: Path, source: Path, which: str, *options: str) -> None:
    """The native tests, all or the tenth that today's date chooses, on the libraries that are there."""
    tenth = [f"--tenth={TODAY % 10}"] if which == "tenth" else []
    run(python, "-m", "fastvae.info", cwd=source)
    # The packaging tests build the package anew, with a torch that has CUDA every kernel too.
    run(python, "-m", "pytest", *NATIVE_TESTS, *tenth, *options, cwd=source, **ONE_ARCHITECTURE)


def python_version(python: Path) -> str:
    return output_of(python, "-c", "import sys; print(sys.version_info[:2])")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", help="a version, for example 2.10.0")
    parser.add_argument("--pinned", type=Path, required=True, help="the Python of an environment with the pinned torch")
    parser.add_argument("--tests", choices=("all", "tenth"), default="all", help="all, or a tenth of those on the source build alone")
    return parser.parse_args()


def main() -> None:
    options = parse()
    folder = ROOT / f".venv-compat-{options.torch}-py{sys.version_info.major}.{sys.version_info.minor}"
    source = folder / "source"
    copy_checkout(source)
    python = install(folder, options.torch, source)
    build(python, source, "--inplace", **ONE_ARCHITECTURE)
    test(python, source, options.tests)
    if options.tests == "tenth":
        return
    if has_nvcc():
        run(python, "-m", "pytest", *CUDA_TESTS, cwd=source, **ONE_ARCHITECTURE)
    if python_version(python) != python_version(options.pinned):
        print(f"compat: {options.pinned} is of another Python, so its library is none for this one")
        return
    take_libraries(options.pinned, source)
    test(python, source, "all", *(f"--ignore=tests/test_{name}.py" for name in OF_THE_PACKAGE))


if __name__ == "__main__":
    main()
