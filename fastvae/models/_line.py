"""The way between two latents."""

import torch
from torch import Tensor


def points_between(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """``steps`` points on the line between the samples of two batches, both ends included: ``(batch, steps, ...)``.

    Raises:
        ValueError: for batches of different shapes, or fewer than one step.
    """
    if first.shape != last.shape:
        raise ValueError(f"end: got a batch whose latents have shape {tuple(last.shape)}, takes that of start, {tuple(first.shape)}")
    if steps < 1:
        raise ValueError(f"steps: got {steps}, takes an integer of at least 1")
    weights = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype).view(-1, *(1,) * (first.ndim - 1))
    return torch.lerp(first.unsqueeze(1), last.unsqueeze(1), weights)
