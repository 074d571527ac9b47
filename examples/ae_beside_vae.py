"""An autoencoder beside a VAE with the same network: where their latents lie, what random codes decode to, and how exact they are.

    python examples/ae_beside_vae.py [--epochs 10] [--out out]

Writes ae_beside_vae.png (latent scatter of two-dimensional latents, samples from random codes, interpolations) and ae_beside_vae.json (the
error of reconstructions of test digits, and how far the latents are from a standard normal).
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

from fastvae.models import AE, VAE
from fastvae.training.datasets import MNISTDigits

DIM, COLUMNS = 2, 10


def train(model: AE | VAE, images: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(epochs), desc=type(model).__name__, unit="epoch"):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            model(images[batch]).loss.backward()
            optimizer.step()


@torch.no_grad()
def latents(model: AE | VAE, images: Tensor) -> Tensor:
    encoded = model.encode(images)
    return encoded if isinstance(encoded, Tensor) else encoded.mean


@torch.no_grad()
def decoded(model: AE | VAE, z: Tensor) -> Tensor:
    return model.decode_mean(z) if isinstance(model, VAE) else model.decode(z)


def summarise(model: AE | VAE, images: Tensor) -> dict[str, float]:
    z = latents(model, images)
    return {
        "squared error per pixel": (model.reconstruct(images) - images).square().mean().item(),
        "distance of the latents' mean from 0": z.mean(0).norm().item(),
        "standard deviation of a latent": z.std(0).mean().item(),
    }


def in_a_row(images: Tensor) -> Tensor:
    """``(count, 1, height, width)`` as one picture."""
    return torch.cat(list(images[:, 0]), dim=1)


def draw(path: Path, models: dict[str, AE | VAE], images: Tensor, labels: Tensor) -> None:
    codes = torch.randn(2 * COLUMNS, DIM, generator=torch.Generator().manual_seed(0))
    weights = torch.linspace(0, 1, COLUMNS).unsqueeze(1)
    figure, axes = plt.subplots(4, len(models), figsize=(6 * len(models), 9), height_ratios=(5, 2, 2, 1.5))
    for column, (name, model) in enumerate(models.items()):
        z = latents(model, images)
        ends = [(z[2 * row], z[2 * row + 1]) for row in range(2)]
        samples = decoded(model, codes).split(COLUMNS)
        paths = [decoded(model, torch.lerp(first, last, weights)) for first, last in ends]
        pairs = images[:COLUMNS], model.reconstruct(images[:COLUMNS])
        axes[0][column].scatter(*z.T, c=labels, cmap="tab10", s=3)
        axes[0][column].set_title(f"{name}: latents of test digits")
        for row, (title, pictures) in enumerate(
            (("random codes", samples), ("interpolations", paths), ("digits and reconstructions", pairs))
        ):
            axis = axes[row + 1][column]
            axis.imshow(torch.cat([in_a_row(picture) for picture in pictures]), cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[], title=title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = MNISTDigits(val=0.0)
    train_images = digits.samples("train")["x"].float() / 255
    test = digits.samples("test")
    images, labels = test["x"].float() / 255, test["label"]
    torch.manual_seed(0)
    models = {
        "autoencoder": AE.conv(latent_dim=DIM, output="identity", recon_loss="bce_with_logits"),
        "VAE": VAE.conv(latent_dim=DIM),
    }
    for model in models.values():
        train(model, train_images, arguments.epochs)
    report = {name: summarise(model, images) for name, model in models.items()}
    for name, values in report.items():
        print(name, {key: round(value, 4) for key, value in values.items()})
    (arguments.out / "ae_beside_vae.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(arguments.out / "ae_beside_vae.png", models, images, labels)


if __name__ == "__main__":
    main()
