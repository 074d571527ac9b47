"""Builds fastvae._C with ninja, the kernels of csrc/cpu/simd/ once per instruction set, and fastvae/_cuda.so from csrc/cuda/, everything
against torch's stable ABI.

FASTVAE_BUILD=auto (default) installs pure Python with a message where there is no C++ compiler, 0 does so silently, 1 makes a missing
compiler an error. A compile error is always an error.

The CUDA kernels are built where torch has CUDA and nvcc is found (in CUDA_HOME, on the PATH, or in /usr/local/cuda). FORCE_CUDA=1 builds
them against any torch, without a GPU, and makes a missing nvcc an error. TORCH_CUDA_ARCH_LIST names the compute capabilities and MAX_JOBS
bounds the compilers that run at a time, as both do for torch's own extensions.
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
# setuptools loads an entry point of the package `kernels` where that is installed, which the folder of that name here is not.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
TORCH_TARGET = "0x020a000000000000"  # torch 2.10, the first stable ABI with all that is used
LAUNCHERS = ("ccache", "sccache", "distcc")
INSTRUCTION_SETS = {
    "x86_64": {
        "baseline": [],
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        "avx512_vnni": ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"],
    },
}
ONLY_FOR = {"avx512_vnni": ("codebook",)}  # families to compile; all where a set is not named
FAMILY_FLAGS = {
    # clang warns of a loop that asks for vectors and gets none. Of these families loops over float64, and no others, call functions of the
    # C library (log1p, expm1, erfc, sinh, sin), of which there is no vector form; elsewhere such a loop is a fault.
    "jacobian": ["-Wno-pass-failed"],
    "logistic_mixture": ["-Wno-pass-failed"],
    "reconstruction": ["-Wno-pass-failed"],
    "snake": ["-Wno-pass-failed"],
}
if platform.machine() == "x86_64":
    # GCC does not interleave independent chains of operations by itself, and these are longer than the processor looks ahead.
    FAMILY_FLAGS["group_norm"] = ["-fschedule-insns", "-fsched-pressure"]
CUDA_ARCHS = ("8.0", "9.0", "10.0", "12.0+PTX")
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xfatbin=-compress-all", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
# Ninja shows this line for each file, and the command where it fails.
COMPILES = {"description": "compile $out", "depfile": "$out.d", "deps": "gcc"}
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


def host_compiler() -> str:
    """The program of the compiler's command, for nvcc, which takes no launcher before it ("ccache g++") and no flags."""
    first, *rest = shlex.split(compiler())
    return rest[0] if Path(first).name in LAUNCHERS and rest else first


def accepted(flags: list[str]) -> list[str]:
    """Those of the flags that the compiler knows."""
    check = [*shlex.split(compiler()), "-Werror", "-fsyntax-only", "-x", "c++", os.devnull]
    return [flag for flag in flags if subprocess.run([*check, flag], capture_output=True).returncode == 0]


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


def nvcc() -> str | None:
    """The CUDA compiler: that of CUDA_HOME, of the PATH, or of the usual folder."""
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=f"{os.environ['CUDA_HOME']}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def wants_cuda() -> bool:
    force = os.environ.get("FORCE_CUDA", "0")
    if force not in ("0", "1"):
        sys.exit(f"FORCE_CUDA: got {force!r}, takes 0 or 1")
    if os.environ.get("FASTVAE_BUILD") == "0" or compiler() is None:
        return False
    if force == "1":
        return nvcc() is not None or sys.exit("FORCE_CUDA=1 but no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda)")
    import torch

    if torch.version.cuda and nvcc() is None:
        print("fastvae: no nvcc was found (CUDA_HOME, PATH, /usr/local/cuda): installing without the CUDA C++ kernels", file=sys.stderr)
    return bool(torch.version.cuda) and nvcc() is not None


def cuda_archs() -> list[str]:
    """The compute capabilities to build for: TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX", or those of the default that nvcc knows."""
    listing = subprocess.run([nvcc(), "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = set(re.findall(r"compute_(\d+)", listing))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        archs = [arch for arch in CUDA_ARCHS if _number(arch) in known]
        return [*archs[:-1], f"{archs[-1].removesuffix('+PTX')}+PTX"]
    archs = asked.replace(";", " ").split()
    wrong = [arch for arch in archs if not re.fullmatch(r"\d+\.\d(\+PTX)?", arch) or _number(arch) not in known]
    if wrong or not archs:
        takes = "compute capabilities that nvcc knows, for example 9.0 or 9.0+PTX, with spaces or semicolons between them"
        sys.exit(f"TORCH_CUDA_ARCH_LIST: got {asked!r}, takes {takes}")
    return archs


def _number(arch: str) -> str:
    return arch.removesuffix("+PTX").replace(".", "")


def cuda_arch_flags(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{_number(arch)},code=sm_{_number(arch)}" for arch in archs]
    return flags + [f"-gencode=arch=compute_{_number(arch)},code=compute_{_number(arch)}" for arch in archs if arch.endswith("+PTX")]


class NinjaBuild(build_ext):
    """Writes one build.ninja for all extensions and runs it."""

    def get_ext_filename(self, name: str) -> str:
        # No Python module: torch loads it.
        *package, leaf = name.split(".")
        return os.path.join(*package, "_cuda.so") if leaf == "_cuda" else super().get_ext_filename(name)

    def build_extensions(self) -> None:
        from ninja import ninja_syntax

        directory = Path(self.build_temp).resolve()
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / "build.ninja").open("w") as file:
            ninja = ninja_syntax.Writer(file, width=1000)
            for extension in self.extensions:
                library = Path(self.get_ext_fullpath(extension.name)).resolve()
                library.parent.mkdir(parents=True, exist_ok=True)
                WRITERS[extension.name](ninja, library)
                ninja.default(str(library))
        jobs = max_jobs()
        options = [*(["-j", str(jobs)] if jobs else []), *(["-v"] if os.environ.get("FASTVAE_VERBOSE") else [])]
        # As a module: an environment's programs are not on the PATH of one who calls its Python without activating it.
        subprocess.run([sys.executable, "-m", "ninja", "-C", str(directory), *options], check=True)


def max_jobs() -> int | None:
    """How many compilers may run at a time; where MAX_JOBS is not set, ninja decides."""
    asked = os.environ.get("MAX_JOBS")
    if not asked:
        return None
    if not re.fullmatch(r"[1-9]\d*", asked):
        sys.exit(f"MAX_JOBS: got {asked!r}, takes a positive integer")
    return int(asked)


def torch_include_flags() -> list[str]:
    from torch.utils.cpp_extension import include_paths

    return [f"-isystem {path}" for path in include_paths()]


def module_include_flags() -> list[str]:
    """For module.cpp alone, which includes nothing of torch: torch's headers bring a pybind11 of another version."""
    import pybind11

    folders = {pybind11.get_include(): "pybind11/", sysconfig.get_paths()["include"]: "python/"}
    return [flag for folder, name in folders.items() for flag in (f"-isystem {folder}", f"-ffile-prefix-map={folder}/={name}")]


def write_cpp(ninja, library: Path) -> None:
    """The rules of the C++ module."""
    from torch.utils.cpp_extension import library_paths

    sets = INSTRUCTION_SETS.get(platform.machine(), {"baseline": []})
    # Errors name the file that raises them, which in a wheel is not to be a folder of the machine that built it.
    torch_folder = Path(library_paths()[0]).parent
    folders = {ROOT: "", torch_folder: "torch/", torch_folder.resolve(): "torch/"}
    prefixes = [f"-ffile-prefix-map={folder}/={name}" for folder, name in folders.items()]
    flags = [*COMMON_FLAGS, *prefixes, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    described = shlex.quote(f'-DFASTVAE_FLAGS="{" ".join(COMMON_FLAGS + MATH_FLAGS)}"')
    link = [flag for directory in library_paths() for flag in (f"-L{directory}",)] + ["-ltorch_cpu", "-lc10"]
    undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    ninja.rule("compile", f"{compiler()} -MMD -MF $out.d {' '.join(flags)} $flags -c $in -o $out", **COMPILES)
    ninja.rule("link", f"{compiler()} -shared $in -o $out {' '.join(link + undefined)}", description="link $out")
    objects = []

    def compile_source(source: Path, name: str, *flags: str) -> None:
        objects.append(f"{name}.o")
        ninja.build(objects[-1], "compile", str(source), variables={"flags": " ".join(flags)})

    compile_source(ROOT / "csrc/module.cpp", "module", *module_include_flags(), described, f'-DFASTVAE_TORCH_TARGET=\\"{TORCH_TARGET}\\"')
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        compile_source(source, source.stem, *torch_include_flags())
    # The baseline comes first: of the standard library's inline functions the linker keeps the first copy, which every processor runs.
    for source in sorted((ROOT / "csrc/cpu/simd").glob("*.cpp")):
        family_flags = accepted(FAMILY_FLAGS.get(source.stem, []))
        for isa, isa_flags in sets.items():
            if source.stem not in ONLY_FOR.get(isa, (source.stem,)):
                continue
            compile_source(source, f"{source.stem}.{isa}", *MATH_FLAGS, *family_flags, *isa_flags, f"-DFASTVAE_ISA={isa}")
    ninja.build(str(library), "link", objects)


def write_cuda(ninja, library: Path) -> None:
    """The rules of the CUDA library. It brings its own CUDA runtime, so that torch may have another one."""
    from torch.utils.cpp_extension import library_paths

    archs = cuda_archs()
    version = re.search(r"V([\d.]+)", subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout)[1]
    described = shlex.quote(f'-DFASTVAE_CUDA_BUILD="nvcc {version}, compute capabilities {" ".join(archs)}"')
    host = ["-ccbin", host_compiler()] if "CXX" in os.environ else []
    flags = [*CUDA_FLAGS, *host, *cuda_arch_flags(archs), "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *torch_include_flags()]
    # What ptxas says of registers and spills goes to a log, for tools/cuda_table.py.
    # nvcc compiles for the architectures in as many threads as there are processors, unless MAX_JOBS counts the compilers.
    threads = 1 if max_jobs() else 0
    command = f"{nvcc()} --threads {threads} -MMD -MF $out.d {' '.join(flags)} -Xptxas -v -c $in -o $out"
    ninja.rule("compile_cuda", f"{command} > $out.log 2>&1 || {{ cat $out.log; false; }}", **COMPILES)
    ninja.rule("describe_cuda", f"{compiler()} {' '.join(COMMON_FLAGS)} {described} -c $in -o $out", description="compile $out")
    # Stands for torch's CUDA library, which a CPU build of torch has not got. Only its name gets into ours.
    ninja.rule("stand_in", f"{compiler()} -shared -fPIC -x c++ $in -Wl,-soname,libtorch_cuda.so -o $out", description="compile $out")
    directories = " ".join(f"-L{directory}" for directory in library_paths())
    # The runtime's symbols stay inside, or torch's runtime would take their place.
    command = f"{nvcc()} -shared --cudart=static $in {directories} -ltorch_cpu -Xlinker --exclude-libs=ALL -o $out"
    ninja.rule("link_cuda", command, description="link $out")
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(f"cuda/{source.stem}.o")
        ninja.build(objects[-1], "compile_cuda", str(source))
    ninja.build("cuda/describe.o", "describe_cuda", str(ROOT / "csrc/cuda/describe.cpp"))
    ninja.build("cuda/libtorch_cuda.so", "stand_in", str(ROOT / "csrc/cuda/stand_in.cpp"))
    ninja.build(str(library), "link_cuda", [*objects, "cuda/describe.o", "cuda/libtorch_cuda.so"])


WRITERS = {"fastvae._C": write_cpp, "fastvae._cuda": write_cuda}


def extensions() -> list[Extension]:
    wanted = {"fastvae._C": wants_extension(), "fastvae._cuda": wants_cuda()}
    return [Extension(name, sources=[]) for name, want in wanted.items() if want]


def packages() -> list[str]:
    folders = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("fastvae/**/__init__.py"))
    return [*(".".join(folder.parts) for folder in folders), "fastvae.kernels"]


setup(
    version=version(),
    packages=packages(),
    package_dir={"fastvae.kernels": "kernels"},
    package_data={"fastvae": ["py.typed"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
