"""The autoencoders' errors on 5,000 digits against those that have to be reached: ``python -m benchmarks.autoencoder_figures [name ...]``.

Networks, optimizer and number of epochs are fixed: 784-512-256-d, or two convolutions, Adam with a learning rate of 1e-3, batches of 128,
30 epochs, pixels in [0, 1]. Each model is trained twice: on all 5,000 digits, with the error on those, and on 4,000, with the error on the
other 1,000. Errors are means over pixels of (x - reconstruction)^2; a denoising model reconstructs x from x plus noise.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from fastvae.models import AE, DenoisingAE, SparseAE
from fastvae.training.datasets import MNISTDigits

OUT = Path(__file__).parent / "results" / "autoencoder_figures.json"
EPOCHS, BATCH, LEARNING_RATE = 30, 128, 1e-3
# The weight of an L1 penalty of 1e-3 on the mean of the code beside a mean over pixels, for losses that are sums.
L1_WEIGHT = 1e-3 * 784 / 32


@dataclass(frozen=True)
class Figure:
    """A model to train, and the error that it has to reach within a tenth."""

    make: Callable[[], AE]
    expected: float


FIGURES = {
    "mlp, d = 2": Figure(lambda: AE.mlp(latent_dim=2), 0.040),
    "mlp, d = 32": Figure(AE.mlp, 0.0125),
    "denoising, sigma = 0.3": Figure(DenoisingAE.mlp, 0.019),
    "sparse, L1": Figure(lambda: SparseAE.mlp(penalty="l1", weight=L1_WEIGHT), 0.013),
    "convolutional, d = 32": Figure(AE.conv, 0.0083),
}


@dataclass(frozen=True)
class Result:
    expected: float
    on_all_5000: float
    on_1000_held_out: float
    seconds: float


def train(model: AE, images: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in tqdm(range(EPOCHS), unit="epoch", leave=False):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            model(images[batch]).loss.backward()
            optimizer.step()


def error(model: AE, images: Tensor) -> float:
    seen = model.corruption(images) if isinstance(model, DenoisingAE) else images
    return (model.reconstruct(seen) - images).square().mean().item()


def measure(figure: Figure, seed: int = 0) -> Result:
    digits = MNISTDigits(val=0.0)
    train_images, test_images = digits.samples("train")["x"] / 255, digits.samples("test")["x"] / 255
    every_image = torch.cat([train_images, test_images])
    started, errors = time.perf_counter(), []
    for seen, judged in ((every_image, every_image), (train_images, test_images)):
        torch.manual_seed(seed)
        model = figure.make()
        train(model, seen)
        errors.append(error(model, judged))
    return Result(figure.expected, *errors, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.autoencoder_figures", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; all by default")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for name in arguments.names or FIGURES:
        if name not in FIGURES:
            parser.error(f"names: got {name!r}, takes {', '.join(FIGURES)}")
        results[name] = asdict(measure(FIGURES[name]))
        print(name, results[name])
        arguments.out.parent.mkdir(exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
