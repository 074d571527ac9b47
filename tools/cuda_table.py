"""Writes what ptxas says of each CUDA kernel, registers and shared memory by architecture: ``python tools/cuda_table.py``.

Builds csrc/cuda/ (FORCE_CUDA=1: no GPU is needed) and writes benchmarks/results/cuda/ptxas.csv, which a test compares.
"""

import csv
import os
import re
import subprocess
import sys
from dataclasses import astuple, dataclass, fields
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks/results/cuda/ptxas.csv"
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True, order=True)
class Kernel:
    name: str
    architecture: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_bytes: int


def build(**environment: str) -> Path:
    """Builds what has changed; the folder of the objects and their logs."""
    command = [sys.executable, "setup.py", "build_ext"]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "FORCE_CUDA": "1", **environment}, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(result.stdout + result.stderr)
    return max(ROOT.glob("build/temp*/cuda"), key=lambda folder: (folder / "workspace.o").stat().st_mtime)


def library() -> Path:
    return max(ROOT.glob("build/lib*/fastvae/_cuda.so"), key=lambda path: path.stat().st_mtime)


def parse(log: str) -> list[Kernel]:
    names = [match["name"] for match in _KERNEL.finditer(log)]
    return [_kernel(name, match) for name, match in zip(_demangle(names), _KERNEL.finditer(log), strict=True)]


def _demangle(names: list[str]) -> list[str]:
    """``latent_forward_kernel<float, true>``: the name alone, without namespaces and parameters."""
    plain = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split("\n")
    return [re.sub(r"\(.*", "", re.sub(r"fastvae::|scalar::|\(anonymous namespace\)::|^void ", "", name)) for name in plain[: len(names)]]


def _kernel(name: str, match: re.Match) -> Kernel:
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    spilled = int(match["stores"]) + int(match["loads"])
    return Kernel(name, match["architecture"], int(match["registers"]), int(shared[1]) if shared else 0, int(match["stack"]), spilled)


def kernels(folder: Path) -> list[Kernel]:
    return sorted(kernel for log in sorted(folder.glob("*.o.log")) for kernel in parse(log.read_text()))


def read() -> list[Kernel]:
    with TABLE.open(newline="") as file:
        rows = [*csv.reader(file)][1:]
    return [Kernel(name, architecture, *map(int, numbers)) for name, architecture, *numbers in rows]


def write(rows: list[Kernel]) -> None:
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Kernel)])
        writer.writerows(astuple(row) for row in rows)


if __name__ == "__main__":
    write(kernels(build()))
    print(f"wrote {TABLE.relative_to(ROOT)}")
