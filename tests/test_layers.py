"""The house: imports run one way, and a family has one name in every layer."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# A part of the package imports only parts of a lower rank, and itself.
RANKS = {
    "_torch_private": -1,
    "_namespace": -1,
    "_extras": 0,
    "_gpu": 0,
    "_pytree": 0,
    "_types": 0,
    "_outputs": 1,
    "ops": 1,
    "_load": 2,
    "_backend": 3,
    "export": 4,
    "functional": 4,
    "info": 4,
    "nn": 5,
    "distributions": 6,
    "models": 7,
    "compat": 7,
    "metrics": 8,
    "training": 9,
    "__main__": 10,
}
# These hand themselves to the operators: they know ops, the names of options and of results, and each other; only _load loads them.
IMPLEMENTATIONS = ("fallback", "reference", "kernels", "_C")
# What puts the package together.
ASSEMBLY = ("__init__", "_checkout")

FILES = sorted([*(ROOT / "fastvae").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imported_parts(path: Path) -> set[str]:
    """The parts that a file imports anywhere in it, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            if node.module == "fastvae":
                found |= {alias.name for alias in node.names} - {"__version__"}
            elif node.module.startswith("fastvae."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names = (alias.name.split(".") for alias in node.names)
            found |= {name[1] if len(name) > 1 else "__init__" for name in names if name[0] == "fastvae"}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    part = part_of(path)
    imported = imported_parts(path) - {part}
    if part in ASSEMBLY:
        assert imported <= {*RANKS, *IMPLEMENTATIONS, *ASSEMBLY}
    elif part in IMPLEMENTATIONS:
        assert imported <= {"ops", "_gpu", "_outputs", "_torch_private", "_types", *IMPLEMENTATIONS}
    else:
        # The definitions in reference serve anyone above the backends.
        beside = {"reference"} if RANKS[part] >= RANKS["functional"] else set()
        assert imported <= RANKS.keys() | beside
        assert all(RANKS[name] < RANKS[part] for name in imported - beside)


def test_importing_the_package_loads_no_layer_above_functional():
    """Nor what only the upper layers need."""
    code = "import sys, fastvae; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "fastvae.functional.latent" in loaded
    upper = {f"fastvae.{part}" for part, rank in RANKS.items() if rank > RANKS["functional"]}
    assert loaded.isdisjoint({*upper, "fastvae.info", "matplotlib", "sklearn", "mlxtend", "tqdm.auto"})


def _private_names(path: Path) -> set[str]:
    """Chains that begin with a name that is imported from torch and have a part that begins with one underscore."""
    tree, roots, found = ast.parse(path.read_text()), {"torch"}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names if _is_private(f"{node.module}.{alias.name}")}
    chains = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {chain for chain in chains if chain.split(".")[0] in roots and _is_private(chain)}


def _is_private(chain: str) -> bool:
    return re.fullmatch(r"[\w.]*\._[a-zA-Z]\w*(\.[\w.]*)?", chain) is not None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_names_of_torch_are_in_one_module(path):
    """With each new version of torch one file has to be looked at."""
    assert bool(_private_names(path)) == (path.name == "_torch_private.py")


SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_includes_run_one_way(path):
    """csrc/common stands alone; csrc/cpu and csrc/cuda know it and not each other."""
    folder = path.relative_to(ROOT / "csrc").parts[0]
    includes = re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(), re.MULTILINE)
    included = {(path.parent / name).resolve().relative_to(ROOT / "csrc").parts[0] for name in includes}
    allowed = {"common": {"common"}, "cpu": {"cpu", "common"}, "cuda": {"cuda", "common"}}.get(folder, {"cpu", "common"})
    assert included <= allowed


# A composition of another family's operators, or of torch's products, has no kernels of its own.
COMPOSITIONS = ("binary_code_entropy", "norm_act_conv")
STEMS = sorted(p.stem for p in (ROOT / "fastvae" / "functional").glob("[!_]*.py") if p.stem not in COMPOSITIONS)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "layer",
    [
        "fastvae/ops/{}.py",
        "fastvae/reference/{}.py",
        "csrc/common/{}_formulas.h",
        "csrc/cpu/{}_kernels.h",
        "csrc/cpu/{}.cpp",
        "csrc/cpu/simd/{}.cpp",
        "csrc/cuda/{}.cu",
        "kernels/{}.py",
        "tests/test_{}.py",
        "benchmarks/bench_{}.py",
    ],
)
def test_a_family_has_one_name_everywhere(stem, layer):
    assert (ROOT / layer.format(stem)).is_file()


@pytest.mark.parametrize("stem", COMPOSITIONS)
@pytest.mark.parametrize("layer", ["fastvae/ops/{}.py", "fastvae/reference/{}.py", "fastvae/functional/{}.py", "tests/test_{}.py"])
def test_a_composition_has_one_name_everywhere(stem, layer):
    assert (ROOT / layer.format(stem)).is_file()
