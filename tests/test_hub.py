"""The kernel of the hub that tools/hub.py writes: its layout, and its layers in a model that the `kernels` package changes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECK = ROOT / "tests/_hub_layers.py"
PYTHON_VARIANTS = ("torch-cpu", "torch-cuda", "torch-rocm")

pytestmark = pytest.mark.skipif(not (ROOT / "tools").is_dir(), reason="the tests are not in a checkout")


def write(out: Path, *options: str, **environment: str) -> Path:
    command = [sys.executable, str(ROOT / "tools/hub.py"), str(out), *options]
    result = subprocess.run(command, cwd=out.parent, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("hub") / "fastvae")


def run(folder: Path, *arguments: str) -> str:
    """In a folder of its own and without the checkout on the path: `kernels` has to be the package of that name and not the folder here."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FASTVAE_BACKEND")}
    result = subprocess.run([sys.executable, *arguments], cwd=folder, env=inherited, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imports(path: Path) -> set[str]:
    """The top-level modules that a file imports, without those of the kernel itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_the_layout_is_the_hub_s(kernel):
    assert {path.name for path in (kernel / "build").iterdir()} == set(PYTHON_VARIANTS)
    for variant in (kernel / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-")
        assert re.fullmatch(rf"_fastvae_{metadata['backend']['type']}_[0-9a-f]{{10}}", metadata["id"])
        assert {"__init__.py", "_ops.py", "layers.py", "fastvae/__init__.py"} <= metadata["digest"]["files"].keys()
        assert (variant / "kernels").is_dir() == (variant.name != "torch-cpu")


def test_a_kernel_imports_torch_and_itself(kernel):
    """And numpy, which computes noise on the CPU, and Triton."""
    paths = list(kernel.glob("build/*/**/*.py"))
    assert len(paths) > 100
    others = {"numpy", "torch", "triton"}
    assert {name for path in paths for name in imports(path)} - sys.stdlib_module_names <= others


def test_two_versions_have_two_namespaces(kernel, tmp_path):
    copy = tmp_path / "checkout"
    for folder in ("fastvae", "kernels", "csrc", "tools"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (copy / "fastvae/ops/group_norm.py").open("a") as file:
        file.write("# Another version.\n")
    result = subprocess.run([sys.executable, "tools/hub.py", "out"], cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((folder / "build/torch-cpu/metadata.json").read_text())["id"] for folder in (kernel, copy / "out"))
    assert first != second


def test_a_folder_with_a_build_is_refused(kernel):
    result = subprocess.run([sys.executable, str(ROOT / "tools/hub.py"), str(kernel)], capture_output=True, text=True)
    assert result.returncode == 2
    assert "takes a folder without one" in result.stderr


def test_layers_replace_those_of_a_model_in_training_and_compiled(kernel, tmp_path):
    """With the results of the package and of the layers; the files have the digests of the metadata."""
    _, has_library = run(tmp_path, str(CHECK), str(kernel), "fallback").split()
    assert has_library == "False"


def test_the_kernel_is_found_where_older_versions_look(kernel, tmp_path):
    program = "import sys; sys.path.insert(0, sys.argv[1]); import fastvae; print(fastvae.__file__, fastvae.functional.mse_loss.__module__)"
    variant = kernel / "build/torch-cpu"
    file, module = run(tmp_path, "-c", program, str(variant)).split()
    assert Path(file) == variant / "fastvae/__init__.py"
    assert module == json.loads((variant / "metadata.json").read_text())["id"] + ".functional.reconstruction"


@pytest.mark.prove
@pytest.mark.skipif(shutil.which("c++") is None, reason="c++ is not installed")
def test_the_compiled_variant_serves_every_python(tmp_path):
    """Unoptimised, which compiles quickly: this is about the namespace and the loading."""
    kernel = write(tmp_path / "fastvae", "--compiled", CXXFLAGS="-O0")
    (library,) = kernel.glob("build/torch-stable-abi210-cpu-*/*.abi3.so")
    symbols = subprocess.run(["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in symbols
    assert re.findall(r"\b_?Py\w+", symbols) == []
    assert str(tmp_path).encode() not in library.read_bytes()
    name, has_library = run(tmp_path, str(CHECK), str(kernel), "cpp").split()
    assert (name, has_library) == (library.name.removesuffix(".abi3.so"), "True")
