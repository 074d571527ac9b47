"""The pictures of the figures: for each device, mode and family the time of every provider relative to fastvae."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure as Picture

from benchmarks.registry import OURS
from benchmarks.results import Figure
from benchmarks.tables import describe_device, plot_name

COLOURS = ("#7f7f7f", "#1f77b4", "#9467bd", "#2ca02c", "#8c564b", "#17becf", "#bcbd22")
OUR_COLOUR = "#d62728"
# Beyond this ratio the axis is logarithmic.
LINEAR_UP_TO = 25


def draw(figures: Iterable[Figure], directory: Path) -> list[Path]:
    """Draws all pictures and returns where they are."""
    groups = defaultdict(list)
    for row in figures:
        groups[row.slug, row.mode, row.family].append(row)
    return [_draw(rows, directory / plot_name(*key)) for key, rows in groups.items()]


def _draw(rows: list[Figure], path: Path) -> Path:
    """Bars in the order of the cases, an empty place between two cases."""
    rows = sorted(rows, key=lambda row: (row.case, row.provider == OURS))
    cases = list(dict.fromkeys(row.case for row in rows))
    places = [index + cases.index(row.case) for index, row in enumerate(rows)]
    providers = sorted({row.provider for row in rows}, key=lambda name: (name == OURS, name))
    colours = dict(zip(providers, COLOURS, strict=False)) | {OURS: OUR_COLOUR}

    picture = Picture(figsize=(9, 1.4 + 0.26 * (len(rows) + len(cases))), layout="constrained")
    axes = picture.add_subplot()
    for name in providers:
        bars = [(place, row) for place, row in zip(places, rows, strict=True) if row.provider == name]
        _draw_provider(axes, name, bars, colours[name])
    middles = [_middle(places, rows, case) for case in cases]
    axes.set_yticks(middles, cases, fontsize=8)
    axes.invert_yaxis()
    _label(axes, rows)
    picture.legend(loc="outside lower center", ncols=len(providers), fontsize=8)
    picture.savefig(path, dpi=120)
    return path


def _draw_provider(axes, name: str, bars: list[tuple[int, Figure]], colour: str) -> None:
    places, rows = zip(*bars, strict=True)
    ratios = [row.ratio for row in rows]
    # In units of the median of fastvae.
    low = [row.ratio * (1 - row.p20_ms / row.median_ms) for row in rows]
    high = [row.ratio * (row.p80_ms / row.median_ms - 1) for row in rows]
    drawn = axes.barh(places, ratios, height=0.9, xerr=(low, high), color=colour, label=name, error_kw={"elinewidth": 1, "capsize": 2})
    axes.bar_label(drawn, labels=[f" {ratio:.3g}x" for ratio in ratios], fontsize=8)


def _middle(places: list[int], rows: list[Figure], case: str) -> float:
    of_case = [place for place, row in zip(places, rows, strict=True) if row.case == case]
    return sum(of_case) / len(of_case)


def _label(axes, rows: list[Figure]) -> None:
    if max(row.ratio for row in rows) > LINEAR_UP_TO:
        axes.set_xscale("log")
    axes.axvline(1, color=OUR_COLOUR, linewidth=0.8)
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel("time relative to fastvae (median; whiskers: 20th and 80th percentiles)", fontsize=9)
    axes.set_title(f"{rows[0].family}: {describe_device(rows[0])}", fontsize=10)
