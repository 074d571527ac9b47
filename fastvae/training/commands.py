"""The commands after a training: ``fastvae sample | reconstruct | interpolate | traverse | encode CHECKPOINT --out DIR``, ``compare`` and
``explore``."""

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.training import checkpoints, latents, pictures
from fastvae.training.data_module import AutoencoderData
from fastvae.training.datasets import DATA_MODULES
from fastvae.training.errors import TrainingError, writing
from fastvae.training.explorer.server import explore
from fastvae.training.module import LitAutoencoder, labels_of
from fastvae.training.parsing import Parser
from fastvae.training.side_by_side import compare


def sample(
    checkpoint: Path,
    out: Path = Path("out"),
    count: int | None = None,
    columns: int = 8,
    seed: int = 0,
    labels: list[int] | None = None,
) -> None:
    """Draws from the prior of a VAE: samples.png, samples.txt for text, or samples.npy for other data.

    A conditional VAE draws a row of samples for each label.

    Args:
        checkpoint: a file that fastvae fit wrote.
        out: folder of the results.
        count: number of samples; by default 64, or one row for each label.
        columns: images in a row.
        seed: decides the draws.
        labels: classes of a conditional VAE, such as --labels 0 1 2; all of them by default.
    """
    lit = checkpoints.load(checkpoint)
    rows = latents.rows_of_classes(lit.network, columns, labels)
    if rows and count is not None:
        # The rows begin anew behind the last label.
        rows = (rows[0].repeat(count // len(rows[0]) + 1)[:count],)
    default = len(rows[0]) if rows else 64
    _write(lit, out, "samples", latents.sample(lit, default if count is None else count, seed, *rows), _in_rows(columns))


def reconstruct(checkpoint: Path, out: Path = Path("out"), data: AutoencoderData | None = None, count: int = 32, columns: int = 8) -> None:
    """Reconstructs test samples: reconstructions.png, each row below its originals, or reconstructions.npy.

    Args:
        checkpoint: a file that fastvae fit wrote.
        out: folder of the results.
        data: the data set; that of the training by default.
        count: number of samples.
        columns: images in a row.
    """
    lit = checkpoints.load(checkpoint)
    x, *labels = _test_samples(lit, data, count)
    _write(lit, out, "reconstructions", latents.reconstruct(lit, x, *labels), lambda recon: pictures.pairs(x, recon, columns))


def interpolate(checkpoint: Path, out: Path = Path("out"), data: AutoencoderData | None = None, count: int = 8, steps: int = 10) -> None:
    """Walks between the latents of pairs of test samples, a row for each: interpolations.png or interpolations.npy.

    Args:
        checkpoint: a file that fastvae fit wrote.
        out: folder of the results.
        data: the data set; that of the training by default.
        count: number of pairs.
        steps: points on the way, both ends included.
    """
    lit = checkpoints.load(checkpoint)
    latents.check_continuous(lit.network, "interpolate")
    samples = _test_samples(lit, data, 2 * count)
    pairs = len(samples[0]) // 2
    start, *start_labels = (tensor[:pairs] for tensor in samples)
    end, *end_labels = (tensor[pairs : 2 * pairs] for tensor in samples)
    path = latents.interpolate(lit, start, end, steps, tuple(start_labels), tuple(end_labels))
    _write(lit, out, "interpolations", path, _in_rows(steps))


def traverse(
    checkpoint: Path,
    out: Path = Path("out"),
    data: AutoencoderData | None = None,
    dimensions: int = 10,
    span: float = 3.0,
    steps: int = 10,
) -> None:
    """Moves one latent dimension of a test sample after the other, a row for each: traversals.png or traversals.npy.

    Args:
        checkpoint: a file that fastvae fit wrote.
        out: folder of the results.
        data: the data set; that of the training by default.
        dimensions: number of dimensions, from the first.
        span: a dimension goes from -span to span.
        steps: points on the way.
    """
    lit = checkpoints.load(checkpoint)
    latents.check_continuous(lit.network, "traverse")
    x, *labels = _test_samples(lit, data, 1)
    _write(lit, out, "traversals", latents.traverse(lit, x, dimensions, span, steps, *labels), _in_rows(steps))


def encode(checkpoint: Path, out: Path = Path("out"), data: AutoencoderData | None = None) -> None:
    """Writes the latents of the whole data set: latents.npz with z or indices (z_0, z_1, ... of several levels), label, index and name.

    Args:
        checkpoint: a file that fastvae fit wrote.
        out: folder of the results.
        data: the data set; that of the training by default.
    """
    lit = checkpoints.load(checkpoint)
    data = _prepared(lit, data)
    parts: dict[str, list[np.ndarray]] = {}
    for batch in data.whole_dataloader():
        checkpoints.check_shape(lit, data, batch["x"])
        for name, value in _encoded(lit, data.on_before_batch_transfer(batch, 0)).items():
            parts.setdefault(name, []).append(value.numpy())
    arrays = {name: np.concatenate(values) for name, values in parts.items()}
    # Another sample of its batch stands where a broken one was.
    arrays = {name: array[np.unique(arrays["index"], return_index=True)[1]] for name, array in arrays.items()}
    assert data.source is not None
    if data.source.names is not None:
        arrays["name"] = np.array(data.source.names)[arrays["index"]]
    _write_file(out / "latents.npz", lambda: np.savez(out / "latents.npz", **arrays))  # type: ignore[arg-type]
    print(f"{out / 'latents.npz'}: {len(arrays['index'])} samples, {', '.join(arrays)}")
    data.teardown("predict")


def _encoded(lit: LitAutoencoder, batch: dict[str, Any]) -> dict[str, Tensor]:
    codes = latents.encode(lit, batch["x"], *labels_of(batch, lit.network))
    name = "z" if latents.is_continuous(lit.network) else "indices"
    names = [f"{name}_{i}" for i in range(len(codes))] if len(codes) > 1 else [name]
    return dict(zip(names, codes, strict=True)) | {name: batch[name] for name in ("index", "label") if name in batch}


def _prepared(lit: LitAutoencoder, data: AutoencoderData | None) -> AutoencoderData:
    data = checkpoints.build_data(lit.data_name, lit.data_options) if data is None else data
    data.setup()
    return data


def _test_samples(lit: LitAutoencoder, data: AutoencoderData | None, count: int) -> tuple[Tensor, ...]:
    """The first samples of the test part, and their labels where the network takes them."""
    if count < 1:
        raise TrainingError(f"count: got {count}, takes an integer >= 1")
    data = _prepared(lit, data)
    batch = data.samples("test", count)
    checkpoints.check_shape(lit, data, batch["x"])
    return batch["x"], *labels_of(batch, lit.network)


def _write(lit: LitAutoencoder, out: Path, name: str, x: Tensor, draw: Callable[[Tensor], Tensor]) -> None:
    """Writes images as the picture that ``draw`` makes of them, tokens as lines of text where the training's data have a vocabulary, and
    other data as an array."""
    vocabulary = getattr(DATA_MODULES.get(lit.data_name or ""), "vocabulary", None)
    if vocabulary is not None:
        path = out / f"{name}.txt"
        _write_file(path, lambda: path.write_text("".join(f"{sentence}\n" for sentence in vocabulary.decode(x))))
    elif pictures.are_images(x):
        path = out / f"{name}.png"
        pictures.save_png(draw(x), path)
    else:
        path = out / f"{name}.npy"
        _write_file(path, lambda: np.save(path, x.numpy()))
    print(path)


def _write_file(path: Path, write: Callable[[], Any]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write()


def _in_rows(columns: int) -> Callable[[Tensor], Tensor]:
    return partial(pictures.grid, columns=columns)


def _with_lists(arguments: list[str]) -> list[str]:
    """The arguments with the numbers behind ``--labels`` as one list, which is how the parser takes them."""
    if "--labels" not in arguments:
        return arguments
    place = arguments.index("--labels") + 1
    numbers = list(itertools.takewhile(str.isdecimal, arguments[place:]))
    return [*arguments[:place], f"[{','.join(numbers)}]", *arguments[place + len(numbers) :]] if numbers else arguments


def _with_one_list(arguments: list[str]) -> list[str]:
    """The arguments with the paths before the first option as one list."""
    paths = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    return [json.dumps(paths), *arguments[len(paths) :]] if paths else arguments


COMMANDS: dict[str, Callable[..., None]] = {
    "sample": sample,
    "reconstruct": reconstruct,
    "interpolate": interpolate,
    "traverse": traverse,
    "encode": encode,
    "compare": compare,
    "explore": explore,
}


def main(arguments: list[str]) -> None:
    """Runs one of the commands."""
    with extra("train"):
        from jsonargparse import auto_cli
    name = arguments[0]
    listed = _with_one_list if name == "compare" else _with_lists
    with torch.no_grad():
        auto_cli(COMMANDS[name], args=listed(arguments[1:]), prog=f"fastvae {name}", as_positional=True, parser_class=Parser)
