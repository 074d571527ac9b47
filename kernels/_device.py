"""The device of a launch: its machine, the current device and the ticket counters. Importing this touches no device."""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from fastvae._gpu import architecture
from fastvae.kernels._launch import Machine
from fastvae.ops._operator import Operator

# Under TRITON_INTERPRET=1 Triton runs the kernels on the CPU with numpy.
DISPATCH_KEYS = ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",)

# With 16 programs even the small tensors of the tests are shared among several, each of which handles several blocks.
_INTERPRETER = Machine("interpreter", 2, programs=16)

_tickets: dict[tuple[int, int], Tensor] = {}


def implements(operator: Operator):
    """Registers the decorated launcher as the Triton implementation of ``operator``."""
    return operator.implement("triton", DISPATCH_KEYS)


def machine(device: torch.device) -> Machine:
    """The machine that launch configurations on ``device`` are computed for."""
    return _INTERPRETER if device.type == "cpu" else _machine(device.index)


@functools.cache
def _machine(index: int) -> Machine:
    return Machine(architecture(index), torch.cuda.get_device_properties(index).multi_processor_count)


def on(device: torch.device):
    """A context in which ``device`` is the current one, because that is where Triton launches."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def ticket(device: torch.device) -> Tensor:
    """A ticket counter, an int32 scalar on ``device`` that is 0. With it the programs of one launch find out which is the last, see
    :func:`fastvae.kernels._reduce.is_last`; the last one resets it to 0.

    Each stream has its own, because launches on different streams overlap, and those on one stream do not. While a graph is captured this
    returns a new counter, whose zeroing is part of the graph, because the graph may be replayed on any stream.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    key = device.index, triton.runtime.driver.active.get_current_stream(device.index)
    if key not in _tickets:
        # Another thread allocates it, because this one may direct its allocations to the memory pool of a graph (torch.compile does so
        # before it captures), which does not outlive the graph.
        with ThreadPoolExecutor(1) as thread:
            _tickets.setdefault(key, thread.submit(_new_ticket, torch.cuda.current_stream(device)).result())
    return _tickets[key]


def _new_ticket(stream: torch.cuda.Stream) -> Tensor:
    # The zero is written on the stream of the launches, so that they see it and nobody waits for the device.
    with torch.cuda.stream(stream):
        return torch.zeros((), dtype=torch.int32, device=stream.device)
