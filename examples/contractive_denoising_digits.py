"""A contractive and a denoising autoencoder beside a plain one on real digits: what they reconstruct, and how far the code moves.

    python examples/contractive_denoising_digits.py [--epochs 30] [--out out]

Writes denoising.png, sensitivity.png and contractive_denoising.json.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from fastvae import functional as FV
from fastvae.models import AE, ContractiveAE, DenoisingAE
from fastvae.training.datasets import MNISTDigits

NOISE, CODE, LEARNING_RATE = 0.3, 256, 5e-3
LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def make_models() -> dict[str, AE]:
    def make(kind: type[AE], **options) -> AE:
        torch.manual_seed(0)
        return kind.mlp(hidden=(), latent_dim=CODE, code="sigmoid", **options)

    return {"plain": make(AE), "contractive": make(ContractiveAE, weight=1.0), "denoising": make(DenoisingAE)}


def train(model: AE, images: Tensor, epochs: int, name: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    torch.manual_seed(0)
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            model(images[batch]).loss.backward()
            optimizer.step()


def add_noise(images: Tensor, sigma: float) -> Tensor:
    return images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def evaluate(model: AE, images: Tensor) -> dict[str, object]:
    """Errors per pixel from clean and noisy images, the Jacobian's norm, and how far noise moves the code in units of its spread."""
    codes = model.encode(images)
    spread = (codes - codes.mean(0)).square().sum(1).mean()
    moved = [((model.encode(add_noise(images, sigma)) - codes).square().sum(1).mean() / spread).sqrt().item() for sigma in LEVELS]
    return {
        "error": (model.reconstruct(images) - images).square().mean().item(),
        "error from noisy images": (model.reconstruct(add_noise(images, NOISE)) - images).square().mean().item(),
        "squared norm of the Jacobian": FV.jacobian_frobenius(model.encoder, images).item(),
        "relative distance that noise moves the code": dict(zip(map(str, LEVELS), moved, strict=True)),
    }


def draw_reconstructions(path: Path, models: dict[str, AE], images: Tensor) -> None:
    noisy = add_noise(images, NOISE)
    rows = {"clean": images, f"noise {NOISE}": noisy} | {name: model.reconstruct(noisy) for name, model in models.items()}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(len(images), 1.1 * len(rows)), squeeze=False)
    for row, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_sensitivity(path: Path, report: dict[str, dict]) -> None:
    figure, axis = plt.subplots(figsize=(5, 3.5))
    for name, values in report.items():
        axis.plot(LEVELS, list(values["relative distance that noise moves the code"].values()), marker="o", label=name)
    axis.set(xlabel="standard deviation of the noise", ylabel="distance between codes / spread of codes")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = MNISTDigits(val=0.0)
    train_images, test_images = digits.samples("train")["x"] / 255, digits.samples("test")["x"] / 255
    models, report = make_models(), {}
    for name, model in models.items():
        train(model, train_images, arguments.epochs, name)
        report[name] = evaluate(model, test_images)
        print(name, json.dumps(report[name], indent=2))
    (arguments.out / "contractive_denoising.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_reconstructions(arguments.out / "denoising.png", models, test_images[:10])
    draw_sensitivity(arguments.out / "sensitivity.png", report)


if __name__ == "__main__":
    main()
