"""Pictures of a demonstration."""

import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.training import latents
from fastvae.training.experiment import Experiment
from fastvae.training.headline import verdict

COLORS = {"plain": "tab:gray", "fastvae": "tab:blue"}
LABELS = {"plain": "plain torch", "fastvae": "fastvae"}


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)


def mosaic(images: Tensor, columns: int, gap: int = 0) -> Tensor:
    """Images ``(count, 1, height, width)`` as one picture, row by row, with white between them."""
    tiles = F.pad(images[:, 0].float(), (gap,) * 4, value=1.0)
    rows = tiles.unflatten(0, (-1, columns))
    return rows.permute(0, 2, 1, 3).flatten(0, 1).flatten(1, 2)


def show(axes: Axes, picture: Tensor, title: str = "") -> None:
    axes.imshow(picture.numpy(), cmap="gray", vmin=0, vmax=1)
    axes.set_title(title)
    axes.set_xticks([])
    axes.set_yticks([])


def reconstructions(path: Path, experiments: list[Experiment], x: Tensor, report: dict, columns: int = 20) -> None:
    x = x[:columns]
    rows = {"original": x / 255}
    for experiment in experiments:
        error = report["models"][experiment.name]["test"]["mse_per_pixel_mean_z"]
        rows[f"{experiment.name}\nMSE {error:.4f}"] = latents.reconstruct(experiment.lit, x)
    figure = Figure(figsize=(14, 0.95 * len(rows) + 0.5), layout="constrained")
    figure.suptitle("Held-out digits and their reconstructions from the mean z")
    for axes, (name, images) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        show(axes, mosaic(images, columns, gap=1))
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, path)


def samples(path: Path, experiments: list[Experiment], seed: int, columns: int = 12) -> None:
    figure = Figure(figsize=(6 * len(experiments), 6.4), layout="constrained")
    figure.suptitle("Means of p(x | z) for z drawn from the prior")
    for axes, experiment in zip(figure.subplots(1, len(experiments)), experiments, strict=True):
        show(axes, mosaic(latents.sample(experiment.lit, columns**2, seed), columns, gap=1), experiment.name)
    save(figure, path)


def latent_scatter(path: Path, experiment: Experiment, test: dict[str, Any]) -> None:
    (mu,) = latents.encode(experiment.lit, test["x"])
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots()
    points = axes.scatter(mu[:, 0], mu[:, 1], c=test["label"], cmap="tab10", vmin=-0.5, vmax=9.5, s=14, alpha=0.8, linewidths=0)
    figure.colorbar(points, ticks=range(10), label="digit")
    axes.set(title=f"{experiment.name}: posterior means of {len(mu):,} held-out digits", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    axes.grid(alpha=0.3)
    save(figure, path)


def manifold(path: Path, experiment: Experiment, size: int = 20) -> None:
    """Decodes the quantiles of the prior, so that each part of the picture is equally probable."""
    quantiles = torch.special.ndtri(torch.linspace(0.025, 0.975, size))
    # Rows run downwards, z_2 upwards.
    second, first = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    images = latents.decode(experiment.lit, torch.stack([first.flatten(), second.flatten()], dim=1))
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    show(axes, mosaic(images, size), f"{experiment.name}: the decoded plane, at quantiles of the prior")
    chosen = torch.linspace(0, size - 1, 8).round().long()
    centers = (chosen + 0.5) * images.shape[-1]
    axes.set_xticks(centers, [f"{v:.1f}" for v in quantiles[chosen]])
    axes.set_yticks(centers, [f"{v:.1f}" for v in quantiles.flip(0)[chosen]])
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    save(figure, path)


def loss_curves(path: Path, experiments: list[Experiment]) -> None:
    figure = Figure(figsize=(15, 3.6 * len(experiments)), layout="constrained")
    for (compared, difference, whole), experiment in zip(figure.subplots(len(experiments), 3), experiments, strict=True):
        _compared_losses(compared, experiment)
        _differences(difference, experiment)
        _whole_training(whole, experiment)
    save(figure, path)


def _compared_losses(axes: Axes, experiment: Experiment) -> None:
    for (name, contender), (width, opacity) in zip(experiment.contenders.items(), ((4.0, 0.5), (1.2, 1.0)), strict=True):
        steps = range(1, len(contender.losses) + 1)
        axes.plot(steps, contender.losses, color=COLORS[name], label=LABELS[name], lw=width, alpha=opacity)
    axes.set(title=f"{experiment.name}: same weights, batches, noise", xlabel="step, in float64", ylabel="loss (nats per sample)")
    axes.legend()
    axes.grid(alpha=0.3)


def _differences(axes: Axes, experiment: Experiment) -> None:
    differences = experiment.differences()
    axes.plot(range(1, len(differences) + 1), differences, ".", color=COLORS["fastvae"])
    # Losses that are equal to the bit lie on the axis.
    axes.set_yscale("symlog", linthresh=1e-17)
    axes.set_yticks([0, 1e-16, 1e-12, 1e-8, 1e-4, 1])
    axes.axhline(torch.finfo(torch.float64).eps, color="tab:red", lw=1, ls="--", label="machine epsilon")
    axes.set(title="relative difference of the two losses", xlabel="step, in float64", ylim=(0, 1))
    axes.legend(loc="upper right")
    axes.grid(alpha=0.3)


def _whole_training(axes: Axes, experiment: Experiment) -> None:
    losses, validations = torch.stack(experiment.history.steps), experiment.history.validations
    axes.plot(range(1, len(losses) + 1), losses, color=COLORS["fastvae"], lw=0.7, alpha=0.7, label="training batch")
    axes.plot(list(validations), list(validations.values()), "o-", color="tab:orange", ms=3, label="validation digits")
    # The first steps, which the first column shows, would flatten the rest.
    axes.set_ylim(top=1.2 * float(losses[len(losses) // 10]))
    axes.set(title=f"{experiment.name}: the whole training", xlabel="step", ylabel="negative ELBO (nats per sample)")
    axes.legend()
    axes.grid(alpha=0.3)


def headline(path: Path, report: dict) -> None:
    """A column for each piece of work: bars of its time above, of its peak memory below."""
    pairs = report["headline"]
    figure = Figure(figsize=(3.5 * len(pairs), 7.5), layout="constrained")
    figure.suptitle(f"Plain torch and fastvae on a CPU, threads: {report['environment']['threads']}. Lower is better.", fontsize=15)
    rows = (("median_ms", "time", "ms", "faster"), ("peak_memory_mib", "peak memory", "MiB", "less"))
    for row, (key, name, unit, gain) in zip(figure.subplots(2, len(pairs)), rows, strict=True):
        for axes, (title, figures) in zip(row, pairs.items(), strict=True):
            _bars(axes, figures[key], [figures["plain"], LABELS["fastvae"]], unit)
            axes.text(0.5, 1.0, verdict(figures[key], gain), transform=axes.transAxes, ha="center", fontsize=15, weight="bold")
            axes.set_title(f"{title}\n{figures['conditions']}\n" if key == "median_ms" else "\n", fontsize=10)
        row[0].set_ylabel(name, fontsize=13)
    save(figure, path)


def _bars(axes: Axes, values: dict[str, float], labels: list[str], unit: str) -> None:
    lines = [textwrap.fill(label, 16) for label in labels]
    bars = axes.bar(lines, list(values.values()), color=[COLORS[name] for name in values], width=0.6)
    axes.bar_label(bars, [f"{value:.3g} {unit}" for value in values.values()], padding=2)
    axes.margins(y=0.15)
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
