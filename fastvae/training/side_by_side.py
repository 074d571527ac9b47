"""``fastvae compare``: the evaluations of several checkpoints side by side, as a table and as one page of pictures."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from fastvae._extras import extra
from fastvae.training import checkpoints, cli, pictures
from fastvae.training.callbacks import draw_pictures
from fastvae.training.errors import TrainingError, writing
from fastvae.training.evaluation import result_path
from fastvae.training.module import labels_of

with extra("train"):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

# What has to be equal for figures to be comparable.
CONDITIONS = ("data", "data_options", "split", "samples", "binarization", "bound_draws", "bound_samples", "features", "train_samples")
KINDS = ("reconstructions", "samples", "traversals")
IMAGES = 6


class Run(NamedTuple):
    """A checkpoint and its evaluation."""

    name: str
    checkpoint: Path
    metrics: dict[str, float]
    settings: dict[str, Any]


def compare(checkpoints: list[Path], out: Path = Path("out")) -> None:
    """Sets the evaluations of checkpoints side by side: comparison.md, comparison.json and comparison.png.

    The page shows reconstructions, samples and traversals of each, and for VAEs the rate against the distortion.

    Args:
        checkpoints: files that fastvae fit wrote; those that fastvae test has not evaluated are evaluated with its default options.
        out: folder of the results.
    """
    if not checkpoints:
        raise TrainingError("checkpoints: got none, takes at least one")
    runs = [read_run(path) for path in checkpoints]
    text = as_markdown(runs)
    with writing(out / "comparison.md"):
        out.mkdir(parents=True, exist_ok=True)
        (out / "comparison.md").write_text(text)
        content = {run.name: {"metrics": run.metrics, "settings": run.settings} for run in runs}
        (out / "comparison.json").write_text(json.dumps(content, indent=2) + "\n")
    print(text, end="")
    draw_page(runs, out / "comparison.png")
    print(out / "comparison.png")


def read_run(checkpoint: Path) -> Run:
    """A checkpoint with the figures of its last evaluation."""
    path = result_path(checkpoint)
    if not path.is_file():
        cli.main(["test", str(checkpoint), "--trainer.logger=false"])
    content = json.loads(path.read_text())
    return Run(str(checkpoint), checkpoint, content["metrics"], content["settings"])


def as_markdown(runs: list[Run]) -> str:
    """A table with a row a metric and a column a checkpoint, and the settings in which they differ."""
    names = list(dict.fromkeys(name for run in runs for name in run.metrics))
    header = ["metric", *(f"{run.settings['network']} ({chr(ord('A') + index)})" for index, run in enumerate(runs))]
    rows = [[name, *(f"{run.metrics[name]:.5g}" if name in run.metrics else "" for run in runs)] for name in names]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    lines += ["", *(f"{chr(ord('A') + index)}: {run.name}" for index, run in enumerate(runs))]
    differing = [name for name in CONDITIONS if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)]
    if differing:
        lines += ["", f"Not of the same {', '.join(differing)}: their figures are not comparable."]
    return "\n".join(lines) + "\n"


def draw_page(runs: list[Run], path: Path) -> None:
    """A row of pictures for each run, and a last row with rate against distortion."""
    points = rate_and_distortion(runs)
    figure = Figure(figsize=(4 * len(KINDS), 4 * (len(runs) + bool(points))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(runs) + bool(points), len(KINDS), squeeze=False)
    for row, run in zip(axes, runs, strict=False):
        drawn = _pictures_of(run)
        row[0].set_ylabel(run.settings["network"])
        for axis, kind in zip(row, KINDS, strict=True):
            axis.set(xticks=[], yticks=[], title=kind if row is axes[0] else "")
            if kind in drawn:
                axis.imshow(drawn[kind].movedim(0, -1).squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255)
            else:
                axis.set_frame_on(False)
    if points:
        _draw_rates(axes[-1], points)
    with writing(path):
        figure.savefig(path, dpi=100)


def _pictures_of(run: Run) -> dict[str, Any]:
    lit = checkpoints.load(run.checkpoint)
    batch = checkpoints.build_data(lit.data_name, lit.data_options).samples("test", IMAGES)
    return draw_pictures(lit, batch["x"], *labels_of(batch, lit.network)) if pictures.are_images(batch["x"]) else {}


def rate_and_distortion(runs: list[Run]) -> list[tuple[str, float, float]]:
    """Of each run with a KL, where several have one: the network, the KL in bits a dimension of the data, and the mean squared error."""
    found = (run for run in runs if {"kl", "MSE"} <= run.metrics.keys())
    return [(run.settings["network"], run.metrics["kl"] / (run.settings["elements"] * math.log(2)), run.metrics["MSE"]) for run in found]


def _draw_rates(row: Any, points: list[tuple[str, float, float]]) -> None:
    axis, *unused = row
    for name, rate, distortion in points:
        axis.scatter([rate], [distortion])
        axis.annotate(name, (rate, distortion))
    axis.set(xlabel="rate: KL, bits/dim", ylabel="distortion: MSE")
    for other in unused:
        other.set_axis_off()
