"""Shows what each level of a hierarchy of latents decides, by samples that share their upper levels and draw the lower ones anew.

    python examples/hierarchical_samples.py [--epochs 8] [--temperature 0.9] [--out out]

Trains a deep VAE on 4,000 digits. Writes hierarchical_samples.png: a panel for each number of levels that are fixed, in which the images of
a row share these levels; and hierarchical_samples.json: the bound on test digits, the KL of each level, and how far the images of a row
differ.
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

from fastvae.models import DeepVAE
from fastvae.nn import CosineSchedule
from fastvae.training.datasets import MNISTDigits
from fastvae.training.pictures import grid

BATCH, ROWS, COLUMNS = 64, 6, 8


def train(model: DeepVAE, images: Tensor, epochs: int) -> None:
    """On digits whose pixels are drawn anew from their grey values in each epoch, which makes the loss a likelihood of binary images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(images) // BATCH))
    for _ in tqdm(range(epochs), unit="epoch"):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            model(torch.bernoulli(images[batch])).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 200.0)
            optimizer.step()
            schedule.step()
            model.kl_penalty.step()


def draw_panels(model: DeepVAE, temperature: float) -> list[Tensor]:
    """``(rows, columns, 1, 28, 28)`` for each number of levels, from the top, that the images of a row share."""
    generator = torch.Generator().manual_seed(0)
    z = [level.repeat_interleave(COLUMNS, 0) for level in model.sample_latents(ROWS, generator, temperature=temperature)]
    shared = [z[:count] for count in range(1, len(z) + 1)]
    samples = [model.sample(ROWS * COLUMNS, generator, temperature=temperature, given=given) for given in shared]
    return [sample.unflatten(0, (ROWS, COLUMNS)) for sample in samples]


def draw_picture(path: Path, panels: list[Tensor]) -> None:
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6))
    for count, (axis, panel) in enumerate(zip(axes, panels, strict=True), 1):
        axis.imshow(grid(panel.flatten(0, 1), COLUMNS)[0], cmap="gray")
        axis.set(xticks=[], yticks=[], title=f"a row shares {count} of {len(panels)} levels")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def summarise(model: DeepVAE, images: Tensor, panels: list[Tensor]) -> dict[str, float | list[float]]:
    output = model(torch.bernoulli(images))
    return {
        "bound on test digits, nats": -(output.recon_loss + output.kl).item(),
        "KL of each level from the top, nats": [kl.item() for kl in output.kls],
        "deviation of a pixel within a row, by shared levels": [panel.std(1).mean().item() for panel in panels],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    digits = MNISTDigits(val=0.0)
    train_images, test_images = (digits.samples(part)["x"] / 255 for part in ("train", "test"))
    model = DeepVAE.residual(28, 1, widths=(8, 16, 32), blocks=(0, 1, 2), latent_channels=4, beta=CosineSchedule(100))
    train(model, train_images, arguments.epochs)
    panels = draw_panels(model, arguments.temperature)
    report = summarise(model, test_images, panels)
    for name, value in report.items():
        print(name, value)
    (arguments.out / "hierarchical_samples.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_picture(arguments.out / "hierarchical_samples.png", panels)


if __name__ == "__main__":
    main()
