"""What holds for the C++ sources as text, and what the compiler is told about them."""

import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="the tests are not in a checkout")

COMPILER = shutil.which("c++")
DEFINITION = re.compile(r"^(?:struct|class|union|enum class|enum) (?:alignas\(.*?\) )?(\w+)(?:<.*>)?(?: :? ?.*)?\{", re.MULTILINE)
# A namespace without a name, down to its end.
UNNAMED = re.compile(r"^namespace \{$.*?^\}  // namespace$", re.MULTILINE | re.DOTALL)


def definitions(folder: str) -> dict[str, set[str]]:
    """The types at namespace level of one library, each with the files that define it."""
    files = defaultdict(set)
    for path in [*(ROOT / "csrc/common").rglob("*"), *(ROOT / "csrc" / folder).rglob("*")]:
        if path.is_file():
            for name in DEFINITION.findall(UNNAMED.sub("", path.read_text())):
                files[name].add(str(path.relative_to(ROOT)))
    return files


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_a_type_is_defined_in_one_file(folder):
    """Two definitions of one name in one library would break the one-definition rule, which no compiler reports."""
    found = definitions(folder)
    assert len(found) > 20
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_types_of_the_same_name_are_found():
    """The check above sees what it looks for."""
    lines = ("struct Rows {", "};", "namespace {", "", "struct Hidden {", "};", "", "}  // namespace", "enum class Kind : int { a };")
    text = "\n".join((*lines, "template <>", "struct Of<int> {", "};"))
    assert DEFINITION.findall(UNNAMED.sub("", text)) == ["Rows", "Kind", "Of"]


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("flags", ["-ffast-math", "-ffinite-math-only", "-Ofast"])
def test_flags_that_drop_checks_for_nan_are_refused(flags):
    command = [COMPILER, "-std=c++17", "-fsyntax-only", "-x", "c++", str(ROOT / "csrc/common/math.h")]
    assert subprocess.run(command, capture_output=True).returncode == 0
    refused = subprocess.run([*command, *shlex.split(flags)], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "NaN" in refused.stderr
