"""Accuracy on real digits from 100 labels: a semi-supervised VAE beside a classifier of the same architecture on the same 100 labels.

    python examples/semi_supervised_100_labels.py [--seeds 0] [--epochs 20] [--out out]

The VAE sees the other 3,900 training digits too, without their labels. A seed decides the split, the 100 labels and the first weights.
Prints both accuracies on 1,000 test digits and the margin; writes semi_supervised.json, and semi_supervised_samples.png with a row for
each class.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastvae.models import SemiSupervisedVAE
from fastvae.models.semi_supervised import UNLABELLED
from fastvae.training.datasets import MNISTDigits
from fastvae.training.pictures import grid, save_png

LABELS, BATCH, CLASSIFIER_STEPS, DRAWS = 100, 100, 600, 10


class Digits(NamedTuple):
    """8-bit images and labels; that of a training image is -1 where it is hidden."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(seed: int) -> Digits:
    data = MNISTDigits(val=0.0, seed=seed, labelled=LABELS)
    train, test = data.samples("train"), data.samples("test")
    return Digits(train["x"], train["label"], test["x"], test["label"])


def make_model(seed: int, samples: int) -> SemiSupervisedVAE:
    torch.manual_seed(seed)
    # A small z leaves the class to y. The paper's alpha is 0.1 times the number of samples.
    return SemiSupervisedVAE.mlp(hidden=(256,), latent_dim=5, conditioning="concatenation", alpha=0.1 * samples)


def accuracy(model: SemiSupervisedVAE, digits: Digits) -> float:
    return (model.classify(digits.test_x) == digits.test_y).float().mean().item()


def train_classifier(model: SemiSupervisedVAE, digits: Digits) -> None:
    """Trains the classifier of a model alone, on the labelled images."""
    x, y = digits.x[digits.y != UNLABELLED], digits.y[digits.y != UNLABELLED]
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-3)
    for _ in range(CLASSIFIER_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model.class_logits(x), y).backward()
        optimizer.step()


def train_model(model: SemiSupervisedVAE, digits: Digits, epochs: int) -> None:
    """Trains the whole model on all images."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in tqdm(range(epochs), unit="epoch"):
        for batch in torch.randperm(len(digits.x)).split(BATCH):
            optimizer.zero_grad()
            model(digits.x[batch], digits.y[batch]).loss.backward()
            optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = []
    for seed in arguments.seeds:
        digits = load(seed)
        alone, model = make_model(seed, len(digits.x)), make_model(seed, len(digits.x))
        train_classifier(alone, digits)
        train_model(model, digits, arguments.epochs)
        found = {"seed": seed, "classifier": accuracy(alone, digits), "semi-supervised": accuracy(model, digits)}
        report.append(found | {"margin": found["semi-supervised"] - found["classifier"]})
        print(", ".join(f"{name} {value:.3f}" if name != "seed" else f"seed {value}" for name, value in report[-1].items()), flush=True)
    classes = torch.arange(10).repeat_interleave(DRAWS)
    save_png(grid(model.sample(len(classes), classes), DRAWS), arguments.out / "semi_supervised_samples.png")
    (arguments.out / "semi_supervised.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
