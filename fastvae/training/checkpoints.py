"""Reading a checkpoint without the program and the configuration that wrote it."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.models import registry
from fastvae.training.data_module import AutoencoderData
from fastvae.training.datasets import DATA_MODULES
from fastvae.training.errors import CheckpointError, TrainingError
from fastvae.training.module import LitAutoencoder, check_entry
from fastvae.training.preprocessing import Preprocessing

# The unpickler of torch ends at a damaged pickle with whatever the instruction that it takes the bytes for raises.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError, MemoryError)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's content, of tensors and plain data alone: nothing that a file says is run."""
    if not path.is_file():
        raise CheckpointError(f"checkpoint: {path} is no file")
    if not zipfile.is_zipfile(path):
        # torch.load would take the file for one of its old format, and fail in as many ways as there are files.
        raise CheckpointError(f"checkpoint: {path} was not written by torch.save")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"checkpoint: {path} holds more than tensors and plain data, which is not read") from error
    except _DAMAGED as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {str(error).strip().partition(chr(10))[0]}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint: {path} holds a {type(content).__name__}, takes a checkpoint of fastvae fit")
    return content


def build_network(entry: dict[str, Any]) -> Any:
    """The network that a checkpoint's entry describes, with new weights."""
    if entry["network"] is None:
        raise CheckpointError("checkpoint: its network was made of modules of one's own, which only its program can make again")
    try:
        return registry.build(entry["network"])
    except ValueError as error:
        raise CheckpointError(f"checkpoint: {error}") from error


def build_data(name: str | None, options: dict[str, Any]) -> AutoencoderData:
    """The data module that a checkpoint was trained on."""
    if name not in DATA_MODULES:
        raise TrainingError(f"data: the checkpoint was trained on batches of another program, takes one of {', '.join(DATA_MODULES)}")
    return DATA_MODULES[name](**options)


def check_shape(lit: LitAutoencoder, data: AutoencoderData, x: Tensor) -> None:
    """Raises where samples have another shape than those of the network's training."""
    if lit.sample_shape is not None and list(x.shape[1:]) != lit.sample_shape:
        raise TrainingError(
            f"data: {type(data).__name__} has samples of shape {tuple(x.shape[1:])}, "
            f"the checkpoint was trained on {lit.data_name or 'samples'} of shape {tuple(lit.sample_shape)}"
        )


def load(path: Path) -> LitAutoencoder:
    """The network of a checkpoint with its weights and preprocessing, in evaluation mode on the CPU."""
    content = read(path)
    entry = check_entry(content)
    lit = LitAutoencoder(build_network(entry))
    lit.preprocessing = Preprocessing(**entry["preprocessing"])
    lit.sample_shape, lit.data_name, lit.data_options = entry["sample_shape"], entry["data"], entry["data_options"]
    try:
        lit.load_state_dict(content["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {path} does not hold the weights of the network that it describes: {error}") from error
    return lit.eval()
