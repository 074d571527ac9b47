"""Draws the plots and writes the tables of the README and of pages of docs: ``python -m benchmarks.report [--check | --floors]``."""

import argparse
import sys
from pathlib import Path

from benchmarks import floors, largest_batch, plots, published_figures, results, tables
from benchmarks.devices import Cpu

ROOT = Path(__file__).parent.parent
# Each document with what writes the text between its marks.
DOCUMENTS = {
    ROOT / "README.md": tables.readme_section,
    ROOT / "docs" / "benchmarks.md": tables.page,
    ROOT / "docs" / "models.md": tables.model_steps,
    ROOT / "docs" / "evaluation.md": lambda figures: published_figures.page(),
    ROOT / "docs" / "conv_vaes.md": lambda figures: largest_batch.page(),
}
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks.report", description="Draws plots and writes the tables of the documentation.")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--check", action="store_true", help="writes nothing; exit status 1 where a table is stale")
    modes.add_argument("--floors", action="store_true", help="holds the figures against floors.toml; exit status 1 where one falls short")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    figures = results.newest(results.read_all())
    if arguments.floors:
        return hold_against_floors(figures)
    written = {path: inserted(path.read_text(), write(figures)) for path, write in DOCUMENTS.items()}
    stale = [path for path, text in written.items() if path.read_text() != text]
    if arguments.check:
        names = ", ".join(path.name for path in stale)
        print(f"Stale: {names}. Run python -m benchmarks.report." if stale else "The tables are up to date.")
        return int(bool(stale))
    for path in stale:
        path.write_text(written[path])
    pictures = plots.draw(figures, results.DIRECTORY)
    print(f"{len(figures)} figures in the tables, {len(pictures)} pictures in {results.DIRECTORY}")
    return 0


def inserted(document: str, text: str) -> str:
    """The document with ``text`` between the two marks."""
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"takes a document with the lines {BEGIN} and {END}, once each")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def hold_against_floors(figures: list[results.Figure]) -> int:
    verdicts = floors.judge(figures, floors.load(), Cpu())
    print("\n".join(map(str, verdicts)))
    short = [verdict for verdict in verdicts if verdict.falls_short]
    missing = [verdict for verdict in verdicts if verdict.missing]
    unmeasured = sum(verdict.measured is None and not verdict.missing for verdict in verdicts)
    print(f"{len(verdicts)} floors: {len(short)} fall short, {len(missing)} do not apply, {unmeasured} not measured")
    return int(bool(short))


if __name__ == "__main__":
    sys.exit(main())
