"""The tables of the README and of docs/benchmarks.md, written from figures alone. None has more than six columns."""

import importlib
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from benchmarks import headline, registry, units
from benchmarks.devices import decisive
from benchmarks.registry import OURS, Case
from benchmarks.results import DIRECTORY, Figure, Run, short_name

MOST_COLUMNS = 6
HEADLINE_PLOT = "headline.png"
NOT_MEASURED = "not measured"
BASELINES = ("eager", "compile", "bare-loop")
STEPS = {OURS: "fastvae", "eager": "plain PyTorch", "compile": "torch.compile of it", "pythae": "pythae"}
MODES = {"launch": "", "graph": ", replayed from a CUDA graph"}
ROOFS = {"GB/s": "a copy", "GFLOP/s": "a matrix product"}

HEADLINE_NOTE = """\
Measured on {processor}, {versions}: median times, in brackets the multiple of fastvae's, and peak memory beside the inputs.
Where plain PyTorch has variants (memory layouts, precisions, formulas) the fastest is shown."""
PROCESSORS_NOTE = """\
Virtual machines give different processors one model name, so the extensions that decide their speed are named with it."""
AT_A_GLANCE = """\
The median time of fastvae, then the times of `eager`, `compile` and `bare-loop` in multiples of it: above 1x fastvae is faster."""
TIMES_NOTE = "Median time of a call, and in brackets the multiple of fastvae's time: above 1x fastvae is faster."
WORK_NOTE = """\
What the fused kernels move or compute in a second, and its share of {roof} in the same rounds. Memory is the most that a call holds beside
its inputs, with fastvae and with `{first}`."""
EMULATED = """\
This processor has no instructions for products of bfloat16 (`avx512_bf16`). PyTorch's convolutions then take longer in bfloat16 than in
float32, and they are most of a step: `eager-fp32`, the same step in float32, is faster than fastvae's in bfloat16. Train in float32 on such
a processor, as `ImageVAE` does by itself."""


def describe_processor(row: Run) -> str:
    features = f" ({', '.join(decisive(row.features.split()))})" if row.features else ""
    threads = f", {row.threads} thread{'s' if row.threads > 1 else ''}" if row.device == "cpu" else ""
    return f"{short_name(row.device_name)}{features}{threads}"


def plot_name(slug: str, mode: str, family: str) -> str:
    return f"{slug}-{mode}-{family}.png"


def profile_name(slug: str, case: str) -> str:
    return f"{slug}-profile-{case}.png"


def case_title(case: Case) -> str:
    return f"{case.name} ({', '.join(map(str, case.size))}) {case.dtype_name}"


def readme_section(figures: Iterable[Figure]) -> str:
    """The picture and the table that the README begins with."""
    rows = headline.of_processor(figures)
    if not rows:
        return f"The four operations were {NOT_MEASURED}."
    first = rows[0].fastvae
    note = HEADLINE_NOTE.format(processor=describe_processor(first), versions=f"torch {first.torch}")
    header = ["", "fastvae", "eager PyTorch", "torch.compile", "memory, fastvae", "memory, eager"]
    table = markdown(header, [_headline_cells(row) for row in rows])
    return "\n\n".join((f"![Time and memory of the four operations]({_picture(HEADLINE_PLOT)})", table, note))


def _headline_cells(row: headline.Row) -> list[str]:
    others = [f"{_time(figure)}{_variant(figure)}" for figure in (row.eager, row.compiled)]
    memory = [units.memory(figure.peak_memory_mb) for figure in (row.fastvae, row.eager)]
    return [f"**{row.title}**, {row.conditions}", f"**{_time(row.fastvae)}**", *others, *memory]


def _variant(figure: Figure) -> str:
    return "" if figure.provider in ("eager", "compile") else f" `{figure.provider}`"


def page(figures: Iterable[Figure]) -> str:
    """Everything of every processor; what was not measured says so."""
    figures = sorted(figures, key=lambda row: (row.slug, row.mode != "launch"))
    processors = [list(rows) for _, rows in groupby(figures, key=lambda row: row.slug)]
    parts = ["## Processors", PROCESSORS_NOTE, *_processors(processors), "## At a glance", AT_A_GLANCE, *_at_a_glance(processors)]
    for family in registry.families():
        parts += [f"## {family}", _introduction(family)]
        parts += _family(family, [row for row in figures if row.family == family])
    return "\n\n".join(parts)


def _processors(processors: list[list[Figure]]) -> list[str]:
    header = ["in the tables", "model name", "threads", "vector and matrix extensions", "versions", "measured"]
    table = markdown(header, [_processor_cells(rows) for rows in processors])
    gpu = any(rows[0].device == "cuda" for rows in processors)
    return [table, *([] if gpu else [f"GPUs: {NOT_MEASURED}."])]


def _processor_cells(rows: list[Figure]) -> list[str]:
    backends = _seen(f"{row.backend}, {row.instruction_set}" if row.backend == "cpp" else row.backend for row in rows)
    versions = f"fastvae {_seen(row.fastvae for row in rows)} ({backends}), torch {_seen(row.torch for row in rows)}"
    dates = _seen(row.timestamp[:10] for row in rows)
    return [describe_processor(rows[0]), rows[0].device_name, str(rows[0].threads), rows[0].features, versions, dates]


def _seen(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))


def _at_a_glance(processors: list[list[Figure]]) -> list[str]:
    """A row a case, a column a processor."""
    tables = []
    for some in _pieces(processors, MOST_COLUMNS - 1):
        found = [{(row.case, row.provider): row for row in rows if row.mode == rows[0].mode} for rows in some]
        header = ["case", *(describe_processor(rows[0]) for rows in some)]
        tables.append(markdown(header, [[case_title(case), *(_glance(case, rows) for rows in found)] for case in registry.all_cases()]))
    return tables


def _glance(case: Case, rows: dict[tuple[str, str], Figure]) -> str:
    if (case.id, OURS) not in rows:
        return NOT_MEASURED
    others = [f"{name} {units.ratio(rows[case.id, name].ratio)}" for name in BASELINES if (case.id, name) in rows]
    return f"{_time(rows[case.id, OURS])}: {', '.join(others)}" if others else _time(rows[case.id, OURS])


def model_steps(figures: Iterable[Figure]) -> str:
    """The training steps of the models, a row each."""
    figures = sorted((row for row in figures if row.family == "models"), key=lambda row: row.slug)
    parts = []
    for _, group in groupby(figures, key=lambda row: row.slug):
        rows = list(group)
        found = {(row.case, row.provider): row for row in rows}
        cases = registry.cases("models")
        table = [[case.name, *(_time_of(case, provider, found) for provider in STEPS), _memory_of(case, found)] for case in cases]
        parts += [f"On {describe_processor(rows[0])}:", markdown(["training step", *STEPS.values(), "memory, and of plain"], table)]
    return "\n\n".join(parts) or f"{NOT_MEASURED.capitalize()}."


def _memory_of(case: Case, found: dict[tuple[str, str], Figure]) -> str:
    """Says what a step holds at most beside model and data, with fastvae and with plain PyTorch."""
    rows = [found.get((case.id, provider)) for provider in (OURS, "eager")]
    return ", ".join(units.memory(row.peak_memory_mb) for row in rows if row is not None)


def _introduction(family: str) -> str:
    """The description of the cases in the family's file."""
    return (importlib.import_module(f"benchmarks.bench_{family}").__doc__ or "").strip().replace("``", "`")


def _family(family: str, figures: list[Figure]) -> list[str]:
    parts = []
    for (slug, mode), group in groupby(figures, key=lambda row: (row.slug, row.mode)):
        rows = list(group)
        cases = [case for case in registry.cases(family) if any(row.case == case.id for row in rows)]
        parts += [f"### {family}: {describe_processor(rows[0])}{MODES[mode]}", *_tables(cases, rows)]
        parts.append(f"![{family}](../{_picture(plot_name(slug, mode, family))})")
        parts += _profiles(slug, cases)
    return parts or [f"{NOT_MEASURED.capitalize()}."]


def _profiles(slug: str, cases: list[Case]) -> list[str]:
    """The pictures of :mod:`benchmarks.profile_conv_vae`, where they were drawn."""
    names = [profile_name(slug, case.id) for case in cases]
    drawn = [name for name in names if (DIRECTORY / name).is_file()]
    return ["Where the time of a step goes, by kind of operator:"] * bool(drawn) + [f"![{name}](../{_picture(name)})" for name in drawn]


def _tables(cases: list[Case], rows: list[Figure]) -> list[str]:
    """Times with the providers as rows, then work and memory with the cases as rows."""
    found = {(row.case, row.provider): row for row in rows}
    # On a GPU single backends have figures too.
    names = [name for case in cases for name in case.providers] + [row.provider for row in rows]
    others = [name for name in dict.fromkeys(names) if name != OURS]
    measured = [name for name in (OURS, *others) if any((case.id, name) in found for case in cases)]
    parts = [TIMES_NOTE, *(_times(some, measured, found) for some in _pieces(cases, MOST_COLUMNS - 1))]
    absent = [f"`{name}`" for name in others if name not in measured]
    parts += [f"{NOT_MEASURED.capitalize()}: {', '.join(absent)}."] if absent else []
    parts += [EMULATED] if any(_is_emulated(row) for row in rows) else []
    first = next(iter(cases[0].providers))
    roofs = " or ".join(sorted({ROOFS[row.rate_unit] for row in rows}))
    return [*parts, WORK_NOTE.format(roof=roofs, first=first), _work(cases, first, found)]


def _is_emulated(row: Figure) -> bool:
    """Whether a step in float32 beat one in bfloat16, on a processor without products of bfloat16."""
    faster = row.provider == "eager-fp32" and row.dtype == "bfloat16" and row.ratio < 1
    return faster and row.device == "cpu" and "avx512_bf16" not in row.features.split()


def _times(cases: Sequence[Case], providers: list[str], found: dict[tuple[str, str], Figure]) -> str:
    rows = [[f"`{name}`", *(_time_of(case, name, found) for case in cases)] for name in providers]
    return markdown(["provider", *map(case_title, cases)], [row for row in rows if any(row[1:])])


def _time_of(case: Case, provider: str, found: dict[tuple[str, str], Figure]) -> str:
    if (case.id, provider) in found:
        return _time(found[case.id, provider])
    return NOT_MEASURED if provider in case.providers else ""


def _time(row: Figure) -> str:
    return units.time(row.median_ms) + ("" if row.provider == OURS else f" ({units.ratio(row.ratio)})")


def _work(cases: list[Case], first: str, found: dict[tuple[str, str], Figure]) -> str:
    header = ["case", "throughput", "share", "memory, fastvae", f"memory, {first}"]
    rows = [_work_cells(case, first, found) for case in cases]
    remarks = [found[case.id, OURS].remark if (case.id, OURS) in found else "" for case in cases]
    if any(remarks):
        header, rows = [*header, "remark"], [[*cells, remark] for cells, remark in zip(rows, remarks, strict=True)]
    return markdown(header, rows)


def _work_cells(case: Case, first: str, found: dict[tuple[str, str], Figure]) -> list[str]:
    ours, beside = found.get((case.id, OURS)), found.get((case.id, first))
    if ours is None:
        return [case_title(case), *[NOT_MEASURED] * 4]
    share = f"{units.share(ours.rate / ours.roof_rate)} of {ROOFS[ours.rate_unit]}"
    memory = [NOT_MEASURED if row is None else units.memory(row.peak_memory_mb) for row in (ours, beside)]
    return [case_title(case), units.rate(ours.rate, ours.rate_unit), share, *memory]


def _pieces(items: Sequence, most: int) -> list[Sequence]:
    """Consecutive pieces of ``most`` items at most, about equally long."""
    count = max(-(-len(items) // most), 1)
    size, longer = divmod(len(items), count)
    starts = [index * size + min(index, longer) for index in range(count + 1)]
    return [items[start:stop] for start, stop in pairwise(starts)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _picture(name: str) -> str:
    """From the root of the repository."""
    return f"{DIRECTORY.parent.name}/{DIRECTORY.name}/{name}"
