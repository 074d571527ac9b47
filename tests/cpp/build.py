"""Builds the C++ tests with a compiler and a sanitizer, and runs them: ``python tests/cpp/build.py g++ clang++ --sanitize address``.

The kernels are compiled with the flags of setup.py, for each instruction set, without torch and Python. A report of a sanitizer ends the
program; without one, a warning is an error.
"""

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

from ninja import ninja_syntax

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# A sanitizer's checks keep loops from being vectorised and values from being followed, of which compilers then warn in vain. With the
# release's -O3 clang takes a minute for each of two dozen files, with -O1 some seconds.
WATCHED = ["-O1", "-g1", "-w"]
SANITIZERS = {
    "none": ["-Werror"],
    "address": ["-fsanitize=address", "-fno-omit-frame-pointer", *WATCHED],
    # Neither compiler counts these conversions among what is undefined.
    "undefined": ["-fsanitize=undefined,float-cast-overflow", "-fno-sanitize-recover=all", *WATCHED],
    "thread": ["-fsanitize=thread", *WATCHED],
}
# What Debian and Ubuntu call the packages; others bring all of it with the compiler.
PACKAGES = {
    "g++": "g++ (with libasan, libubsan and libtsan)",
    "clang++": "clang and libclang-rt-<version>-dev",
}


def tables():
    """setup.py as a module, for its flags and instruction sets; nothing is set up."""
    spec = importlib.util.spec_from_file_location("fastvae_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"), mock.patch.dict(os.environ, FASTVAE_BUILD="0"):
        spec.loader.exec_module(module)
    return module


def check_compiler(compiler: str, sanitize: str, directory: Path) -> None:
    """Ends with a message that names what is missing where the compiler cannot make a program with the sanitizer."""
    name = "clang++" if "clang" in compiler else "g++"
    if shutil.which(shlex.split(compiler)[0]) is None:
        sys.exit(f"{compiler} was not found: install {PACKAGES[name]}")
    command = [*shlex.split(compiler), *SANITIZERS[sanitize], "-x", "c++", "-", "-o", str(directory / "probe")]
    result = subprocess.run(command, input="int main() {}", capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{compiler} cannot link with {SANITIZERS[sanitize]}: install {PACKAGES[name]}\n{result.stderr}")


def write_rules(setup, compiler: str, sanitize: str, directory: Path) -> None:
    base = [*setup.COMMON_FLAGS, *SANITIZERS[sanitize], *shlex.split(os.environ.get("CXXFLAGS", ""))]
    sets = setup.INSTRUCTION_SETS.get(platform.machine(), {"baseline": []})
    with (directory / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=1000)
        ninja.rule("compile", f"{compiler} -MMD -MF $out.d {' '.join(base)} $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{compiler} {' '.join(SANITIZERS[sanitize])} $in -pthread -o $out")
        objects = []

        def compile_source(source: Path, name: str, *flags: str) -> None:
            objects.append(f"{name}.o")
            ninja.build(objects[-1], "compile", str(source), variables={"flags": " ".join(flags)})

        for source in (ROOT / "csrc/cpu/isa.cpp", *sorted(HERE.glob("*.cpp"))):
            compile_source(source, source.stem)
        for source in sorted((ROOT / "csrc/cpu/simd").glob("*.cpp")):
            family_flags = setup.accepted(setup.FAMILY_FLAGS.get(source.stem, []))
            for isa, isa_flags in sets.items():
                if source.stem in setup.ONLY_FOR.get(isa, (source.stem,)):
                    compile_source(source, f"{source.stem}.{isa}", *setup.MATH_FLAGS, *family_flags, *isa_flags, f"-DFASTVAE_ISA={isa}")
        ninja.build("tests", "link", objects)
        ninja.default("tests")


def run(compiler: str, sanitize: str) -> None:
    directory = ROOT / "build" / "cpp-tests" / f"{Path(shlex.split(compiler)[-1]).name}-{sanitize}"
    directory.mkdir(parents=True, exist_ok=True)
    check_compiler(compiler, sanitize, directory)
    with mock.patch.dict(os.environ, CXX=compiler):
        write_rules(tables(), compiler, sanitize, directory)
    subprocess.run(["ninja", "--quiet", "-C", str(directory)], check=True)
    print(f"{compiler}, sanitizer: {sanitize}", flush=True)
    options = {"UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "halt_on_error=1"}
    subprocess.run([str(directory / "tests")], check=True, env=os.environ | options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("compilers", nargs="+", help="for example g++ or clang++")
    parser.add_argument("--sanitize", nargs="+", choices=SANITIZERS, default=["none"])
    arguments = parser.parse_args()
    try:
        for compiler in arguments.compilers:
            for sanitize in arguments.sanitize:
                run(compiler, sanitize)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
