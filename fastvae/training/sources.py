"""Where batches come from: data in memory, and files that are read when they are needed.

A source is a torch data set that is asked for many samples at once: ``__getitems__`` gives a finished batch, a mapping of ``x``, ``label``
where there are labels, and ``index``, the sample's number in the source. Collating samples one by one would take longer than a small
network's training step.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvae.training.errors import DataError
from fastvae.training.images import BROKEN
from fastvae.training.preprocessing import binarize


def as_it_is(batch: Any) -> Any:
    """The collate function of a source, whose batches are finished."""
    return batch


class Source(Dataset):
    """The base: the number of samples, their labels and names.

    Args:
        count: number of samples.
        labels: int64, ``(count,)``, or None.
        names: a name for each sample, such as its file, or None.
    """

    def __init__(self, count: int, labels: Tensor | None = None, names: Sequence[str] | None = None):
        self.count, self.labels, self.names = count, labels, names

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample, as a batch of one."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        batch = self.read(indices)
        return batch if self.labels is None else batch | {"label": self.labels[batch["index"]]}

    def read(self, indices: list[int]) -> dict[str, Any]:
        """``x`` and ``index``."""
        raise NotImplementedError

    def binarized(self, seed: int) -> "Source":
        """A source whose pixels are 0 or 255, drawn once and for all."""
        raise NotImplementedError


class InMemory(Source):
    """Samples in one tensor, ``(count, ...)``."""

    def __init__(self, x: Tensor, labels: Tensor | None = None, names: Sequence[str] | None = None):
        super().__init__(len(x), labels, names)
        self.x = x

    def read(self, indices: list[int]) -> dict[str, Any]:
        index = torch.tensor(indices, dtype=torch.int64)
        return {"x": self.x[index], "index": index}

    def binarized(self, seed: int) -> "InMemory":
        return InMemory(binarize(self.x, torch.Generator().manual_seed(seed)), self.labels, self.names)


class ImageFiles(Source):
    """Image files, brought to one size and one mode when they are read.

    Args:
        paths: the files.
        load: from a path to a uint8 array ``(channels, height, width)``; raises one of :data:`BROKEN` for a broken file.
            Another sample of the batch is then in its place, so that batches keep their size and no sample comes from another part of a
            split; ``broken`` of the batch has the path and the reason.
        labels, names: see :class:`Source`.
    """

    def __init__(self, paths: Sequence[Path], load: Callable[[Path], np.ndarray], *, labels: Tensor | None, names: Sequence[str]):
        super().__init__(len(paths), labels, names)
        self.paths, self.load = paths, load
        self.binarization_seed: int | None = None

    def read(self, indices: list[int]) -> dict[str, Any]:
        images: dict[int, Tensor] = {}
        broken: list[str] = []
        for index in indices:
            try:
                images[index] = self._read_one(index)
            except BROKEN as error:
                broken.append(f"{self.paths[index]}: {error}")
        if not images:
            raise DataError(f"none of the {len(indices)} images of a batch can be read: {broken[0]}")
        readable = itertools.cycle(images)
        used = [index if index in images else next(readable) for index in indices]
        batch = {"x": torch.stack([images[index] for index in used]), "index": torch.tensor(used, dtype=torch.int64)}
        return {**batch, "broken": broken} if broken else batch

    def _read_one(self, index: int) -> Tensor:
        image = torch.from_numpy(self.load(self.paths[index]))
        if self.binarization_seed is None:
            return image
        return binarize(image, torch.Generator().manual_seed(self.binarization_seed + index))

    def binarized(self, seed: int) -> "ImageFiles":
        source = ImageFiles(self.paths, self.load, labels=self.labels, names=self.names or ())
        source.binarization_seed = seed
        return source
