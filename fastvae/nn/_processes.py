"""The collective calls of the quantizers. All processes have to make the same ones in the same order, so which ones are made depends on the
mode and the options alone, never on the data of one process."""

import torch
from torch import Tensor, distributed


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def world_size() -> int:
    return distributed.get_world_size()


def all_reduce(*tensors: Tensor) -> None:
    """Sums each tensor over all processes, in place."""
    if is_distributed():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def broadcast(*tensors: Tensor, src: int = 0) -> None:
    """Gives all processes the values that ``src`` has, in place."""
    if is_distributed():
        for tensor in tensors:
            distributed.broadcast(tensor, src=src)


def where_true(flag: Tensor) -> list[int]:
    """The ranks on which ``flag``, a 0-dim bool, is true. The host waits for the answer."""
    flags = torch.zeros(distributed.get_world_size(), dtype=torch.int64, device=flag.device)
    flags[distributed.get_rank()] = flag
    distributed.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def draw_depth(fewest: int, most: int, device: torch.device, *, shared: bool) -> int:
    """A random integer in ``[fewest, most]``; with ``shared`` that of the first process in all, which would otherwise make different
    numbers of collective calls and wait for each other for ever."""
    drawn = torch.randint(fewest, most + 1, ())
    if shared and is_distributed():
        drawn = drawn.to(device)
        broadcast(drawn)
    return int(drawn)
