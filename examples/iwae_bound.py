"""The importance-weighted bound on held-out digits rises with the number of samples k, and for the model that was trained on it most.

    python examples/iwae_bound.py [--epochs 20] [--samples 1 5 50] [--out out]

Prints the bound for each k, of a VAE and of an IWAE, beside the estimate of log p(x) by annealed importance sampling on a few digits.
Writes iwae_bound.png and iwae_bound.json. The digits are binarized by their grey levels anew in each epoch.
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

from fastvae.models import IWAE, VAE, log_prob_ais
from fastvae.training.datasets import MNISTDigits

DIM, HIDDEN, ANNEALED = 20, (200,), 16


def train(model: VAE, images: Tensor, epochs: int, name: str) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in tqdm(range(epochs), desc=name, unit="epoch"):
        binary = torch.bernoulli(images)
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            model(binary[batch]).loss.backward()
            optimizer.step()


def bounds(model: VAE, images: Tensor, counts: list[int]) -> dict[str, float]:
    """The mean bound in nats of the images, for each number of samples."""
    generator = torch.Generator().manual_seed(0)
    return {
        str(count): torch.cat([model.log_prob_bound(batch, count, generator=generator) for batch in images.split(100)]).mean().item()
        for count in counts
    }


def draw(path: Path, report: dict[str, dict[str, float]], counts: list[int]) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, values in report.items():
        axis.plot(counts, [values[str(count)] for count in counts], marker="o", label=f"trained as {name}")
    axis.set(xscale="log", xlabel="samples k", ylabel="bound on log p(x), nats", title="held-out digits")
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 5, 50])
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = MNISTDigits(val=0.0)
    train_images = digits.samples("train")["x"].float() / 255
    torch.manual_seed(0)
    test_images = torch.bernoulli(digits.samples("test")["x"].float() / 255)
    models = {
        "VAE": VAE.mlp(hidden=HIDDEN, latent_dim=DIM),
        "IWAE": IWAE.mlp(hidden=HIDDEN, latent_dim=DIM, num_samples=5, gradient="doubly_reparameterized"),
    }
    report = {}
    for name, model in models.items():
        train(model, train_images, arguments.epochs, name)
        report[name] = bounds(model, test_images, arguments.samples)
        few = test_images[:ANNEALED]
        report[name] |= {
            f"{ANNEALED} digits, k={max(arguments.samples)}": bounds(model, few, arguments.samples)[str(max(arguments.samples))],
            f"{ANNEALED} digits, annealed": log_prob_ais(model, few, num_chains=8, num_steps=100).mean().item(),
        }
        print(name, {key: round(value, 2) for key, value in report[name].items()})
    (arguments.out / "iwae_bound.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(arguments.out / "iwae_bound.png", report, arguments.samples)


if __name__ == "__main__":
    main()
