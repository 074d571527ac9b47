"""Pictures of a demonstration."""

from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastvae.training.data import Split
from fastvae.training.loop import Training

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


def reconstructions(path: Path, trainings: list[Training], split: Split, report: dict, columns: int = 20) -> None:
    x = split.test_images[:columns]
    rows = {"original": x / 255}
    for training in trainings:
        error = report["models"][training.name]["test"]["mse_per_pixel_mean_z"]
        rows[f"{training.name}\nMSE {error:.4f}"] = training.model.reconstruct(x)
    figure = Figure(figsize=(14, 0.95 * len(rows) + 0.5), layout="constrained")
    figure.suptitle("Held-out digits and their reconstructions from the mean z")
    for axes, (name, images) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        show(axes, mosaic(images, columns, gap=1))
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
    save(figure, path)


def samples(path: Path, trainings: list[Training], seed: int, columns: int = 12) -> None:
    figure = Figure(figsize=(6 * len(trainings), 6.4), layout="constrained")
    figure.suptitle("Means of p(x | z) for z drawn from the prior")
    for axes, training in zip(figure.subplots(1, len(trainings)), trainings, strict=True):
        generator = torch.Generator().manual_seed(seed)
        show(axes, mosaic(training.model.sample(columns**2, generator), columns, gap=1), training.name)
    save(figure, path)


@torch.no_grad()
def latent_scatter(path: Path, training: Training, split: Split) -> None:
    mu = training.model.encode(split.test_images)[0]
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    axes = figure.subplots()
    points = axes.scatter(mu[:, 0], mu[:, 1], c=split.test_labels, cmap="tab10", vmin=-0.5, vmax=9.5, s=14, alpha=0.8, linewidths=0)
    figure.colorbar(points, ticks=range(10), label="digit")
    axes.set(title=f"{training.name}: posterior means of {len(mu):,} held-out digits", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
    axes.grid(alpha=0.3)
    save(figure, path)


@torch.no_grad()
def manifold(path: Path, training: Training, size: int = 20) -> None:
    """Decodes the quantiles of the prior, so that each part of the picture is equally probable."""
    quantiles = torch.special.ndtri(torch.linspace(0.025, 0.975, size))
    # Rows run downwards, z_2 upwards.
    second, first = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    images = training.model.decode_mean(torch.stack([first.flatten(), second.flatten()], dim=1))
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots()
    show(axes, mosaic(images, size), f"{training.name}: the decoded plane, at quantiles of the prior")
    chosen = torch.linspace(0, size - 1, 8).round().long()
    centers = (chosen + 0.5) * images.shape[-1]
    axes.set_xticks(centers, [f"{v:.1f}" for v in quantiles[chosen]])
    axes.set_yticks(centers, [f"{v:.1f}" for v in quantiles.flip(0)[chosen]])
    axes.set(xlabel="$z_1$", ylabel="$z_2$")
    save(figure, path)


def loss_curves(path: Path, trainings: list[Training]) -> None:
    figure = Figure(figsize=(15, 3.6 * len(trainings)), layout="constrained")
    for (compared, difference, whole), training in zip(figure.subplots(len(trainings), 3), trainings, strict=True):
        _compared_losses(compared, training)
        _differences(difference, training)
        _whole_training(whole, training)
    save(figure, path)


def _compared_losses(axes: Axes, training: Training) -> None:
    for (name, contender), (width, opacity) in zip(training.contenders.items(), ((4.0, 0.5), (1.2, 1.0)), strict=True):
        losses = contender.losses[: training.compared_steps]
        axes.plot(range(1, len(losses) + 1), losses, color=COLORS[name], label=LABELS[name], lw=width, alpha=opacity)
    axes.set(title=f"{training.name}: same weights, batches, noise", xlabel="step", ylabel="loss (nats per sample)")
    axes.legend()
    axes.grid(alpha=0.3)


def _differences(axes: Axes, training: Training) -> None:
    for (dtype, differences), color in zip(training.differences().items(), ("tab:blue", "tab:green"), strict=True):
        axes.plot(range(1, len(differences) + 1), differences, ".", color=color, label=f"trained in {dtype}")
    # Losses that are equal to the bit lie on the axis.
    axes.set_yscale("symlog", linthresh=1e-17)
    axes.set_yticks([0, 1e-16, 1e-12, 1e-8, 1e-4, 1])
    axes.axhline(1e-3, color="tab:red", lw=1, ls="--", label="1e-3")
    axes.set(title="relative difference of the two losses", xlabel="step", ylim=(0, 1))
    axes.legend(ncols=3, loc="upper center", fontsize="small")
    axes.grid(alpha=0.3)


def _whole_training(axes: Axes, training: Training) -> None:
    steps = len(training.losses)
    axes.plot(range(1, steps + 1), training.losses, color=COLORS["fastvae"], lw=0.7, alpha=0.7, label="training batch")
    axes.plot(list(training.test_losses), list(training.test_losses.values()), "o-", color="tab:orange", ms=3, label="held-out digits")
    # The first steps, which the first column shows, would flatten the rest.
    axes.set_ylim(top=1.2 * training.losses[steps // 10])
    axes.set(title=f"{training.name}: the whole training", xlabel="step", ylabel="negative ELBO (nats per sample)")
    axes.legend()
    axes.grid(alpha=0.3)


def times(path: Path, report: dict) -> None:
    parts = {f"{name}\na training step": model["comparison"] for name, model in report["models"].items() if "comparison" in model}
    parts["loss lines alone\nforward and backward"] = report["loss_lines"]
    figure = Figure(figsize=(3.6 * len(parts), 6.5), layout="constrained")
    figure.suptitle(f"Batches of {report['settings']['batch_size']}, {report['environment']['threads']} threads: lower is better")
    rows = (("median_ms", "median time (ms)", "%.2f"), ("peak_memory_kib", "peak memory (KiB)", "%.0f"))
    for row, (key, label, number) in zip(figure.subplots(2, len(parts)), rows, strict=True):
        for axes, (title, figures) in zip(row, parts.items(), strict=True):
            names = list(figures[key])
            bars = axes.bar([LABELS[n] for n in names], [figures[key][n] for n in names], color=[COLORS[n] for n in names], width=0.6)
            axes.bar_label(bars, fmt=number)
            axes.margins(y=0.15)
            axes.set_title(title if key == "median_ms" else "")
        row[0].set_ylabel(label)
    save(figure, path)
