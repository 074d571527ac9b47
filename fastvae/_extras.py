"""Optional dependencies."""

from contextlib import contextmanager


class MissingExtraError(ModuleNotFoundError):
    """A module of an optional part of the package is not installed."""


@contextmanager
def extra(name: str):
    """Imports inside it belong to an optional part of the package; the error for a missing one says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise MissingExtraError(f"{package} is not installed: pip install fastvae-kernels[{name}]", name=package) from error
