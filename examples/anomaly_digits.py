"""One digit is left out of training and looked for among the others, by the scores of an autoencoder and of a VAE.

    python examples/anomaly_digits.py [--digits 0 1 ... 9] [--epochs 15] [--out out]

Writes anomaly.md, a table of the areas under the ROC and precision-recall curves by digit, and anomaly.json.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import trange

from fastvae.metrics.anomaly import AnomalyResult, Score, anomaly_scores, leave_one_class_out
from fastvae.models import AE, VAE
from fastvae.training.datasets import MNISTDigits

LATENT_DIM = 8


def train(model: AE | VAE, images: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in trange(epochs, desc=type(model).__name__, unit="epoch", leave=False):
        for batch in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            model(images[batch]).loss.backward()
            optimizer.step()


def fit(images: Tensor, epochs: int) -> dict[str, Score]:
    torch.manual_seed(0)
    ae, vae = AE.mlp(latent_dim=LATENT_DIM), VAE.mlp(latent_dim=LATENT_DIM)
    for model in (ae, vae):
        train(model, images, epochs)
    return {
        "AE, squared error": partial(anomaly_scores, ae),
        "VAE, squared error": partial(anomaly_scores, vae),
        "VAE, negative ELBO": partial(anomaly_scores, vae, score="negative_elbo"),
        "VAE, reconstruction probability": partial(anomaly_scores, vae, score="reconstruction_probability"),
    }


def as_numbers(result: AnomalyResult) -> dict[str, float]:
    return {name: float(value) for name, value in result._asdict().items()}


def table(results: dict[int, dict[str, AnomalyResult]]) -> str:
    """A row a digit: the area under the ROC curve, and in brackets that under the precision-recall curve."""
    names = [*next(iter(results.values()))]
    rows = [[str(digit), *(f"{found[name].auc_roc:.3f} ({found[name].auc_pr:.3f})" for name in names)] for digit, found in results.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (["left out", *names], ["---"] * (1 + len(names)), *rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)), choices=range(10))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    digits = MNISTDigits(val=0.0)
    parts = [digits.samples(part) for part in ("train", "test")]
    train_part, test_part = ((part["x"] / 255, part["label"]) for part in parts)
    results = leave_one_class_out(partial(fit, epochs=arguments.epochs), train_part, test_part, classes=arguments.digits)
    print(table(results))
    (arguments.out / "anomaly.md").write_text(table(results) + "\n")
    figures = {
        digit: {name: {k: float(v) for k, v in result._asdict().items()} for name, result in found.items()}
        for digit, found in results.items()
    }
    (arguments.out / "anomaly.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
