"""Long trainings: many steps with batches of changing sizes, after which memory and losses are looked at."""

import ctypes
import gc
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from _tiny_models import batch, make, total_loss

# Sizes of batches; of one sample some estimates do not exist.
ROWS = (2, 3, 4, 7, 8, 16, 33)
# Steps in which caches, allocators and optimizers reach their size.
WARM_UP = 50
PAGE = os.sysconf("SC_PAGE_SIZE")
# Pages of which a part is in use stay with the allocator of C, some megabytes. A tensor that each step leaves behind adds up to more:
# the smallest batch is of 128 bytes, beside its graph of some kilobytes.
MAX_GROWTH = 8 * 2**20


def resident_bytes() -> int:
    """The memory of this process that is in use, without what is collected.

    The allocator of C hands back what is free: otherwise what is left behind lies in pages that the process had before, and is not seen.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@dataclass
class Soak:
    steps: int
    growth: int  # of the resident memory after the warm-up, in bytes
    objects: int  # more of them than after the warm-up
    first: float  # loss
    last: float


def soak(name: str, steps: int) -> Soak:
    """Trains a tiny model.

    Raises:
        FloatingPointError: with the step, where a loss is not finite.
    """
    model, generator = make(name).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses: list[float] = []
    memory = objects = 0
    for step in range(steps):
        if step == min(WARM_UP, steps // 2):
            memory, objects = resident_bytes(), len(gc.get_objects())
        loss = total_loss(model(*batch(name, ROWS[step % len(ROWS)], generator)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{name}: the loss of step {step} is {value}")
        losses = [*losses[:1], value]
    del loss
    return Soak(steps, resident_bytes() - memory, len(gc.get_objects()) - objects, losses[0], losses[-1])
