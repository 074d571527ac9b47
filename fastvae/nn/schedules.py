"""Weights that change in training: pure functions of the step, as data, and the module that counts the steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

Schedule = Callable[[int], float]


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

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


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

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * 0.5 * (1.0 - math.cos(math.pi * min(step / self.steps, 1.0)))


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

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        # In integers, so that a cycle starts at exactly `start`.
        position = step * self.cycles % self.steps / self.steps
        return self.start + (self.end - self.start) * min(position / self.ratio, 1.0)


@dataclass(frozen=True)
class CapacitySchedule(LinearSchedule):
    """The capacity C of Burgess et al., *Understanding disentangling in beta-VAE* (2018): from 0 to ``end`` nats in ``steps`` steps.

    Args:
        steps: batches or epochs, whichever the caller counts; 100,000 batches in the paper.
        start, end: nats per sample.
    """

    end: float = 25.0


# A checkpoint that holds a schedule loads with torch.load's weights_only=True.
torch.serialization.add_safe_globals([LinearSchedule, CosineSchedule, CyclicalSchedule, CapacitySchedule])


class ScheduledKL(nn.Module):
    """``beta`` and ``capacity`` of a loss with a KL term, each a number or a schedule.

    A number is an attribute. A schedule's value at the current step is a buffer, so that a compiled graph or a CUDA graph reads a new value
    without being made anew. The number of steps taken, ``num_steps``, is a buffer too, and the only one in the ``state_dict``.
    """

    def __init__(self, beta: float | Schedule, capacity: float | Schedule | None):
        super().__init__()
        self.schedules: dict[str, Schedule] = {}
        self._steps_taken = 0
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))
        self._register("beta", beta)
        if capacity is None:
            self.capacity = None
        else:
            self._register("capacity", capacity)
        self.register_load_state_dict_post_hook(_resume)

    def _register(self, name: str, weight: float | Schedule) -> None:
        if callable(weight):
            self.schedules[name] = weight
            self.register_buffer(name, torch.tensor(float(weight(0))), persistent=False)
        elif isinstance(weight, bool) or not isinstance(weight, int | float) or not weight >= 0:
            raise ValueError(f"{name}: got {weight!r}, takes a number >= 0 or a schedule")
        else:
            setattr(self, name, float(weight))

    def step(self) -> None:
        """Advances the schedules by one: call it once a batch or once an epoch, after the optimizer's ``step()``."""
        self.num_steps += 1
        self._set_weights(self._steps_taken + 1)

    def _set_weights(self, steps_taken: int) -> None:
        # Counted in Python as well: reading the buffer would make a GPU wait at every step.
        self._steps_taken = steps_taken
        for name, schedule in self.schedules.items():
            getattr(self, name).fill_(schedule(steps_taken))

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={self.schedules.get(name, getattr(self, name))}" for name in ("beta", "capacity"))


def _resume(module: ScheduledKL, _) -> None:
    module._set_weights(int(module.num_steps))
