"""Compiles every Triton kernel for GPUs that are not here and writes what the machine code shows: ``python tools/offline_table.py``.

A case of tools/offline_cases.py is a call of an operator. Its launcher runs on tensors without data for a machine that is only described,
and what it launches is specialised and compiled as it would be there: the same types, alignments and constants. Needs Triton with its
bundled assemblers, no GPU. The rows of other versions of Triton stay as they are: the tool is run once with each.
"""

import contextlib
import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("tools/offline_table.py: the interpreter compiles nothing; unset TRITON_INTERPRET")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from offline_cases import CASES, DTYPES, TARGETS, Case, empty  # noqa: E402

from fastvae.kernels import _device, _reduce  # noqa: E402
from fastvae.kernels._launch import Machine  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "triton" / "offline.csv"


@dataclass(frozen=True)
class Launch:
    """One launch that was caught instead of made."""

    kernel: JITFunction
    arguments: tuple
    options: dict
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def by_name(self) -> dict[str, object]:
        """Arguments and options by the kernel's names for them."""
        return {**dict(zip(self.kernel.arg_names, self.arguments, strict=False)), **self.options}


def launches(case: Case, dtype: torch.dtype, machine: Machine) -> list[Launch]:
    """The launches of the case on that machine."""
    caught = []

    def catch(kernel, *arguments, grid, warmup, **options):
        caught.append(Launch(kernel, arguments, options, grid))

    with (
        patch.object(JITFunction, "run", catch),
        patch.object(_device, "machine", lambda device: machine),
        patch.object(_device, "on", lambda device: contextlib.nullcontext()),
        patch.object(_device, "ticket", lambda device: empty(dtype=torch.int32)),
    ):
        case.call(dtype)
    return caught


def compiled(launch: Launch, target: GPUTarget):
    """The launch's kernel, specialised for its arguments as Triton does when it launches."""
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    bound, specialization, options = bind(*launch.arguments, **launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(backend, launch.options, bound, specialization, options)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options.__dict__)


@dataclass(frozen=True)
class Row:
    """Figures of the machine code of a kernel. Wide accesses are those of 16 bytes; narrow ones are the rest, each as often as it stands
    in the code, where every size has a loop over full blocks and one over what is left. ``tensor_core`` counts matrix instructions."""

    case: str
    kernel: str
    dtype: str
    target: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    tensor_core: int

    @property
    def id(self) -> str:
        return f"{self.target}-{self.dtype}-{self.kernel}-{self.case}"


def facts(binary) -> dict[str, int]:
    return _nvidia_facts(binary) if "ptx" in binary.asm else _amd_facts(binary)


def _nvidia_facts(binary) -> dict[str, int]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    resources = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?!NOP)([A-Z][\w.]*)", code, re.MULTILINE)
    return {
        "registers": resources["REG"],
        "spill_bytes": resources["STACK"] + resources["LOCAL"],
        "shared_bytes": binary.metadata.shared,
        "instructions": len(opcodes),
        **_accesses([o for o in opcodes if o.startswith("LDG")], [o for o in opcodes if o.startswith("STG")], ".128"),
        "tensor_core": sum(o.startswith(("HMMA", "HGMMA", "UTCHMMA")) for o in opcodes),
    }


def _amd_facts(binary) -> dict[str, int]:
    code = binary.asm["amdgcn"]
    number = {name: int(re.search(rf"\.{name}:\s+(\d+)", code).group(1)) for name in ("vgpr_count", "private_segment_fixed_size")}
    opcodes = re.findall(r"^\s+([a-z]+_[a-z0-9_]+)(?=\s)", code[: code.index(".amdhsa_kernel")], re.MULTILINE)
    loads = [o for o in opcodes if re.match(r"(global|buffer)_load", o)]
    stores = [o for o in opcodes if re.match(r"(global|buffer)_store", o)]
    return {
        "registers": number["vgpr_count"],
        "spill_bytes": number["private_segment_fixed_size"],
        "shared_bytes": binary.metadata.shared,
        "instructions": len(opcodes),
        **_accesses(loads, stores, "_dwordx4"),
        "tensor_core": sum(o.startswith("v_mfma") for o in opcodes),
    }


def _accesses(loads: list[str], stores: list[str], wide: str) -> dict[str, int]:
    wide_loads, wide_stores = (sum(wide in opcode for opcode in opcodes) for opcodes in (loads, stores))
    return {
        "wide_loads": wide_loads,
        "narrow_loads": len(loads) - wide_loads,
        "wide_stores": wide_stores,
        "narrow_stores": len(stores) - wide_stores,
    }


def jobs(targets: Collection[str] = tuple(TARGETS)) -> list[tuple[int, str, str]]:
    """Every case and dtype for these targets."""
    return [(i, dtype, target) for i, case in enumerate(CASES) for dtype in case.dtypes for target in case.targets if target in targets]


class Code(NamedTuple):
    """A row with the code that it is about: Triton's intermediate code, and the PTX or AMD's assembly."""

    row: Row
    intermediate: str
    assembly: str


def compile_job(job: tuple[int, str, str]) -> list[Code]:
    """What the launches of a job are compiled to."""
    index, dtype, target_name = job
    case, (target, machine) = CASES[index], TARGETS[target_name]
    results = []
    for launch in launches(case, DTYPES[dtype], machine):
        with patch.object(_reduce, "ON_AMD", tl.constexpr(target.backend == "hip")):
            binary = compiled(launch, target)
        row = Row(case.name, launch.name, dtype, target_name, triton.__version__, **facts(binary))
        results.append(Code(row, binary.asm["ttir"], binary.asm["amdgcn" if target.backend == "hip" else "ptx"]))
    return results


def compile_all(targets: Collection[str] = tuple(TARGETS), processes: int = 2) -> list[list[Code]]:
    """The code of each of :func:`jobs`."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_job, jobs(targets)))


def read_table() -> list[Row]:
    with TABLE.open(newline="") as file:
        return [Row(**{f.name: f.type(row[f.name]) for f in fields(Row)}) for row in csv.DictReader(file)]


def main() -> None:
    rows = [code.row for codes in compile_all() for code in codes]
    others = [row for row in read_table() if row.triton != triton.__version__]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in sorted(rows + others, key=lambda row: row.triton))
    print(
        f"{len(rows)} kernels in {TABLE.relative_to(ROOT)}; most registers {max(row.registers for row in rows)}, "
        f"spilled bytes {sum(row.spill_bytes for row in rows)}"
    )


if __name__ == "__main__":
    main()
