"""Runs the long proofs: ``python tools/prove.py`` for all, ``python tools/prove.py --part today`` for the part that the date chooses.

They are the tests that are marked ``prove``, and the tests of the emulated CUDA kernels in the builds that find what results do not show:
under the address sanitizer, with every access to memory watched, and with the errors of the GPU's approximate instructions.
"""

import argparse
import datetime
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "cpp"))

from compat import ONE_ARCHITECTURE  # noqa: E402
from operators import preload  # noqa: E402

OWN_PROCESSES = ("cuda", "emulation", "interpret", "offline")
EMULATION = ("tests/emulation", "--numprocesses=auto")
# Sizes alone decide what these say, and builds with small grids have other limits.
WITHOUT_ARITHMETIC = ("--ignore=tests/emulation/test_cuda_arithmetic.py",)
EVERY = ("-m", "prove or not prove")
NO_TESTS = 5  # pytest's exit status where none is selected
# A build takes a minute or two, so of these one a day has its turn.
BUILDS = ("races", "address", "approximate", "captured")


@dataclass(frozen=True)
class Proof:
    arguments: tuple[str, ...]  # of pytest
    environment: dict[str, str] = field(default_factory=dict)


def proofs() -> dict[str, Proof]:
    compiler = os.environ.get("CXX", "c++")
    native = ("tests", *(f"--ignore=tests/{folder}" for folder in OWN_PROCESSES), "--numprocesses=auto", "--dist=loadfile", "-m", "prove")
    address = (*EMULATION, *WITHOUT_ARITHMETIC, *EVERY, "--emulation=address")
    return {
        "address": Proof(address, preload(compiler, "address")),
        "captured": Proof((*address, "--capturing"), preload(compiler, "address")),
        "races": Proof((*EMULATION, *WITHOUT_ARITHMETIC, *EVERY, "--emulation=races")),
        "approximate": Proof((*EMULATION, *EVERY, "--emulation=approximate")),
        "native": Proof(native),
        "interpreted": Proof(("tests/interpret", "--numprocesses=auto", "-m", "prove"), {"TRITON_INTERPRET": "1"}),
        "offline": Proof(("tests/offline", "-m", "prove")),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(proofs())}; all by default")
    parser.add_argument("--part", choices=("all", "today"), default="all", help="all tests, or the tenth that today's date chooses")
    options = parser.parse_args()
    day = datetime.date.today().timetuple().tm_yday
    today = options.part == "today"
    part = [f"--tenth={day // len(BUILDS) % 10}"] if today else []
    # nvcc takes minutes for each architecture.
    environment = os.environ | (ONE_ARCHITECTURE if today else {})
    waiting = {name for name in BUILDS if today and name != BUILDS[day % len(BUILDS)]}
    failed = []
    for name, proof in proofs().items():
        if name not in (options.names or proofs()) or name in waiting:
            continue
        command = [sys.executable, "-m", "pytest", "-q", *proof.arguments, *part]
        print(f"{name}: {shlex.join(command)}", flush=True)
        status = subprocess.run(command, cwd=ROOT, env=environment | proof.environment).returncode
        if status not in (0, NO_TESTS):
            failed.append(name)
    print(f"failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
