"""The lower half of digits, and digits at a quarter of their resolution, completed by a search in a VAE's latent and by conditional VAEs.

    python examples/complete_digits.py [--epochs 30] [--out out]

Writes complete_digits.md, a table of PSNR and SSIM in the region that was not seen, and complete_digits.png, a row for each way.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

from fastvae.metrics.completion import Observe, RegionQuality, complete, downscaled, masked
from fastvae.models import CVAE, VAE
from fastvae.nn import VectorCondition
from fastvae.training.datasets import MNISTDigits
from fastvae.training.pictures import grid, save_png

SHOWN, JUDGED = 10, 200


def upper_half() -> Tensor:
    """Visible pixels of images of 28 x 28."""
    return (torch.arange(28) < 14)[:, None].expand(28, 28)


TASKS: dict[str, tuple[Observe, Tensor]] = {
    # A low resolution shows no pixel by itself.
    "lower half": (masked(upper_half()), ~upper_half()),
    "quarter of the resolution": (downscaled(4), torch.ones(28, 28, dtype=torch.bool)),
}


def train(model: VAE, images: Tensor, epochs: int, observe: Observe | None = None) -> None:
    """A conditional model is given what is observed."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in trange(epochs, desc=type(model).__name__, unit="epoch", leave=False):
        for batch in torch.randperm(len(images)).split(128):
            x = images[batch]
            given = () if observe is None else (observe(x).flatten(1),)
            optimizer.zero_grad()
            model(x, *given).loss.backward()
            optimizer.step()


def nearest_neighbour(train_images: Tensor, observed: Tensor, observe: Observe) -> Tensor:
    """Gives the training image whose observation is nearest, which the others have to beat."""
    known = observe(train_images).flatten(1)
    return train_images[torch.cdist(observed.flatten(1), known).argmin(1)]


def completions(vae: VAE, train_images: Tensor, x: Tensor, observe: Observe, epochs: int) -> dict[str, Tensor]:
    observed = observe(x)
    size = observed[0].numel()
    cvae = CVAE.mlp(latent_dim=16, condition=VectorCondition(size, 64))
    train(cvae, train_images, epochs, observe)
    return {
        "nearest training image": nearest_neighbour(train_images, observed, observe),
        "search in z": complete(vae, observed, observe, generator=torch.Generator().manual_seed(0)),
        "conditional VAE": cvae.sample(len(x), observed.flatten(1), torch.Generator().manual_seed(0)),
    }


def in_full_size(observed: Tensor) -> Tensor:
    return F.interpolate(observed, size=(28, 28), mode="nearest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    digits = MNISTDigits(val=0.0)
    train_images, x = (digits.samples(part)["x"] / 255 for part in ("train", "test"))
    x = x[:JUDGED]
    torch.manual_seed(0)
    vae = VAE.mlp(latent_dim=16)
    train(vae, train_images, arguments.epochs)
    lines, rows = ["| task | way | PSNR [dB] | SSIM |", "| --- | --- | --- | --- |"], [x[:SHOWN]]
    for task, (observe, unseen) in TASKS.items():
        rows.append(in_full_size(observe(x[:SHOWN])))
        for way, images in completions(vae, train_images, x, observe, arguments.epochs).items():
            quality = RegionQuality()
            quality.update(images, x, unseen)
            psnr, ssim = quality.compute()
            lines.append(f"| {task} | {way} | {psnr:.2f} | {ssim:.3f} |")
            rows.append(images[:SHOWN])
    print("\n".join(lines))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "complete_digits.md").write_text("\n".join(lines) + "\n")
    save_png(grid(torch.cat(rows), SHOWN), arguments.out / "complete_digits.png")


if __name__ == "__main__":
    main()
