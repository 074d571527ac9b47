"""Errors that a user of the command line sees as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TrainingError(ValueError):
    """Something that the user gave does not fit: data, a checkpoint, a name."""


class DataError(TrainingError):
    """Data that cannot be read, or that do not fit the options."""


class CheckpointError(TrainingError):
    """A file that is no checkpoint of this package, or one of another model or format."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the file in the error where it cannot be written: that of a full disk has no path."""
    try:
        yield
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written: {error.strerror or error}") from error
