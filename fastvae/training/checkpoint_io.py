"""Writing a checkpoint so that one that cannot be written leaves the one before it as it is."""

import io
import os
from pathlib import Path
from typing import Any

import torch

from fastvae._extras import extra
from fastvae.training.errors import writing

with extra("train"):
    from lightning.pytorch.plugins import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it, which either happens or does not.

    Lightning writes to the folder of temporary files and moves the file from there. Between two file systems that is a copy, which a full
    disk ends in the middle of the checkpoint that it overwrites.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises TrainingError, with the path and the reason, where the checkpoint cannot be written."""
        content = io.BytesIO()
        torch.save(checkpoint, content)
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.unfinished")
        with writing(path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(unfinished, content)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)


def _write(path: Path, content: io.BytesIO) -> None:
    with path.open("wb") as file:
        file.write(content.getbuffer())
        file.flush()
        # The rename must not reach the disk before the content does.
        os.fsync(file.fileno())
