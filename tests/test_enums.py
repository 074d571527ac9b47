"""The numbers that cross the boundary of the operators mean the same in Python, in C++ and in Triton: all three are read as text."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests are not in a checkout")

# An argument of an operator is an int64; enums of another type stay within C++.
CPP_ENUM = re.compile(r"enum class (\w+) : int64_t \{([^}]*)\}")
CPP_SOURCES = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu"))


def python_enums() -> dict[str, dict[str, int]]:
    """The tables of the package, such as ``REDUCTIONS``, that give names the numbers 0, 1, 2 ..."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted((ROOT / "fastvae").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
                name, table = node.targets[0].id, _numbered(node.value)
                if table:
                    assert found.setdefault(name, table) == table, f"{path}: {name} is elsewhere too, and differs"
    return found


def _numbered(node: ast.Dict) -> dict[str, int] | None:
    """The table, where it is one of names and numbers."""
    entries = {}
    for key, value in zip(node.keys, node.values, strict=True):
        # The number is the first field of a row that is a named tuple.
        number = value.args[0] if isinstance(value, ast.Call) and value.args else value
        if not (isinstance(key, ast.Constant) and isinstance(number, ast.Constant)):
            return None
        entries[key.value] = number.value
    return entries if list(entries.values()) == list(range(len(entries))) and len(entries) > 1 else None


def cpp_enums() -> dict[str, list[tuple[str, dict[str, int]]]]:
    """Each enum that operators take, with the files that define it."""
    found = defaultdict(list)
    for path in CPP_SOURCES:
        for name, body in CPP_ENUM.findall(path.read_text()):
            found[name].append((str(path.relative_to(ROOT)), _members(re.sub(r"//.*", "", body))))
    return found


def _members(body: str) -> dict[str, int]:
    members: dict[str, int] = {}
    for entry in filter(None, map(str.strip, body.split(","))):
        name, _, number = map(str.strip, entry.partition("="))
        members[name] = int(number) if number else len(members)
    return members


def cpp_name(table: str) -> str:
    """``NORM_ACTIVATIONS`` is ``NormActivation`` in C++."""
    return "".join(word.capitalize() for word in table.split("_")).removesuffix("s")


PYTHON, CPP = python_enums(), cpp_enums()


def test_every_table_is_found():
    assert PYTHON.keys() == {"REDUCTIONS", "LIKELIHOODS", "ACTIVATIONS", "NORM_ACTIVATIONS", "EPS_MODES"}
    assert CPP.keys() == {cpp_name(table) for table in PYTHON}


@pytest.mark.parametrize("table", PYTHON)
def test_cpp_has_the_numbers_of_python(table):
    assert [file for file, members in CPP[cpp_name(table)] if members != PYTHON[table]] == []


def constants(path: Path):
    """The names that a file of Triton kernels gives to constants, each with its value's expression."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign):
            targets, values = (n.elts if isinstance(n, ast.Tuple) else [n] for n in (node.targets[0], node.value))
            for target, value in zip(targets, values, strict=False):
                if isinstance(target, ast.Name) and ast.unparse(value).startswith("tl.constexpr("):
                    yield target.id, value.args[0]


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.name)
def test_triton_takes_the_numbers_from_python(path):
    """A constant that is named after a member is looked up in its table: no number is written a second time."""
    members = {name.upper() for table in PYTHON.values() for name in table}
    for name, value in constants(path):
        if name in members:
            looked_up = {f"{table}[{member!r}]" for table, entries in PYTHON.items() for member in entries if member.upper() == name}
            assert ast.unparse(value).removesuffix(".number") in looked_up, name


def test_triton_looks_up_each_table():
    text = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert all(f'tl.constexpr({table}["' in text for table in PYTHON)
