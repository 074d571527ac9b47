"""A conditional VAE draws real digits on demand: a row for each class that is asked for, a column for each draw of z.

    python examples/cvae_digits_on_demand.py [--digits 0 1 ... 9] [--draws 10] [--epochs 12] [--out out]

A column has the same z in each row: what is left to z is the style. Prints the share of the drawn digits that a classifier, trained on the
same images, takes for the class that was asked for. Writes cvae_digits.png, and cvae_without_condition.png, draws of the same model without
a class.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastvae.models import CVAE
from fastvae.training.datasets import MNISTDigits
from fastvae.training.pictures import grid, save_png

BATCH = 100


def train(model: CVAE, images: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in tqdm(range(epochs), unit="epoch"):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            model(images[batch], labels[batch]).loss.backward()
            optimizer.step()
    model.eval()


def draw(model: CVAE, digits: list[int], draws: int) -> Tensor:
    """Digits in rows, ``(len(digits) * draws, 1, 28, 28)``."""
    z = torch.randn(draws, *model.latent_shape).repeat(len(digits), 1)
    with torch.no_grad():
        return model.decode_mean(z, torch.tensor(digits).repeat_interleave(draws))


def train_classifier(images: Tensor, labels: Tensor) -> nn.Module:
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(classifier.parameters(), lr=1e-3)
    for _ in range(8):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(classifier(images[batch] / 255), labels[batch]).backward()
            optimizer.step()
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=int, nargs="+", default=list(range(10)), choices=range(10))
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    data = MNISTDigits(val=0.0).samples("train")
    model = CVAE.conv(latent_dim=10, drop_condition=0.1)
    train(model, data["x"], data["label"], arguments.epochs)
    drawn = draw(model, arguments.digits, arguments.draws)
    save_png(grid(drawn, arguments.draws), arguments.out / "cvae_digits.png")
    save_png(grid(model.sample(10 * arguments.draws), arguments.draws), arguments.out / "cvae_without_condition.png")
    found = train_classifier(data["x"], data["label"])(drawn).argmax(1)
    asked = torch.tensor(arguments.digits).repeat_interleave(arguments.draws)
    print(f"{(found == asked).float().mean():.1%} of {len(drawn)} digits are taken for the class that was asked for")


if __name__ == "__main__":
    main()
