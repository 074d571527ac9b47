"""A beta-VAE of squares and ellipses of known position, size and rotation: which latent has learned which factor.

    python examples/beta_vae_traversals.py [--beta 4] [--steps 2000] [--out out]

Writes beta_vae_traversals.png, one row a latent dimension, and beta_vae_traversals.json, the share of each latent's variance that each
factor explains.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import trange

from fastvae.models import VAE

SIZE, DIM, BINS = 28, 6, 10
FACTORS = ("shape", "x", "y", "size", "rotation")


def draw_factors(count: int, generator: torch.Generator) -> Tensor:
    """``(count, 5)`` numbers in [0, 1), independent; below one half the shape is a square."""
    return torch.rand(count, len(FACTORS), generator=generator)


def draw_images(factors: Tensor) -> Tensor:
    """``(count, 1, 28, 28)`` images of squares and ellipses with soft edges."""
    shape, x, y, size, rotation = factors.T[..., None, None]
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    u, v = axis - (x - 0.5) * 12, axis[:, None] - (y - 0.5) * 12
    # A square looks the same after a quarter of a turn, an ellipse after half a turn.
    angle = rotation * torch.pi / 2
    across, along = angle.cos() * u + angle.sin() * v, angle.cos() * v - angle.sin() * u
    radius = 3 + 4 * size
    square = torch.maximum(across.abs(), along.abs())
    ellipse = (across.square() + (along * 1.7).square()).sqrt()
    distance = torch.where(shape < 0.5, square, ellipse)
    return torch.sigmoid(3 * (radius - distance)).unsqueeze(1)


def train(model: VAE, steps: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in trange(steps, desc="beta-VAE", unit="step"):
        optimizer.zero_grad()
        model(draw_images(draw_factors(64, generator))).loss.backward()
        optimizer.step()


def explained_variance(latent: Tensor, factors: Tensor) -> Tensor:
    """The share of each latent's variance between bins of each factor, ``(latents, factors)``."""
    bins = (factors * BINS).long()
    shares = []
    for factor in range(factors.shape[1]):
        members = torch.nn.functional.one_hot(bins[:, factor], BINS).to(latent.dtype)
        counts = members.sum(0)
        means = members.T @ latent / counts.unsqueeze(1)
        between = (counts.unsqueeze(1) * (means - latent.mean(0)).square()).sum(0) / len(latent)
        shares.append(between / latent.var(0, unbiased=False).clamp_min(1e-12))
    return torch.stack(shares, 1)


def draw_traversals(path: Path, model: VAE, start: Tensor, order: list[int], titles: list[str]) -> None:
    values = torch.linspace(-2, 2, 9)
    figure, axes = plt.subplots(len(order), len(values), figsize=(len(values), 1.15 * len(order)))
    for row, dimension in enumerate(order):
        z = start.repeat(len(values), 1)
        z[:, dimension] = values
        with torch.no_grad():
            images = model.decode_mean(z)
        for axis, image in zip(axes[row], images, strict=True):
            axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[row][0].set_ylabel(titles[row], fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--beta", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = VAE.conv(latent_dim=DIM, beta=arguments.beta)
    train(model, arguments.steps, generator)
    factors = draw_factors(2000, generator)
    with torch.no_grad():
        posterior = model.encode(draw_images(factors))
    shares = explained_variance(posterior.mu, factors)
    # Latents in order of their information; an unused one has the prior's variance for every x.
    order = posterior.mu.var(0).argsort(descending=True).tolist()
    titles = []
    for dimension in order:
        factor = int(shares[dimension].argmax())
        titles.append(f"z{dimension}: {FACTORS[factor]}\n{shares[dimension, factor]:.0%}")
        print(f"z{dimension}", {name: round(share, 2) for name, share in zip(FACTORS, shares[dimension].tolist(), strict=True)})
    report = {f"z{dimension}": dict(zip(FACTORS, shares[dimension].tolist(), strict=True)) for dimension in order}
    (arguments.out / "beta_vae_traversals.json").write_text(json.dumps(report, indent=2) + "\n")
    draw_traversals(arguments.out / "beta_vae_traversals.png", model, posterior.mu.mean(0, keepdim=True), order, titles)


if __name__ == "__main__":
    main()
