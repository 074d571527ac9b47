"""The recipe of a ready-made network: the class, the network and the options that make it again."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from fastvae import distributions
from fastvae.distributions._options import Stored
from fastvae.nn.conditions import ClassCondition, SequenceCondition, VectorCondition
from fastvae.nn.corruption import GaussianNoise, Masking, SaltAndPepper
from fastvae.nn.schedules import CapacitySchedule, CosineSchedule, CyclicalSchedule, LinearSchedule

P = ParamSpec("P")
R = TypeVar("R")

# Options that are objects, and the arguments that make each again.
_MODULES: dict[type, tuple[str, ...]] = {
    GaussianNoise: ("sigma",),
    Masking: ("fraction",),
    SaltAndPepper: ("fraction", "low", "high"),
    ClassCondition: ("num_classes", "dim"),
    VectorCondition: ("size", "dim"),
    SequenceCondition: ("features", "dim"),
}
_SCHEDULES = (LinearSchedule, CosineSchedule, CyclicalSchedule, CapacitySchedule)
_PARTS: dict[str, type] = {part.__name__: part for part in (*_MODULES, *_SCHEDULES)}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A call of a ready-made network: ``model`` is the class, ``network`` the classmethod, ``options`` its arguments by name."""

    model: str
    network: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model}.{self.network}"


def ready_made(make: Callable[P, R]) -> Callable[P, R]:
    """Decorates a classmethod that makes a model: the model keeps its :class:`Recipe` in the attribute ``recipe``.

    A checkpoint holds tensors alone. With the recipe it can be read without the program that trained it.
    """
    signature = inspect.signature(make)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), "")

    @functools.wraps(make)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        model = make(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_, cls), *options = bound.arguments.items()
        named = dict(options)
        named |= named.pop(rest, {})
        # A network that is made by another one has the recipe of the outer call, which is written last.
        model.recipe = Recipe(cls.__name__, make.__name__, named)  # type: ignore[attr-defined]
        return model

    wrapper.is_ready_made = True  # type: ignore[attr-defined]
    return wrapper


def to_plain(name: str, value: Any) -> Any:
    """An option as JSON has it: an object becomes ``{"class": its name, ...its arguments}``, a model ``{"class": its network, ...}``.

    Raises:
        ValueError: for an object that no recipe can hold, naming the option.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [to_plain(name, item) for item in value]
    if type(value) in _SCHEDULES:
        return {"class": type(value).__name__, **dataclasses.asdict(value)}
    if type(value) in _MODULES:
        return {"class": type(value).__name__, **{argument: getattr(value, argument) for argument in _MODULES[type(value)]}}
    if isinstance(getattr(value, "recipe", None), Recipe):
        return {"class": value.recipe.name, **{option: to_plain(option, part) for option, part in value.recipe.options.items()}}
    if isinstance(value, Stored) and type(value).__name__ in distributions.__all__:
        return {"class": type(value).__name__, **{argument: to_plain(argument, option) for argument, option in value.options.items()}}
    parts = f"{', '.join(_PARTS)} and what fastvae.distributions has"
    raise ValueError(f"{name}: got {type(value).__name__}, a stored model takes numbers, strings, sequences, {parts}")


def from_plain(value: Any) -> Any:
    """The option that :func:`to_plain` was given.

    Raises:
        ValueError: for an object of a class that no recipe holds.
    """
    if isinstance(value, list):
        return tuple(from_plain(item) for item in value)
    if isinstance(value, Mapping):
        arguments = dict(value)
        part = _part(arguments.pop("class", None))
        return part(**{argument: from_plain(option) for argument, option in arguments.items()})
    return value


def _part(name: Any) -> Callable[..., Any]:
    """The ready-made network or class of :func:`to_plain` that a stored option names; a file may make nothing else."""
    # It knows every model, so it is imported when all of them are.
    from fastvae.models import registry

    if isinstance(name, str):
        if "." in name:
            return registry.find_network(name)
        if name in _PARTS:
            return _PARTS[name]
        if name in distributions.__all__:
            return getattr(distributions, name)
    raise ValueError(f"class: got {name!r}, {registry.nearest(str(name), [*_PARTS, *distributions.__all__])}")
