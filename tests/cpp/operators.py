"""Builds the package with a compiler and a sanitizer beside the checkout, and runs the operators' tests on it:
``python tests/cpp/operators.py clang++``, ``python tests/cpp/operators.py g++ --sanitize address``.

Not for threads: a sanitizer of those does not know how OpenMP, with which torch shares the work, makes threads wait for each other.
"""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from build import ROOT, SANITIZERS, check_compiler

TESTS = (
    "codebook",
    "group_norm",
    "jacobian",
    "latent",
    "logistic_mixture",
    "philox",
    "reconstruction",
    "residual_quantize",
    "rms_norm",
    "snake",
)
PARALLEL = ["--numprocesses=auto", "--dist=loadfile"]
# A report ends the process, so that what pytest or its workers had captured would be lost.
SHOWN = ["-s", "-p", "no:faulthandler"]
# Python is not linked with a sanitizer's library, which has to be there before all others; with GCC's, an exception of C++ is lost where
# the standard library comes later.
PRELOADED = {"address": ("libasan.so", "libstdc++.so.6"), "undefined": ("libubsan.so",)}
# Python keeps memory to its end; a stack of torch's is long.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def build(compiler: str, sanitize: str) -> Path:
    """Gives the folder with the package."""
    directory = ROOT / "build" / "operators" / f"{Path(shlex.split(compiler)[-1]).name}-{sanitize}"
    directory.mkdir(parents=True, exist_ok=True)
    check_compiler(compiler, sanitize, directory)
    options = [f"--build-lib={directory / 'lib'}", f"--build-temp={directory / 'temp'}"]
    command = [sys.executable, "setup.py", "-q", "build", *options]
    environment = {"CXX": compiler, "CXXFLAGS": " ".join(SANITIZERS[sanitize]), "FASTVAE_BUILD": "1"}
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | environment)
    return directory / "lib"


def preload(compiler: str, sanitize: str) -> dict[str, str]:
    def path(library: str) -> str:
        command = [*shlex.split(compiler), f"-print-file-name={library}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {"LD_PRELOAD": " ".join(map(path, PRELOADED[sanitize])), **OPTIONS} if sanitize in PRELOADED else {}


def run(package: Path, compiler: str, sanitize: str, arguments: list[str]) -> None:
    tests = [str(ROOT / "tests" / f"test_{name}.py") for name in TESTS]
    # A compiler that torch starts would be sanitized too.
    selection = ["-k", "not compiles", *SHOWN] if sanitize != "none" else PARALLEL
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={package}"]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    subprocess.run([*command, *selection, *tests, *arguments], cwd=package, check=True, env=environment | preload(compiler, sanitize))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("compiler", help="for example g++ or clang++; with a sanitizer g++")
    parser.add_argument("--sanitize", nargs="+", choices=("none", *PRELOADED), default=["none"])
    arguments, others = parser.parse_known_args()
    try:
        for sanitize in arguments.sanitize:
            run(build(arguments.compiler, sanitize), arguments.compiler, sanitize, others)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
