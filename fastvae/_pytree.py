"""Named tuples that torch.export.save can write."""

from typing import TypeVar

from fastvae._torch_private import register_namedtuple

T = TypeVar("T", bound=tuple)


def exportable(cls: type[T]) -> type[T]:
    """Decorates a named tuple that a model or a function returns: an exported program that returns it can be saved, and loaded where the
    module that defines it has been imported."""
    register_namedtuple(cls, f"{cls.__module__}.{cls.__qualname__}")
    return cls
