"""Weights that change in training: pure functions of the step, as data, and the module that counts the steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastvae._torch_private import not_compiled
from fastvae.nn._snapshot import snapshot

Schedule = Callable[[int], float]


def _share(step: int | Tensor, steps: float) -> Any:
    """How much of ``steps`` is over, at most 1."""
    share = step / steps
    return share.clamp(max=1.0) if isinstance(share, Tensor) else min(share, 1.0)


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps: got {steps!r}, takes an integer >= 1")


@dataclass(frozen=True)
class LinearSchedule:
    """Straight from ``start`` to ``end`` in ``steps`` steps, ``end`` from there on.

    As the weight of the KL: the warm-up of Bowman et al., *Generating Sentences from a Continuous Space* (2016), and of Sønderby et al.,
    *Ladder Variational Autoencoders* (2016).

    Args:
        steps: batches or epochs, whichever the caller counts.
        start, end: the first and the last value.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        _check_steps(self.steps)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return self.start + (self.end - self.start) * _share(step, self.steps)


@dataclass(frozen=True)
class CosineSchedule:
    """From ``start`` to ``end`` in ``steps`` steps along half a cosine wave, flat at both ends; ``end`` from there on.

    Args:
        steps: batches or epochs, whichever the caller counts.
        start, end: the first and the last value.
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        _check_steps(self.steps)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        cos = torch.cos if isinstance(step, Tensor) else math.cos
        return self.start + (self.end - self.start) * 0.5 * (1.0 - cos(math.pi * _share(step, self.steps)))


@dataclass(frozen=True)
class CyclicalSchedule:
    """``cycles`` times: straight from ``start`` to ``end``, then held there. After ``steps`` steps it stays at ``end``.

    Fu et al., *Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing* (2019), with their defaults.

    Args:
        steps: length of all cycles together, in batches or epochs.
        cycles: their number.
        ratio: the share of a cycle that rises.
        start, end: the first and the last value of a cycle.
    """

    steps: int
    cycles: int = 4
    ratio: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        _check_steps(self.steps)
        if isinstance(self.cycles, bool) or not isinstance(self.cycles, int) or not 1 <= self.cycles <= self.steps:
            raise ValueError(f"cycles: got {self.cycles!r}, takes an integer from 1 to steps, {self.steps}")
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"ratio: got {self.ratio!r}, takes a number in (0, 1]")

    def __call__(self, step: int | Tensor) -> float | Tensor:
        # The position is computed in integers, so that a cycle starts at exactly `start`.
        position = step * self.cycles % self.steps
        value = self.start + (self.end - self.start) * _share(position, self.steps * self.ratio)
        if isinstance(step, Tensor):
            return torch.where(step >= self.steps, self.end, value)
        return self.end if step >= self.steps else value


@dataclass(frozen=True)
class CapacitySchedule(LinearSchedule):
    """The capacity C of Burgess et al., *Understanding disentangling in beta-VAE* (2018): from 0 to ``end`` nats in ``steps`` steps.

    Args:
        steps: batches or epochs, whichever the caller counts; 100,000 batches in the paper.
        start, end: nats per sample.
    """

    end: float = 25.0


# Their arithmetic serves numbers and tensors. A subclass may override it, so it is not among them.
_TAKE_TENSORS = (LinearSchedule, CosineSchedule, CyclicalSchedule, CapacitySchedule)

# torch.load with weights_only=True loads a checkpoint that holds one of these schedules.
torch.serialization.add_safe_globals(list(_TAKE_TENSORS))


class ScheduledKL(nn.Module):
    """``beta`` and ``capacity`` of a loss with a KL term, each a number or a schedule; either may be set anew.

    At each use the buffer ``num_steps``, the number of steps taken, decides, whoever wrote it: :meth:`step`, a checkpoint, an average of
    models or the broadcast of another rank. Where there is a schedule it is all that is in the ``state_dict``; without one the
    ``state_dict`` is empty. The package's schedules are computed on the buffer's device, in a compiled graph or a CUDA graph too. Any other
    function is called with the number as an integer, for which a GPU has to be waited for where other than :meth:`step` has changed it.
    Graphs read the function's value from a buffer, which :meth:`step`, loading a checkpoint and a call outside of graphs write.
    """

    num_steps: Tensor

    def __init__(self, beta: float | Schedule, capacity: float | Schedule | None):
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        self._numbers: dict[str, float | None] = {}
        self._known_steps: tuple[Tensor | None, int, int] = None, 0, 0
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self._set("beta", beta)
        self._set("capacity", capacity)
        self.register_load_state_dict_post_hook(_follow)

    @property
    def beta(self) -> float | Tensor:
        return cast("float | Tensor", self._get("beta"))

    @beta.setter
    def beta(self, weight: float | Schedule) -> None:
        self._set("beta", weight)

    @property
    def capacity(self) -> float | Tensor | None:
        return self._get("capacity")

    @capacity.setter
    def capacity(self, weight: float | Schedule | None) -> None:
        self._set("capacity", weight)

    def _set(self, name: str, weight: float | Schedule | None) -> None:
        if callable(weight):
            self.schedules[name] = weight
            if type(weight) not in _TAKE_TENSORS:
                self.register_buffer(_buffer(name), torch.zeros((), device=self.num_steps.device), persistent=False)
                self._call_functions(int(self.num_steps))
            self._store_steps()
            return
        if weight is not None or name != "capacity":
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
                raise ValueError(f"{name}: got {weight!r}, takes a number >= 0 or a schedule")
            weight = float(weight)
        self.schedules.pop(name, None)
        self._buffers.pop(_buffer(name), None)
        self._numbers[name] = weight
        self._store_steps()

    def _store_steps(self) -> None:
        """Puts the number of steps into the ``state_dict`` where there is a schedule, and only there."""
        self.register_buffer("num_steps", self.num_steps, persistent=bool(self.schedules))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A module without schedules keeps the count of a checkpoint that has one, because a schedule may be set later.
        steps = None if self.schedules else state_dict.pop(prefix + "num_steps", None)
        if steps is not None:
            self.num_steps.copy_(steps)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _get(self, name: str) -> float | Tensor | None:
        schedule = self.schedules.get(name)
        if schedule is None:
            return self._numbers[name]
        if type(schedule) in _TAKE_TENSORS:
            value = cast("Callable[[Tensor], Tensor]", schedule)(self.num_steps)
            return snapshot(value) if torch.compiler.is_compiling() else value
        if torch.compiler.is_compiling():
            return snapshot(getattr(self, _buffer(name)))
        if self._steps_are_unknown():
            self._call_functions(int(self.num_steps))
        # Autograd may hold the value until after the next step, which writes to the buffer.
        return getattr(self, _buffer(name)).clone()

    def step(self) -> None:
        """Advances the schedules by one: call it once a batch or once an epoch. A loss that was computed before keeps its weights."""
        if all(type(schedule) in _TAKE_TENSORS for schedule in self.schedules.values()):
            self.num_steps.add_(1)
        else:
            self._step_functions()

    @not_compiled
    def _step_functions(self) -> None:
        steps = int(self.num_steps) if self._steps_are_unknown() else self._known_steps[2]
        self.num_steps.add_(1)
        self._call_functions(steps + 1)

    def _steps_are_unknown(self) -> bool:
        # Each write raises the version of the buffer. Reading its value instead would make a GPU wait at every step.
        if self.num_steps.is_inference():
            return True
        buffer, version, _ = self._known_steps
        return buffer is not self.num_steps or version != self.num_steps._version

    def _call_functions(self, steps: int) -> None:
        for name, schedule in self.schedules.items():
            if type(schedule) not in _TAKE_TENSORS:
                getattr(self, _buffer(name)).fill_(schedule(steps))
        self._known_steps = self.num_steps, self.num_steps._version, steps

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self.schedules.get(name, self._numbers.get(name))}" for name in ("beta", "capacity"))


def _follow(module: ScheduledKL, _) -> None:
    if any(type(schedule) not in _TAKE_TENSORS for schedule in module.schedules.values()):
        module._call_functions(int(module.num_steps))


def _buffer(name: str) -> str:
    return f"_{name}_now"
