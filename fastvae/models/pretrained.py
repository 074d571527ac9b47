"""Weights and recipe of a model in a folder, as the Hugging Face hub has them: ``model.safetensors`` and ``config.json``.

Every model writes and reads them by its methods. :func:`from_pretrained` reads a model whose class is not known.
"""

import json
from pathlib import Path
from typing import Any

from torch import nn

from fastvae._extras import extra
from fastvae.models import registry

# The names that huggingface_hub gives the two files.
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def write(model: nn.Module, folder: Path) -> None:
    """Writes the two files into a folder that exists.

    Raises:
        ValueError: for a model of modules of one's own, or with an option that cannot be stored.
    """
    with extra("train"):
        from safetensors.torch import save_model
    config = json.dumps(registry.describe(model), indent=2)
    save_model(model, str(folder / WEIGHTS))
    (folder / CONFIG).write_text(config + "\n")


def from_pretrained(source: str | Path, **download: Any) -> nn.Module:
    """The model of a folder or of a repository, in evaluation mode on the CPU.

    Args:
        source: the folder, or the repository as ``"owner/name"``.
        download: options of ``huggingface_hub.hf_hub_download``, such as ``revision`` and ``token``.

    Raises:
        ValueError: for a config that does not describe a network of this package, or weights that are damaged or of another network.
        FileNotFoundError: for a folder without the two files.
    """
    config, weights = (_find(source, name, download) for name in (CONFIG, WEIGHTS))
    model = registry.build(_read_description(config))
    _load_weights(model, weights)
    return model.eval()


def _read_description(config: Path) -> dict[str, Any]:
    try:
        description = json.loads(config.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"source: {config} is no JSON: {error}") from error
    if not registry.is_description(description):
        raise ValueError(f"source: {config} describes no network of fastvae, takes one with network and options")
    return description


def _load_weights(model: nn.Module, weights: Path) -> None:
    with extra("train"):
        from safetensors import SafetensorError
        from safetensors.torch import load_model
    try:
        load_model(model, str(weights))
    except SafetensorError as error:
        raise ValueError(f"source: {weights} is no safetensors file, or a damaged one: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"source: {weights} does not hold the weights that {CONFIG} beside it describes: {error}") from error


def check_source(source: str | Path) -> None:
    """Tells a folder that is not there from a repository, in which the hub would look for it."""
    if not Path(source).is_dir() and str(source).count("/") != 1:
        raise FileNotFoundError(f"source: got {str(source)!r}, takes a folder, or a repository of the hub as owner/name")


def _find(source: str | Path, name: str, download: dict[str, Any]) -> Path:
    check_source(source)
    path = Path(source)
    if path.is_dir():
        if not (path / name).is_file():
            raise FileNotFoundError(f"source: {path} has no {name}")
        return path / name
    with extra("train"):
        from huggingface_hub import hf_hub_download
    return Path(hf_hub_download(str(source), name, **download))
