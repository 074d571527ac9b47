"""A VQ-VAE, a lookup-free and a finite scalar tokenizer with 512 codes each on the same digits: reconstruction against usage of the codes.

    python examples/tokenizers.py [--epochs 4] [--out out]

Prints the test error of each, how many codes the test digits use and the perplexity of the codes. Writes tokenizers.png, error and
perplexity after each epoch, and tokenizers_digits.png: test digits above what each tokenizer makes of them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastvae.metrics.codebook_usage import CodebookUsage
from fastvae.models.networks.vq_convolutional import conv_decoder, conv_encoder
from fastvae.nn import FSQ, LFQ, VectorQuantizer
from fastvae.training.datasets import MNISTDigits
from fastvae.training.pictures import grid, save_png

BATCH = 64
CODES = 512
DIM = 16
SHOWN = 10
QUANTIZERS = {
    "VQ": lambda: VectorQuantizer(CODES, DIM, channels_first=True, decay=0.9, kmeans_iters=5, revive_below=1.0),
    "LFQ": lambda: LFQ(codebook_size=CODES, dim=DIM, entropy_loss_weight=0.02, commitment_loss_weight=0.05),
    "FSQ": lambda: FSQ([8, 8, 8], dim=DIM),
}


class Tokenizer(nn.Module):
    """Images of 28 x 28 pixels as 49 indices, and back."""

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.encoder = nn.Sequential(conv_encoder(1, 32, hidden=16), nn.Conv2d(32, DIM, 1))
        self.quantizer = quantizer
        self.decoder = conv_decoder(DIM, 1, 32, hidden=16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """Reconstructions, indices and the loss of the quantizer, which an FSQ does not have."""
        quantized, indices, *others = self.quantizer(self.encoder(x))
        return self.decoder(quantized), indices, others[0] if others else 0.0


def train_epoch(model: Tokenizer, optimizer: torch.optim.Optimizer, images: Tensor) -> None:
    model.train()
    for batch in torch.randperm(len(images)).split(BATCH):
        recon, _, loss = model(images[batch])
        optimizer.zero_grad()
        # In units of the variance of the pixels, so that the losses of the quantizers count alike for other images.
        (F.mse_loss(recon, images[batch]) / images.var() + loss).backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: Tokenizer, images: Tensor) -> tuple[float, float, float]:
    """The error per pixel, and the perplexity and the share of the codes in use."""
    model.eval()
    recon, indices, _ = model(images)
    usage = CodebookUsage(CODES)
    usage.update(indices)
    result = usage.compute()
    return F.mse_loss(recon, images).item(), result.perplexity.item(), result.usage.item()


def draw_curves(path: Path, curves: dict[str, list[tuple[float, float, float]]]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3.5))
    for name, points in curves.items():
        errors, perplexities, _ = zip(*points, strict=True)
        axes.plot(perplexities, errors, marker="o", label=name)
    axes.set_xlabel(f"perplexity of {CODES} codes, a point an epoch")
    axes.set_ylabel("test MSE per pixel")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = MNISTDigits(val=0.0)
    images, test_images = (data.samples(part)["x"] / 255 for part in ("train", "test"))
    curves, rows = {}, [test_images[:SHOWN]]
    for name, make in QUANTIZERS.items():
        torch.manual_seed(0)
        model = Tokenizer(make())
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        curves[name] = []
        for _ in tqdm(range(arguments.epochs), desc=name, unit="epoch"):
            train_epoch(model, optimizer, images)
            curves[name].append(evaluate(model, test_images))
        with torch.no_grad():
            rows.append(model(test_images[:SHOWN])[0].clamp(0, 1))
        error, perplexity, share = curves[name][-1]
        print(f"{name}: test MSE per pixel {error:.4f}, {share:.0%} of {CODES} codes in use, perplexity {perplexity:.0f}")
    draw_curves(arguments.out / "tokenizers.png", curves)
    save_png(grid(torch.cat(rows), SHOWN), arguments.out / "tokenizers_digits.png")


if __name__ == "__main__":
    main()
