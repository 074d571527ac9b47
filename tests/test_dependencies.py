"""Every package that is declared is used, and every package that is used is declared."""

import ast
import functools
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastvae", "kernels", "benchmarks", "examples", "tests", "tools")

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests are not in a checkout")

# Distributions whose module has another name; griffe comes with mkdocstrings[python].
MODULES = {
    **{"faiss-cpu": "faiss", "pillow": "PIL", "pytest-benchmark": "benchmark", "scikit-image": "skimage", "scikit-learn": "sklearn"},
    **{"mkdocs-material": "material", "mkdocstrings": "griffe", "pyyaml": "yaml"},
}
# Commands, and plugins that pytest finds by itself; no code imports them.
COMMANDS = {"clang-format", "mypy", "pre-commit", "pytest-benchmark", "pytest-xdist", "ruff"}
# torch.onnx.export imports them.
OF_TORCH = {"onnx", "onnxscript"}
# The packages that a build needs, and those that come with pip and torch.
OF_THE_BUILD = {"setuptools", "wheel", "pybind11", "ninja"}
# Whoever wants its data sets installs it: with its torch it is gigabytes, which the extra does not impose.
# disent, for which a table of its figures stands where it is not installed, asks for other releases of what we have.
OF_THE_USER = {"torchvision", "disent"}


def requirements() -> list[str]:
    """What a user or a developer installs with the package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]


def declared() -> set[str]:
    """The names of their distributions."""
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements()} - {"fastvae-kernels"}


@functools.cache
def imported() -> set[str]:
    """The modules that the code names in an import, or hands to ``pytest.importorskip``, by the first part of their names."""
    found = set()
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
                found |= {re.match(r"\w*", str(part.value))[0] for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)}
    return found - {""}


def own_modules() -> set[str]:
    return {*FOLDERS, "functorch", *(path.stem for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))}


def test_every_declared_package_is_used():
    unused = {name for name in declared() - COMMANDS - OF_TORCH if MODULES.get(name, name.replace("-", "_")) not in imported()}
    assert unused == set()


def test_every_package_that_is_imported_is_declared():
    known = {MODULES.get(name, name.replace("-", "_")) for name in declared()} | OF_THE_BUILD
    assert imported() - known - OF_THE_USER - own_modules() - sys.stdlib_module_names == set()


def test_every_command_is_called():
    """By the Makefile or a tool, or it is a plugin whose options a configuration has."""
    text = "\n".join((ROOT / name).read_text() for name in ("Makefile", ".pre-commit-config.yaml", "CONTRIBUTING.md"))
    spoken = {"pytest-benchmark": "benchmarks", "pytest-xdist": "--numprocesses"}
    assert {command for command in COMMANDS if spoken.get(command, command) not in text} == set()


# Releases that were malicious, and the bound that excludes them.
MALICIOUS = {"lightning": ((2, 6, 2), (2, 6, 3))}


def test_malicious_releases_are_excluded():
    for name, releases in MALICIOUS.items():
        bounds = [r for r in requirements() if re.match(r"[\w-]+", r)[0] == name]
        assert bounds
        for bound in bounds:
            lowest = tuple(map(int, re.search(r">=([\d.]+)", bound)[1].split(".")))
            assert lowest > max(releases), bound


def test_no_dependency_is_a_url_or_a_branch():
    """The index keeps what a name and a version stand for; a URL does not."""
    files = [ROOT / "pyproject.toml", *(ROOT / "requirements").iterdir()]
    assert [requirement for requirement in requirements() if "@" in requirement or "/" in requirement] == []
    assert [path.name for path in files if re.search(r"git\+|--extra-index-url|--index-url|--trusted-host", path.read_text())] == []
