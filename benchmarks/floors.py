"""Holds the figures of this machine against ``floors.toml``, the speed that has to be reached."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.devices import Cpu
from benchmarks.registry import OURS
from benchmarks.results import Figure, device_slug

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("floors.toml")


@dataclass(frozen=True)
class Verdict:
    """A floor, the ratio that a provider of a case has to reach, and the measured ratio: ``None`` where nothing was measured.

    ``missing`` is the feature that the floor needs and the processor lacks; the floor does not apply there.
    """

    device: str
    case: str
    provider: str
    least: float
    measured: float | None
    missing: str | None = None

    @property
    def falls_short(self) -> bool:
        return self.missing is None and self.measured is not None and self.measured < self.least

    def __str__(self) -> str:
        measured = "not measured" if self.measured is None else f"{self.measured:.2f}"
        remark = f", not applicable: needs {self.missing}" if self.missing else " FALLS SHORT" if self.falls_short else ""
        return f"{self.device:<5}{self.case:<55}{self.provider:<25}>= {self.least:<7g}{measured}{remark}"


def judge(figures: Iterable[Figure], floors: dict, processor: Cpu) -> list[Verdict]:
    """A verdict for each floor and each case it matches; ``figures`` are the newest ones, of which ``processor``'s count."""
    verdicts = []
    for device, section in floors.items():
        rows = [row for row in figures if row.device == device and _same_machine(row, section, processor)]
        features = processor.features if device == processor.kind else ()
        for floor in section["floors"]:
            mode = floor.get("mode", section["mode"])
            matching = [row for row in rows if row.mode == mode and fnmatchcase(row.case, floor["case"])]
            verdicts += _judge(device, floor, matching, features)
    return verdicts


def _same_machine(row: Figure, section: dict, processor: Cpu) -> bool:
    if "device_name" in section:
        return row.device_name == section["device_name"]
    return row.slug == device_slug(processor.kind, processor.name, processor.features, section["threads"])


def _judge(device: str, floor: dict, rows: list[Figure], features: tuple[str, ...]) -> list[Verdict]:
    verdicts, needs = [], floor.get("needs")
    missing = needs if needs is not None and needs not in features else None
    for case in sorted({row.case for row in rows}) or [floor["case"]]:
        found = {row.provider: row for row in rows if row.case == case}
        for provider, least in floor["at_least"].items():
            measured = found[provider].ratio if provider in found else None
            verdicts.append(Verdict(device, case, provider, least, measured, missing))
        if "share_of_roof" in floor:
            share = found[OURS].rate / found[OURS].roof_rate if OURS in found else None
            verdicts.append(Verdict(device, case, "share of the roof", floor["share_of_roof"], share, missing))
    return verdicts


def load(path: Path = FILE) -> dict:
    return tomllib.loads(path.read_text())
