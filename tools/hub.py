"""Writes the package as a kernel of the Hugging Face hub: ``python tools/hub.py OUT``, and with the C++ kernels ``--compiled``.

``OUT/build/`` gets a folder for each variant, in the layout that the ``kernels`` package loads:

* ``torch-cpu``, ``torch-cuda`` and ``torch-rocm`` are Python: plain PyTorch, and on GPUs the Triton kernels.
* ``torch-stable-abi210-cpu-<processor>-linux`` adds the C++ kernels, in a library that serves every Python and every torch from 2.10 on.

A variant is a copy of the package without its modules and models. Its imports are relative and its operators have a namespace of their own,
so several versions of it, and the package itself, live in one process. ``tools/hub_files/`` has what is not in the package: the public
names and the layers.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

NAME = "fastvae"
VERSION = 0  # By the hub's convention: names may still change.
FOLDERS = ("fallback", "functional", "ops", "reference")
MODULES = ("_backend", "_gpu", "_load", "_namespace", "_outputs", "_pytree", "_torch_private", "_types")
COMPILED = f"torch-stable-abi210-cpu-{platform.machine()}-linux"


@dataclass(frozen=True)
class Variant:
    backend: str
    # The architectures for which `make test-offline` compiles the Triton kernels.
    archs: tuple[str, ...] = ()
    triton: bool = True
    compiled: bool = False


VARIANTS = {
    "torch-cpu": Variant("cpu", triton=False),
    "torch-cuda": Variant("cuda", ("8.0", "9.0", "10.0")),
    "torch-rocm": Variant("rocm", ("gfx942",)),
    COMPILED: Variant("cpu", triton=False, compiled=True),
}


def sources(variant: Variant) -> dict[str, Path]:
    """The files of a variant, by their paths in it."""
    folders = {name: ROOT / NAME / name for name in FOLDERS} | ({"kernels": ROOT / "kernels"} if variant.triton else {})
    files = {f"{name}.py": ROOT / NAME / f"{name}.py" for name in MODULES}
    files |= {f"{name}/{path.name}": path for name, folder in folders.items() for path in folder.glob("*.py")}
    return files | {path.name: path for path in (ROOT / "tools/hub_files").glob("*.py")}


def identifier(variant: Variant) -> str:
    """The name of the module and of the operators' namespace, which differs where any source does."""
    digest = hashlib.sha256()
    native = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file()) if variant.compiled else []
    for path in [*sorted(sources(variant).values()), *native]:
        digest.update(path.read_bytes())
    return f"_{NAME}_{variant.backend}_{digest.hexdigest()[:10]}"


def with_relative_imports(text: str, path: str) -> str:
    """The text of a file of the package, with ``from .ops`` for ``from fastvae.ops``."""
    dots = "." * (path.count("/") + 1)
    text = re.sub(rf"^(\s*from ){NAME} import", rf"\1{dots} import", text, flags=re.MULTILINE)
    text = re.sub(rf"^(\s*from ){NAME}\.", rf"\1{dots}", text, flags=re.MULTILINE)
    if absolute := re.search(rf"^\s*(import|from) {NAME}\b.*", text, re.MULTILINE):
        raise ValueError(f"{path}: {absolute[0].strip()!r} names the package, takes a form that can be relative")
    return text


def write_variant(folder: Path, variant: Variant) -> None:
    name = identifier(variant)
    for path, source in sources(variant).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(with_relative_imports(source.read_text(), path))
    (folder / "_namespace.py").write_text(f'"""The name under which the operators are registered with torch."""\n\nNAMESPACE = "{name}"\n')
    (folder / "_ops.py").write_text(OPS.format(name=name))
    # Older versions of the kernels package import this folder.
    (folder / NAME).mkdir()
    (folder / NAME / "__init__.py").write_text(OLDER.format(name=name))
    if variant.compiled:
        library = f"{name}.abi3.so"
        (folder / "_C.py").write_text(LIBRARY.format(library=library))
        compile_library(name, folder / library)
    (folder / "metadata.json").write_text(json.dumps(metadata(name, variant, folder), indent=2) + "\n")


OPS = '''"""The operators, in a namespace of their own."""

import torch

ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
'''

OLDER = '''"""For versions of the kernels package that look for the kernel here."""

import importlib.util
import sys
from pathlib import Path

path = Path(__file__).parent.parent / "__init__.py"
spec = importlib.util.spec_from_file_location("{name}", path)
module = sys.modules["{name}"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
globals().update({{name: getattr(module, name) for name in module.__all__}})
__all__ = module.__all__
'''

LIBRARY = '''"""Loads the C++ kernels, which register themselves for CPU tensors. The library has nothing of Python in it."""

from pathlib import Path

import torch

torch.ops.load_library(str(Path(__file__).with_name("{library}")))
'''


def compile_library(name: str, target: Path) -> None:
    """The C++ kernels for CPU tensors, with their operators in the namespace ``name``, without the Python module."""
    from torch.utils.cpp_extension import library_paths

    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary)
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fastvae/__init__.py"):
            (source / file).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / file, source / file)
        shutil.copytree(ROOT / "csrc", source / "csrc")
        for path in (source / "csrc/cpu").glob("*.cpp"):
            path.write_text(path.read_text().replace(f"STABLE_TORCH_LIBRARY_IMPL({NAME},", f"STABLE_TORCH_LIBRARY_IMPL({name},"))
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", "objects", "--build-lib", "library"]
        subprocess.run(command, cwd=source, env=os.environ | {"FASTVAE_BUILD": "1", "FORCE_CUDA": "0"}, check=True)
        objects = sorted(str(path) for path in (source / "objects").rglob("*.o") if path.name != "module.o")
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
        subprocess.run([*compiler, "-shared", "-s", *objects, "-o", str(target), *libraries], check=True)


def metadata(name: str, variant: Variant, folder: Path) -> dict:
    backend = {"type": variant.backend} | ({"archs": list(variant.archs)} if variant.archs else {})
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for path in paths}
    return {
        "name": NAME,
        "id": name,
        "version": VERSION,
        "license": "MIT",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": files},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder without a build/ in it")
    parser.add_argument("--compiled", action="store_true", help=f"writes {COMPILED} too, which takes a C++ compiler and some minutes")
    options = parser.parse_args()
    build = options.out / "build"
    if build.exists():
        parser.error(f"out: got {options.out}, which has a build/, takes a folder without one")
    for name, variant in VARIANTS.items():
        if options.compiled or not variant.compiled:
            write_variant(build / name, variant)
            print(build / name)


if __name__ == "__main__":
    main()
