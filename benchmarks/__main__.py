"""Runs the benchmarks: ``python -m benchmarks [family ...] [--device cpu|cuda] [--quick] [--out FILE.csv] [--threads N]``."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import devices, registry, results
from benchmarks.runner import FULL, QUICK, Measurement, Plan, measure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Times fastvae against what it replaces, forward and backward.")
    parser.add_argument("families", nargs="*", metavar="family", help=f"{', '.join(registry.families())}; all by default")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=devices.available()[-1].kind, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a few cases of each operator, fewer rounds; saved only with --out")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="appended to; default: the file of the device in benchmarks/results/")
    parser.add_argument("--threads", type=_positive, metavar="N", help="of torch on the CPU; default: torch's own choice")
    return parser


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, takes a whole number from 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """Returns 1 where a case failed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    for family in arguments.families:
        if family not in registry.families():
            parser.error(f"family: got {family!r}, takes {', '.join(registry.families())}")
    try:
        device = devices.named(arguments.device)
    except registry.Unavailable as reason:
        parser.error(str(reason))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    run = results.describe_run(device)
    out = arguments.out or (None if arguments.quick else results.DIRECTORY / f"{run.slug}.csv")
    chosen = [case for family in arguments.families or registry.families() for case in registry.cases(family)]
    if arguments.quick:
        chosen = [case for case in chosen if case.quick]
    print(_describe(run))
    # The cache starts empty, so that the times of first calls include the whole compilation.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        failures = _run(chosen, device, QUICK if arguments.quick else FULL, run, out)
    if out is not None:
        print(f"Figures are in {out}.")
    for case, error in failures:
        print(f"FAILED {case.family} {case.id}: {error}", file=sys.stderr)
    return 1 if failures else 0


def _describe(run: results.Run) -> str:
    served = f"{run.backend}, {run.instruction_set}" if run.backend == "cpp" else run.backend
    features = f" ({run.features})" if run.features else ""
    lines = [f"{run.device_name}{features}, {run.threads} threads; fastvae {run.fastvae} ({served}), torch {run.torch}"]
    if run.backend == "fallback":
        lines.append("fastvae has no kernels here: its figures are those of its backend in plain PyTorch.")
    return "\n".join(lines)


def _run(cases, device: devices.Device, plan: Plan, run: results.Run, out: Path | None) -> list[tuple[registry.Case, RuntimeError]]:
    failures = []
    with tqdm(cases, unit="case", file=sys.stderr) as bar:
        for case in bar:
            try:
                measurement = measure(case, device, plan, lambda stage, case=case: bar.set_postfix_str(f"{case.id}: {stage}"))
            except RuntimeError as error:
                failures.append((case, error))
                continue
            rows = results.figures(run, measurement)
            if out is not None:
                results.append(out, rows)
            tqdm.write(_table(measurement, rows), file=sys.stdout)
    return failures


def _table(measurement: Measurement, rows: list[results.Figure]) -> str:
    lines = [f"\n{measurement.case.family}: {measurement.case.id}"]
    for row in rows:
        rate = f"{row.rate:8.1f} {row.rate_unit} ({row.rate / row.roof_rate:4.0%} of {row.roof_rate:.0f})"
        times = f"{row.median_ms:10.4f} ms [{row.p20_ms:.4f}, {row.p80_ms:.4f}] {row.ratio:7.2f}x"
        lines.append(f"  {row.mode:<7}{row.provider:<16}{times}{rate} {row.peak_memory_mb:8.1f} MiB, first call {row.first_call_s:.1f} s")
    lines += [f"  {measurement.remark}"] if measurement.remark else []
    lines += [f"  {name}: not measured, {reason}" for name, reason in measurement.absent.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
