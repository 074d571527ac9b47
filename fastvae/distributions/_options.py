"""Objects that a stored model can hold: they remember the arguments that made them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any


def _recording(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: "Stored", *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        # A constructor that calls its base's would leave the base's arguments.
        if type(self).__init__ is wrapper:
            bound = signature.bind(self, *args, **kwargs)
            bound.apply_defaults()
            (_, _), *options = bound.arguments.items()
            self.options = dict(options)

    return wrapper


class Stored:
    """A base of priors, posteriors and likelihoods: ``options`` holds the arguments of the constructor by name."""

    # A class without a constructor of its own has no arguments.
    options: Mapping[str, Any] = MappingProxyType({})

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)  # type: ignore[method-assign]
