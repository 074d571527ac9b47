"""The result files: one CSV row for each case, provider and mode, appended run after run to the file of its device."""

import csv
import dataclasses
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks.devices import Device, decisive
from benchmarks.registry import OURS
from benchmarks.runner import Measurement
from fastvae import _backend, info

DIRECTORY = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """When, where and with what a run was made; ``features`` are those of the processor, separated by spaces."""

    timestamp: str
    device: str
    device_name: str
    features: str
    threads: int
    instruction_set: str
    backend: str
    fastvae: str
    torch: str
    triton: str

    @property
    def slug(self) -> str:
        return device_slug(self.device, self.device_name, self.features.split(), self.threads)


@dataclass(frozen=True)
class Figure(Run):
    """The time and memory of a provider of a case. Times are of one call; ``ratio`` is the median over that of fastvae in the same run.

    ``rate`` and ``roof_rate`` (a copy of as many bytes, or a matrix product, in the same rounds) are in ``rate_unit``; all providers'
    rates count the work of the fused kernels. ``first_call_s`` holds the compilation; ``peak_memory_mb`` is in MiB, over the inputs.
    ``remark`` is what a case says of the fused kernels' call.
    """

    family: str
    case: str
    size: str
    dtype: str
    provider: str
    mode: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio: float
    rate: float
    roof_rate: float
    rate_unit: str
    first_call_s: float
    peak_memory_mb: float
    rounds: int
    calls_per_round: int
    remark: str = ""


def short_name(device_name: str) -> str:
    """The name of a device without marks, the clock and the word for what it is."""
    return " ".join(re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", device_name, flags=re.IGNORECASE).split())


def device_slug(kind: str, name: str, features: Iterable[str], threads: int) -> str:
    """The name of a device's result file. Virtual machines give different processors one name, so their decisive features are in it."""
    words = re.sub(r"[^a-z0-9]+", "-", short_name(name).lower()).strip("-")
    threads_used = (f"{threads}threads",) if kind == "cpu" else ()
    return "-".join((kind, words, *decisive(features), *threads_used))


def describe_run(device: Device) -> Run:
    facts = info.collect()
    serving = (name for name in _backend.preference(device.kind) if facts["backends"][device.kind][name]["dtypes"])
    forced = os.environ.get("FASTVAE_BACKEND", "auto")
    return Run(
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=device.kind,
        device_name=device.name,
        features=" ".join(device.features),
        threads=torch.get_num_threads(),
        instruction_set=facts["instruction_set"] or "",
        backend=next(serving) if forced == "auto" else forced,
        fastvae=facts["versions"]["fastvae"],
        torch=facts["versions"]["torch"],
        triton=facts["versions"]["triton"] or "",
    )


def figures(run: Run, measurement: Measurement) -> list[Figure]:
    """The rows of a measured case."""
    case, rows = measurement.case, []
    for mode, timings in measurement.timings.items():
        for provider, timing in timings.items():
            contender = measurement.contenders[provider]
            p20, p80 = timing.percentiles
            row = Figure(
                **dataclasses.asdict(run),
                family=case.family,
                case=case.id,
                size=case.size_name,
                dtype=case.dtype_name,
                provider=provider,
                mode=mode,
                median_ms=timing.median * 1e3,
                p20_ms=p20 * 1e3,
                p80_ms=p80 * 1e3,
                ratio=timing.median / timings[OURS].median,
                rate=measurement.work / timing.median * 1e-9,
                roof_rate=measurement.roof[mode] * 1e-9,
                rate_unit=f"G{case.unit}/s",
                first_call_s=contender.first_call,
                peak_memory_mb=contender.peak_memory / 2**20,
                rounds=len(timing.seconds),
                calls_per_round=timing.calls,
                remark=measurement.remark if provider == OURS else "",
            )
            rows.append(row)
    return rows


_FIELDS = {field.name: field.type for field in dataclasses.fields(Figure)}


def append(path: Path, rows: Iterable[Figure]) -> None:
    """Adds rows to a result file, which is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        read(path)
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _FIELDS)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: _format(value) for name, value in dataclasses.asdict(row).items()})


def _format(value):
    return f"{value:.6g}" if isinstance(value, float) else value


def read(path: Path) -> list[Figure]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and list(reader.fieldnames) != list(_FIELDS):
            raise ValueError(f"{path}: its columns are {reader.fieldnames}, takes {list(_FIELDS)}; move the file away")
        return [Figure(**{name: _FIELDS[name](value) for name, value in row.items()}) for row in reader]


def read_all(directory: Path = DIRECTORY) -> list[Figure]:
    return [figure for path in sorted(directory.glob("*.csv")) for figure in read(path)]


def newest(rows: Iterable[Figure]) -> list[Figure]:
    """For each device, mode, case and provider the row of its newest run."""
    latest: dict[tuple[str, ...], Figure] = {}
    for row in sorted(rows, key=lambda row: row.timestamp):
        latest[row.slug, row.mode, row.case, row.provider] = row
    return list(latest.values())
