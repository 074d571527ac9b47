"""The result tables of the README, written from figures alone."""

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from benchmarks import registry
from benchmarks.registry import OURS, Case
from benchmarks.results import DIRECTORY, Figure

INTRODUCTION = """\
Times are of one forward and backward pass with the gradients of all inputs: the median of interleaved rounds in one process and, in
brackets, its ratio to that of fastvae. `eager` is what fastvae replaces, written in plain PyTorch; `compile` is `torch.compile` of it. All
results were checked against each other before they were timed. The throughput counts what the fused kernels have to move or compute, beside
what the machine reached in the same rounds; peak memory is over the inputs."""

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_MEASURED = "not measured"
TITLES = {"cpu": "CPU", "cuda": "CUDA"}
MODES = {"launch": "each call started from Python", "graph": "replayed from a CUDA graph"}
ROOFS = {"GB/s": "a copy", "GFLOP/s": "a matrix product"}


def plot_name(slug: str, mode: str, family: str) -> str:
    return f"{slug}-{mode}-{family}.png"


def describe_device(row: Figure) -> str:
    threads = f", {row.threads} threads" if row.device == "cpu" else ""
    return f"{row.device_name}{threads}, {MODES[row.mode]}"


def tables(figures: Iterable[Figure]) -> str:
    """Markdown for the newest figures of every device; what has no figure says so."""
    figures = list(figures)
    parts = [INTRODUCTION]
    for kind, title in TITLES.items():
        rows = sorted((row for row in figures if row.device == kind), key=lambda row: (row.slug, row.mode != "launch"))
        if not rows:
            parts.append(f"### {title}\n\nNot measured.")
        for (slug, mode), group in groupby(rows, key=lambda row: (row.slug, row.mode)):
            parts.append(_device_section(title, slug, mode, list(group)))
    return "\n\n".join(parts)


def _device_section(title: str, slug: str, mode: str, rows: list[Figure]) -> str:
    parts = [f"### {title}: {describe_device(rows[0])}", _versions(rows)]
    for family in registry.families():
        of_family = {(row.case, row.provider): row for row in rows if row.family == family}
        if of_family:
            parts += [f"**{family}**", _table(registry.cases(family), of_family)]
            parts.append(f"![{family}]({DIRECTORY.parent.name}/{DIRECTORY.name}/{plot_name(slug, mode, family)})")
        else:
            parts.append(f"**{family}**: {NOT_MEASURED}.")
    return "\n\n".join(parts)


def _versions(rows: list[Figure]) -> str:
    def seen(values):
        return " and ".join(sorted(set(values)))

    backends = seen(f"{row.backend}, {row.instruction_set}" if row.backend == "cpp" else row.backend for row in rows)
    dates = seen(row.timestamp[:10] for row in rows)
    return f"fastvae {seen(row.fastvae for row in rows)} ({backends}), torch {seen(row.torch for row in rows)}, {dates}."


def _table(cases: Iterable[Case], rows: dict[tuple[str, str], Figure]) -> str:
    cases = list(cases)
    # On a GPU there are figures of single backends, too.
    names = [name for case in cases for name in case.providers] + [provider for _, provider in rows]
    others = [name for name in dict.fromkeys(names) if name != OURS]
    header = ["case", OURS, *others, "throughput", "peak memory"]
    lines = [header, ["---"] * len(header), *(_row(case, others, rows) for case in cases)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row(case: Case, others: list[str], rows: dict[tuple[str, str], Figure]) -> list[str]:
    size = ", ".join(map(str, case.size))
    found = {name: rows[case.id, name] for name in (OURS, *others) if (case.id, name) in rows}
    times = [_time(found[name]) if name in found else NOT_MEASURED if name in case.providers else "" for name in (OURS, *others)]
    return [f"{case.name} ({size}) {case.dtype_name}", *times, _throughput(found.get(OURS)), _memory(case, found)]


def _time(row: Figure) -> str:
    time = f"{row.median_ms:.3g} ms" if row.median_ms >= 1 else f"{row.median_ms * 1e3:.3g} µs"
    return time if row.provider == OURS else f"{time} ({row.ratio:.3g}x)"


def _throughput(row: Figure | None) -> str:
    if row is None:
        return NOT_MEASURED
    remark = f"; {row.remark}" if row.remark else ""
    return f"{row.rate:.3g} {row.rate_unit}, {row.rate / row.roof_rate:.0%} of {ROOFS[row.rate_unit]}{remark}"


def _memory(case: Case, found: dict[str, Figure]) -> str:
    if OURS not in found:
        return NOT_MEASURED
    first = next(iter(case.providers))
    beside = f" ({first} {_size(found[first])})" if first in found else ""
    return _size(found[OURS]) + beside


def _size(row: Figure) -> str:
    return f"{row.peak_memory_mb:.3g} MiB" if row.peak_memory_mb >= 1 else f"{row.peak_memory_mb * 1024:.3g} KiB"


def inserted(document: str, text: str) -> str:
    """The document with ``text`` between the two marks."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"takes a document with the lines {BEGIN} and {END}, once each")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def write(readme: Path, text: str) -> None:
    readme.write_text(inserted(readme.read_text(), text))


def is_stale(readme: Path, text: str) -> bool:
    document = readme.read_text()
    return document != inserted(document, text)
