"""Trains the residual convolutional VAE on 128 x 128 patches of scikit-learn's two photographs, and draws what it reconstructs.

    python examples/train_conv_vae.py --minutes 10

A plain training loop. Activations have their channels last; encoder and decoder run in bfloat16 where the processor
multiplies it in hardware. Pictures and the loss curve go to the folder ``--out``.
"""

import argparse
import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor
from tqdm import tqdm

from fastvae.distributions import GaussianLikelihood
from fastvae.models import ImageVAE
from fastvae.nn import LinearSchedule

PATCH = 128
# This part of each photograph's width, which shows its subject, is kept for testing.
HELD_OUT = 0.45, 0.7


def photographs() -> list[Tensor]:
    """8-bit images ``(3, height, width)``."""
    return [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in load_sample_images().images]


def split(images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Images to train on, left and right of what is held out, and those."""
    training, held_out = [], []
    for image in images:
        first, end = (int(share * image.shape[2]) for share in HELD_OUT)
        training += [image[:, :, :first], image[:, :, end:]]
        held_out.append(image[:, :, first:end])
    return training, held_out


def crops(images: list[Tensor], count: int, generator: torch.Generator) -> Tensor:
    """Random patches, half of them mirrored: 8-bit, ``(count, 3, 128, 128)``."""
    patches = []
    for _ in range(count):
        which, mirrored = (int(torch.randint(n, (), generator=generator)) for n in (len(images), 2))
        image = images[which]
        top, left = (int(torch.randint(length - PATCH + 1, (), generator=generator)) for length in image.shape[1:])
        patch = image[:, top : top + PATCH, left : left + PATCH]
        patches.append(patch.flip(2) if mirrored else patch)
    return torch.stack(patches)


def train(model: ImageVAE, images: list[Tensor], minutes: float, batch: int, seed: int) -> list[float]:
    """The loss of every step, in nats per sample."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses, start = [], time.monotonic()
    with tqdm(total=round(60 * minutes), unit="s", desc="training") as bar:
        while (elapsed := time.monotonic() - start) < 60 * minutes:
            out = model(crops(images, batch, generator))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            model.kl_penalty.step()
            losses.append(out.loss.item())
            bar.n = int(elapsed)
            bar.set_postfix(step=len(losses), loss=f"{losses[-1]:.0f}", kl=f"{out.kl.item():.0f}")
    return losses


@torch.no_grad()
def mean_squared_error(model: ImageVAE, patches: Tensor) -> float:
    return float((model.reconstruct(patches).float().clamp(0, 1) - patches / 255).square().mean())


def as_picture(patch: Tensor) -> np.ndarray:
    return patch.float().clamp(0, 1).permute(1, 2, 0).numpy()


def draw_reconstructions(path: Path, model: ImageVAE, patches: Tensor) -> None:
    figure, axes = plt.subplots(2, len(patches), figsize=(1.6 * len(patches), 3.4), layout="constrained")
    rows = {"held out": patches / 255, "reconstructed": model.reconstruct(patches)}
    for row, (title, pictures) in zip(axes, rows.items(), strict=True):
        row[0].set_title(title, loc="left", fontsize=9)
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(as_picture(picture))
            axis.axis("off")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_losses(path: Path, losses: list[float]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(losses, linewidth=0.8)
    axis.set_xlabel("step")
    axis.set_ylabel("loss (nats per sample)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="time to train (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="patches a step (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/conv_vae"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    # A Gaussian decoder with one learned variance, which starts at that of a rough reconstruction; the KL comes in over the first steps.
    # With as many groups as channels the norms would take each channel's mean away, and colours with it.
    likelihood = GaussianLikelihood("global", logvar=-4.0)
    # Half of what is kept for the backward pass goes, for one more pass over memory: larger batches fit.
    model = ImageVAE.residual(groups=8, image_size=PATCH, memory="lean", likelihood=likelihood, beta=LinearSchedule(200))
    training, held_out = split(photographs())
    test = crops(held_out, 8, torch.Generator().manual_seed(1))
    before = mean_squared_error(model, test)
    losses = train(model, training, arguments.minutes, arguments.batch, arguments.seed)
    report = {"steps": len(losses), "test_mse_before": before, "test_mse": mean_squared_error(model, test), "last_loss": losses[-1]}
    draw_reconstructions(arguments.out / "reconstructions.png", model, test)
    draw_losses(arguments.out / "losses.png", losses)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    print(f"Pictures are in {arguments.out}.")


if __name__ == "__main__":
    main()
