"""Draws the plots and writes the README's tables: ``python -m benchmarks.report [--check | --floors]``."""

import argparse
import sys
from pathlib import Path

from benchmarks import floors, plots, results, tables

README = Path(__file__).parent.parent / "README.md"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description="Draws plots and writes the README's tables.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="writes nothing; exit status 1 where the README's tables are stale")
    modes.add_argument("--floors", action="store_true", help="holds the figures against floors.toml; exit status 1 where one falls short")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    figures = results.newest(results.read_all())
    if arguments.floors:
        return hold_against_floors(figures)
    text = tables.tables(figures)
    if arguments.check:
        stale = tables.is_stale(README, text)
        print(f"{README.name}: the tables are {'stale: run python -m benchmarks.report' if stale else 'up to date'}")
        return int(stale)
    tables.write(README, text)
    pictures = plots.draw(figures, results.DIRECTORY)
    print(f"{README.name}: tables written from {len(figures)} figures; {len(pictures)} pictures in {results.DIRECTORY}")
    return 0


def hold_against_floors(figures: list[results.Figure]) -> int:
    verdicts = floors.judge(figures, floors.load())
    print("\n".join(map(str, verdicts)))
    short = [verdict for verdict in verdicts if verdict.falls_short]
    unmeasured = sum(verdict.measured is None for verdict in verdicts)
    print(f"{len(verdicts)} floors: {len(short)} fall short, {unmeasured} not measured")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
