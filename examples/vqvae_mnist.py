"""Trains a VQ-VAE on real digits and one on patches of photographs; draws reconstructions and how much of the codebook is used.

    python examples/vqvae_mnist.py [--out out] [--epochs 10] [--save-latents FOLDER]

``--save-latents`` also writes each trained codebook and some encodings, vectors with the structure that random data lacks: the benchmarks
read them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from fastvae.models import VQVAE
from fastvae.training.datasets import MNISTDigits

PATCH = 32
BATCH = 64
TEST_IMAGES = 64
SAVED_ENCODINGS = 8192


def digits() -> tuple[Tensor, Tensor]:
    """8-bit digits (count, 1, 28, 28) for training and testing."""
    data = MNISTDigits(val=0.0)
    return data.samples("train")["x"], data.samples("test")["x"]


def patches() -> tuple[Tensor, Tensor]:
    """8-bit patches (count, 3, 32, 32) of scikit-learn's two photographs; the test patches are a strip at the right of each."""
    train, test = [], []
    for photograph in load_sample_images().images:
        image = torch.tensor(photograph).movedim(-1, 0)
        cut = image.unfold(1, PATCH, PATCH // 2).unfold(2, PATCH, PATCH // 2).movedim(0, 2)
        train.append(cut[:, :-4].flatten(0, 1))
        test.append(cut[:, -2:].flatten(0, 1))
    return torch.cat(train), torch.cat(test)


def train(images: Tensor, epochs: int, seed: int = 0) -> tuple[VQVAE, dict[str, list[float]]]:
    """A VQ-VAE and its curves, a point an epoch."""
    torch.manual_seed(seed)
    variance = (images.float() / 255).var().item()
    model = VQVAE.conv(
        images.shape[1], num_codes=512, dim=64, channels=64, data_variance=variance, decay=0.9, kmeans_iters=5, revive_below=1.0
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    curves = {"recon_loss": [], "perplexity": [], "usage": []}
    for _ in tqdm(range(epochs), unit="epoch"):
        outputs = []
        for batch in torch.randperm(len(images)).split(BATCH):
            output = model(images[batch])
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
            outputs.append(torch.stack([output.recon_loss.detach(), output.perplexity, output.usage]))
        for curve, value in zip(curves.values(), torch.stack(outputs).mean(0).tolist(), strict=True):
            curve.append(value)
    return model.eval(), curves


def draw_reconstructions(path: Path, images: Tensor, recon: Tensor) -> None:
    """The first images above what became of them."""
    rows = torch.stack([images[:10].float() / 255, recon[:10].clamp(0, 1)])
    picture = torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2).movedim(0, -1).squeeze(-1)
    figure, axes = plt.subplots(figsize=(10, 2.2))
    axes.imshow(picture, cmap="gray")
    axes.set_axis_off()
    axes.set_title("above: test images, below: reconstructions")
    _save(figure, path)


def draw_curves(path: Path, curves: dict[str, list[float]]) -> None:
    figure, all_axes = plt.subplots(1, len(curves), figsize=(10, 2.8))
    for axes, (name, values) in zip(all_axes, curves.items(), strict=True):
        axes.plot(range(1, len(values) + 1), values)
        axes.set_title(name)
        axes.set_xlabel("epoch")
    _save(figure, path)


def _save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def save_latents(path: Path, model: VQVAE, images: Tensor) -> None:
    encoded = torch.cat([model.encoder(batch.float() / 255).movedim(1, -1).flatten(0, 2) for batch in images.split(BATCH)])
    some = encoded[torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0))[:SAVED_ENCODINGS]]
    np.savez_compressed(path, x=some.half().numpy(), codebook=model.quantizer.codebook.half().numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--save-latents", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, load in (("digits", digits), ("patches", patches)):
        train_images, test_images = load()
        model, curves = train(train_images, arguments.epochs)
        recon = model.reconstruct(test_images[:TEST_IMAGES])
        error = (recon - test_images[:TEST_IMAGES].float() / 255).square().mean().item()
        draw_reconstructions(arguments.out / f"vqvae_{name}.png", test_images, recon)
        draw_curves(arguments.out / f"vqvae_{name}_curves.png", curves)
        if arguments.save_latents:
            arguments.save_latents.mkdir(parents=True, exist_ok=True)
            save_latents(arguments.save_latents / f"vqvae_{name}.npz", model, train_images)
        print(
            f"{name}: test MSE per pixel {error:.4f}, codebook usage {curves['usage'][-1]:.0%}, perplexity {curves['perplexity'][-1]:.1f}"
        )


if __name__ == "__main__":
    main()
