"""Draws from categorical distributions, one position of a sequence at a time."""

import torch
from torch import Tensor


def check_drawing(temperature: float, top_k: int | None = None) -> None:
    """Refuses options that no draw takes."""
    if not temperature >= 0:
        raise ValueError(f"temperature: got {temperature!r}, takes a number >= 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: got {top_k!r}, takes an integer >= 1 or None")


def draw(logits: Tensor, generator: torch.Generator | None, temperature: float = 1.0, top_k: int | None = None) -> Tensor:
    """One index a row, int64, from probabilities proportional to ``exp(logits / temperature)``.

    Args:
        logits: ``(batch, choices)``.
        generator: draws on its own device, so that one of the CPU gives the same noise everywhere.
        temperature: 0 takes the most probable.
        top_k: only so many of the most probable can be drawn; all with None.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        lowest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, -torch.inf)
    device = logits.device if generator is None else generator.device
    # The first of independent exponential clocks with rates p to ring is distributed as p.
    clocks = torch.empty(logits.shape, device=device).exponential_(generator=generator).to(logits.device)
    return (logits - clocks.log()).argmax(-1)
