"""Fuzzes every public function against the reference in float64: ``python tools/fuzz.py --cases 1000000``.

A case is one call, forward and backward; its family and its number decide all of it, so ``--repeat latent:17`` runs one again. See
``tests/_fuzz.py`` for what passes.
"""

import argparse
import datetime
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from _fuzz import poison_memory, run  # noqa: E402
from _fuzz_families import FAMILIES  # noqa: E402

# Numbers of the cases of a seed and of the next do not meet.
STRIDE = 10**9
MAX_FAILURES = 20  # of a family; more say nothing new


@dataclass
class Tally:
    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


def fuzz(family: str, first: int, cases: int) -> Tally:
    """Runs ``cases`` cases of a family, from the number ``first``."""
    make, tally, start, number = FAMILIES[family][0], Tally(), time.perf_counter(), first
    while tally.counts["run"] < cases and len(tally.failures) < MAX_FAILURES:
        verdict = run(family, make, number)
        number += 1
        if verdict is None:
            tally.counts["undecided"] += 1
            continue
        tally.counts["run"] += 1
        tally.counts["at the limits of float32"] += verdict.excused
        if verdict.failure:
            tally.failures.append(verdict.failure)
            print(f"FAILED {verdict.failure}", flush=True)
    tally.seconds = time.perf_counter() - start
    return tally


def report(family: str, tally: Tally) -> None:
    counts, milliseconds = tally.counts, 1e3 * tally.seconds / max(tally.counts["run"], 1)
    limits = "at the limits of float32"
    print(
        f"{family:20} {counts['run']:9} cases, {len(tally.failures)} failed, {counts[limits]} {limits}, "
        f"{counts['undecided']} draws left out, {milliseconds:.2f} ms a case",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"which of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--cases", type=int, default=1_000_000, help="of all families together")
    parser.add_argument("--seed", type=int, default=datetime.date.today().toordinal(), help="decides the cases; the date by default")
    parser.add_argument("--repeat", metavar="FAMILY:NUMBER", help="runs this case alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    poison_memory()
    if options.repeat:
        family, _, number = options.repeat.partition(":")
        verdict = run(family, FAMILIES[family][0], int(number))
        print("left out" if verdict is None else verdict.failure or "passed")
        return int(verdict is not None and verdict.failure is not None)
    chosen = options.families or list(FAMILIES)
    shares = sum(FAMILIES[family][1] for family in chosen)
    print(f"seed {options.seed}, {options.cases} cases", flush=True)
    tallies = {}
    for family in chosen:
        cases = -(-options.cases * FAMILIES[family][1] // shares)
        tallies[family] = fuzz(family, options.seed * STRIDE, cases)
        report(family, tallies[family])
    total = sum(tally.counts["run"] for tally in tallies.values())
    failed = sum(len(tally.failures) for tally in tallies.values())
    seconds = sum(tally.seconds for tally in tallies.values())
    print(f"{total} cases of {len(chosen)} families with seed {options.seed} in {seconds:.0f} s: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
