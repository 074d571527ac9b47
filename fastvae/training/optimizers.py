"""Optimizers that skip a step on the device, and schedules of the learning rate."""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastvae._types import check_choice
from fastvae.training.adversarial import Groups
from fastvae.training.errors import TrainingError

OptimizerName = Literal["adam", "adamw", "sgd"]
ScheduleName = Literal["constant", "cosine", "linear"]


def make_optimizer(
    name: OptimizerName, parameters: Groups, *, learning_rate: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """An optimizer in one fused kernel.

    A fused kernel reads the attribute ``found_inf`` of its optimizer, a tensor on the device of the weights, and where that is 1 it leaves
    weights, moments and step counts as they are. So a step is skipped without the host's knowing; :func:`skip_step_where` sets it.
    """
    check_choice("optimizer", name, get_args(OptimizerName))
    if name == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay, fused=True)
        _start_momentum(optimizer)
        return optimizer
    make = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    return make(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)


def _start_momentum(optimizer: torch.optim.SGD) -> None:
    """Sets the momentum of each weight to 0, from which the first step is that of torch.

    torch allocates the momentum in the first step and leaves it to the kernel to write. A kernel that skips that step leaves memory that
    nobody wrote, and the second step adds it to the weights.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def skip_step_where(optimizer: torch.optim.Optimizer, flag: torch.Tensor) -> None:
    """Lets the next step of a fused optimizer change nothing where ``flag``, 0-dim and on the device of the weights, is true."""
    optimizer.found_inf = flag.float()  # type: ignore[attr-defined]


def leave_unscaling_to_the_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Makes a GradScaler treat a fused optimizer as it treats any other.

    It would let the kernel divide by the loss scale, so nobody could clip the gradients before that.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


def learning_rate_factor(name: ScheduleName, warmup_steps: int, total_steps: float) -> Callable[[int], float]:
    """The factor of the learning rate at each optimizer step: up from 0 in ``warmup_steps``, then constant or down to 0 at the last step.

    Args:
        name: ``"constant"``, ``"cosine"`` (half a wave) or ``"linear"``.
        warmup_steps: steps of the straight rise; the first one is taken with ``1 / warmup_steps``.
        total_steps: all steps, infinite where a training has no end.
    """
    check_choice("schedule", name, get_args(ScheduleName))
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps: got {warmup_steps}, takes an integer >= 0")
    if name != "constant" and math.isinf(total_steps):
        raise TrainingError(f"schedule: got {name!r} for a training without an end, takes max_epochs or max_steps, or 'constant'")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == "constant":
            return 1.0
        share = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return 0.5 * (1 + math.cos(math.pi * share)) if name == "cosine" else 1 - share

    return factor


def make_schedule(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> LambdaLR:
    """A scheduler that keeps the number of steps in a checkpoint, and not the function: a training may be resumed to go on for longer."""
    return LambdaLR(optimizer, factor)
