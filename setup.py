"""Builds fastvae._C with ninja: the kernels of csrc/cpu/simd/ once per instruction set, everything against torch's stable ABI.

FASTVAE_BUILD=auto (default) installs pure Python with a message where there is no C++ compiler, 0 does so silently, 1 makes a missing
compiler an error. A compile error is always an error.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the first stable ABI with all that is used
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    },
}
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-fopenmp-simd"]
# Never -ffinite-math-only: NaN must pass through. Reductions are reassociated by `omp simd` alone.
MATH_FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"]


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (ROOT / "fastvae/__init__.py").read_text())[1]


def compiler() -> str | None:
    """The C++ compiler: CXX, or the platform's."""
    chosen = os.environ.get("CXX")
    candidates = (chosen,) if chosen else ("c++", "g++", "clang++")
    return next((command for command in candidates if shutil.which(shlex.split(command)[0])), None)


def wants_extension() -> bool:
    mode = os.environ.get("FASTVAE_BUILD", "auto")
    if mode not in ("auto", "0", "1"):
        sys.exit(f"FASTVAE_BUILD: got {mode!r}, takes auto, 0 or 1")
    if mode == "0":
        return False
    if compiler() is not None:
        return True
    message = "no C++ compiler was found (CXX, c++, g++, clang++)"
    if mode == "1":
        sys.exit(f"FASTVAE_BUILD=1 but {message}")
    print(f"\n{'*' * 79}\nfastvae: {message}: installing WITHOUT the C++ kernels.\n{'*' * 79}\n", file=sys.stderr)
    return False


class NinjaBuild(build_ext):
    """Writes one build.ninja for the extension and runs it."""

    def build_extension(self, extension: Extension) -> None:
        directory = Path(self.build_temp).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        library = Path(self.get_ext_fullpath(extension.name)).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        write_ninja(directory / "build.ninja", library)
        subprocess.run(["ninja", "-C", str(directory), *verbosity()], check=True)


def verbosity() -> list[str]:
    return ["-v"] if os.environ.get("FASTVAE_VERBOSE") else []


def include_flags() -> list[str]:
    import pybind11
    from torch.utils.cpp_extension import include_paths

    paths = [*include_paths(), pybind11.get_include(), sysconfig.get_paths()["include"]]
    return [f"-isystem{path}" for path in paths]


def write_ninja(path: Path, library: Path) -> None:
    from ninja import ninja_syntax
    from torch.utils.cpp_extension import library_paths

    sets = INSTRUCTION_SETS.get(platform.machine(), {"baseline": []})
    flags = [*COMMON_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    described = shlex.quote(f'-DFASTVAE_FLAGS="{" ".join(COMMON_FLAGS + MATH_FLAGS)}"')
    link = [flag for directory in library_paths() for flag in (f"-L{directory}",)] + ["-ltorch_cpu", "-lc10"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    with path.open("w") as file:
        ninja = ninja_syntax.Writer(file, width=1000)
        ninja.rule("compile", f"{compiler()} -MMD -MF $out.d {' '.join(flags)} $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        ninja.rule("link", f"{compiler()} -shared $in -o $out {' '.join(link + undefined)}")
        objects = []

        def compile_source(source: Path, name: str, *flags: str) -> None:
            objects.append(f"{name}.o")
            ninja.build(objects[-1], "compile", str(source), variables={"flags": " ".join(flags)})

        compile_source(ROOT / "csrc/module.cpp", "module", *include_flags(), described, f'-DFASTVAE_TORCH_TARGET=\\"{TORCH_TARGET}\\"')
        for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            compile_source(source, source.stem, *include_flags())
        # The baseline comes first: of the standard library's inline functions the linker keeps the first copy, which every processor runs.
        for source in sorted((ROOT / "csrc/cpu/simd").glob("*.cpp")):
            for isa, isa_flags in sets.items():
                compile_source(source, f"{source.stem}.{isa}", *MATH_FLAGS, *isa_flags, f"-DFASTVAE_ISA={isa}")
        ninja.build(str(library), "link", objects)
        ninja.default(str(library))


setup(
    version=version(),
    packages=["fastvae", *(f"fastvae.{p.parent.name}" for p in sorted(ROOT.glob("fastvae/*/__init__.py"))), "fastvae.kernels"],
    package_dir={"fastvae.kernels": "kernels"},
    package_data={"fastvae": ["py.typed"]},
    ext_modules=[Extension("fastvae._C", sources=[])] if wants_extension() else [],
    cmdclass={"build_ext": NinjaBuild},
)
