"""The pictures of the figures: the README's, and for each device, mode and family the time of every provider relative to fastvae."""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks import headline, registry, units
from benchmarks.registry import OURS
from benchmarks.results import Figure
from benchmarks.tables import HEADLINE_PLOT, MODES, describe_processor, plot_name

# Twice the pixels that a README shows, for sharp letters.
PICTURE = {"facecolor": "white", "layout": "constrained", "dpi": 200}
WIDTH = 8.4
GREY = "#6e7681"
OUR_COLOUR = "#d62728"
# A provider has its colour and marker in every picture; those that are not named here share the last ones.
STYLES = {
    OURS: (OUR_COLOUR, "D"),
    "eager": ("#4d4d4d", "o"),
    "compile": ("#1f77b4", "s"),
    "eager-fp32": ("#000000", "x"),
    "eager-nchw": ("#8c8c8c", "v"),
    "eager-channels-last": ("#8c8c8c", "^"),
    "compile-nchw": ("#6baed6", "v"),
    "compile-channels-last": ("#6baed6", "^"),
    "fallback": ("#ff7f0e", "P"),
    "addmm": ("#8c6d31", "p"),
    "faiss": ("#2ca02c", "*"),
    "jacrev": ("#9467bd", "h"),
    "vector-quantize-pytorch": ("#9467bd", "h"),
}
OTHER_STYLES = (("#f28e8e", "d"), ("#e377c2", "<"), ("#17becf", ">"), ("#bcbd22", "8"))
BARS = {"eager PyTorch": "#8c8c8c", "torch.compile": "#6baed6", "fastvae": OUR_COLOUR}


def draw(figures: Iterable[Figure], directory: Path) -> list[Path]:
    """Draws all pictures and returns where they are."""
    known = {case.id for case in registry.all_cases()}
    figures = [row for row in figures if row.case in known]
    groups = defaultdict(list)
    for row in figures:
        groups[row.slug, row.mode, row.family].append(row)
    drawn = [_draw_family(rows, directory / plot_name(*key)) for key, rows in groups.items()]
    rows = headline.of_processor(figures)
    return [*drawn, _draw_headline(rows, directory / HEADLINE_PLOT)] if rows else drawn


def _draw_headline(rows: list[headline.Row], path: Path) -> Path:
    """A line an operation: bars of the times, and beside them bars of the memory, each to its own scale."""
    picture = Picture(figsize=(WIDTH, 0.5 + 0.95 * len(rows)), **PICTURE)
    grid = picture.subplots(len(rows), 2, squeeze=False, width_ratios=(1.7, 1))
    for row, (times, memory) in zip(rows, grid, strict=True):
        figures = (row.eager, row.compiled, row.fastvae)
        _draw_bars(times, [figure.median_ms for figure in figures], [_time_label(figure) for figure in figures])
        sizes = [figure.peak_memory_mb for figure in figures]
        _draw_bars(memory, sizes, [units.memory(size) for size in sizes])
        times.text(-0.03, 0.66, row.title, transform=times.transAxes, ha="right", va="bottom", fontsize=10, weight="bold")
        conditions = row.conditions.replace(": ", "\n")
        times.text(-0.03, 0.6, conditions, transform=times.transAxes, ha="right", va="top", fontsize=7.5, color=GREY)
    grid[0][0].set_title("time", fontsize=10, loc="left")
    grid[0][1].set_title("peak memory", fontsize=10, loc="left")
    handles = grid[0][0].containers[0].patches
    picture.legend(handles, list(BARS), loc="outside lower center", ncols=len(BARS), fontsize=9, frameon=False)
    picture.savefig(path)
    return path


def _time_label(figure: Figure) -> str:
    time = units.time(figure.median_ms)
    return time if figure.provider == OURS else f"{time} ({units.ratio(figure.ratio)})"


def _draw_bars(axes, values: list[float], labels: list[str]) -> None:
    places = range(len(values))
    bars = axes.barh(places, values, height=0.82, color=list(BARS.values()))
    for text, name in zip(axes.bar_label(bars, labels, padding=4, fontsize=8.5), BARS, strict=True):
        text.set_weight("bold" if name == OURS else "normal")
    axes.set_xlim(0, 1.45 * max(values))
    axes.invert_yaxis()
    axes.set_axis_off()


def _draw_family(rows: list[Figure], path: Path) -> Path:
    """A line a case, and on it a marker for each provider."""
    present = {row.case for row in rows}
    lines = [case.id for case in registry.cases(rows[0].family) if case.id in present]
    picture = Picture(figsize=(WIDTH, 1.6 + 0.36 * len(lines)), **PICTURE)
    axes = picture.add_subplot()
    for place, case in enumerate(lines):
        ratios = [row.ratio for row in rows if row.case == case]
        axes.plot([min(ratios), max(ratios)], [place, place], color="#d0d7de", linewidth=2, zorder=1)
    for name, (colour, marker) in _styles(rows).items():
        found = [(row.ratio, lines.index(row.case)) for row in rows if row.provider == name]
        axes.scatter(*zip(*found, strict=True), color=colour, marker=marker, s=44, label=name, zorder=3 if name == OURS else 2)
    _label(axes, rows, lines)
    providers = len(axes.collections)
    picture.legend(loc="outside lower center", ncols=math.ceil(providers / math.ceil(providers / 5)), fontsize=8, frameon=False)
    picture.savefig(path)
    return path


def _styles(rows: list[Figure]) -> dict[str, tuple[str, str]]:
    """The providers that have results."""
    present = {row.provider for row in rows}
    others = zip(sorted(present - set(STYLES)), itertools.cycle(OTHER_STYLES), strict=False)
    return {name: style for name, style in STYLES.items() if name in present} | dict(others)


def _label(axes, rows: list[Figure], lines: list[str]) -> None:
    ours = {row.case: units.time(row.median_ms) for row in rows if row.provider == OURS}
    axes.set_yticks(range(len(lines)), lines, fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xscale("log")
    ratios = [row.ratio for row in rows]
    subs = (1, 2, 5) if max(ratios) > 40 * min(ratios) else (1, 1.5, 2, 3, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=40))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}x"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.06)
    axes.tick_params(axis="x", labelsize=8)
    axes.axvline(1, color=OUR_COLOUR, linewidth=0.8, zorder=0)
    axes.grid(axis="x", color="#eaeef2", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    beside = axes.secondary_yaxis("right")
    beside.set_yticks(range(len(lines)), [ours.get(case, "") for case in lines], fontsize=8, color=OUR_COLOUR)
    beside.tick_params(length=0)
    beside.spines["right"].set_visible(False)
    axes.set_xlabel("median time relative to fastvae, whose own is on the right (logarithmic)", fontsize=8)
    axes.set_title(f"{rows[0].family}: {describe_processor(rows[0])}{MODES[rows[0].mode]}", fontsize=10)
