"""Trains a VQ-VAE on real digits and a prior of its codes that is given the class; draws digits on demand.

    python examples/vqvae_prior_samples.py [--out out] [--epochs 5] [--prior-epochs 8]

Without the prior all that a VQ-VAE can draw is independent codes, which the first row shows: they are no digits. Below it each row is a
class.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange

from fastvae.models import VQVAE, IndexPrior
from fastvae.training import pictures
from fastvae.training.datasets import MNISTDigits

BATCH = 64
COLUMNS = 10


def train(model: nn.Module, data: tuple[Tensor, ...], epochs: int, learning_rate: float, name: str) -> None:
    """Trains what is called with a batch of each tensor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    steps = epochs * -(-len(data[0]) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 1))
    bar = trange(epochs, unit="epoch", desc=name)
    for _ in bar:
        for batch in torch.randperm(len(data[0])).split(BATCH):
            loss = model(*(tensor[batch] for tensor in data)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--epochs", type=int, default=5, help="of the VQ-VAE")
    parser.add_argument("--prior-epochs", type=int, default=8)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    digits = MNISTDigits(val=0.0)
    parts = {part: digits.samples(part) for part in ("train", "test")}
    images, labels = parts["train"]["x"], parts["train"]["label"]

    vqvae = VQVAE.conv(1, num_codes=64, dim=16, channels=32, data_variance=0.095, decay=0.9, kmeans_iters=5, revive_below=1.0)
    train(vqvae, (images,), arguments.epochs, 2e-3, "VQ-VAE")
    prior = IndexPrior(vqvae, (7, 7), width=96, depth=3, num_classes=10, dropout=0.1)
    train(prior, (images, labels), arguments.prior_epochs, 2e-3, "prior")

    prior.eval()
    test_images, test_labels = parts["test"]["x"], parts["test"]["label"]
    with torch.no_grad():
        log_probs = [prior.log_prob(vqvae.encode(x), y) for x, y in zip(test_images.split(250), test_labels.split(250), strict=True)]
    generator = torch.Generator().manual_seed(0)
    independent = vqvae.decode(torch.randint(64, (COLUMNS, 7, 7), generator=generator))
    drawn = prior.sample(10 * COLUMNS, torch.arange(10).repeat_interleave(COLUMNS), generator=generator, top_k=32)
    path = arguments.out / "vqvae_prior_samples.png"
    pictures.save_png(pictures.grid(torch.cat([independent, drawn]), COLUMNS), path)
    error = (vqvae.reconstruct(test_images) - test_images / 255).square().mean()
    print(f"VQ-VAE: test MSE per pixel {error:.4f}")
    print(f"prior: {-torch.cat(log_probs).mean():.1f} nats a test digit, uniform codes {49 * torch.log(torch.tensor(64.0)):.1f}; {path}")


if __name__ == "__main__":
    main()
