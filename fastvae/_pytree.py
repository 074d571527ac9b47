"""Named tuples that torch.export.save can write."""

from typing import TypeVar

from torch.utils._pytree import _register_namedtuple

T = TypeVar("T", bound=tuple)


def exportable(cls: type[T]) -> type[T]:
    """Decorates a named tuple that a model or a function returns: an exported program that returns it can be saved, and loaded where the
    module that defines it has been imported."""
    _register_namedtuple(cls, serialized_type_name=f"{cls.__module__}.{cls.__qualname__}")
    return cls
