"""What launchers need to know of the device they launch on; nothing here runs at import."""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
from torch import Tensor

from fastvae.kernels._launch import Machine

# Under TRITON_INTERPRET=1 the kernels run on the CPU, on numpy.
DISPATCH_KEYS = ("CUDA", "CPU") if triton.knobs.runtime.interpret else ("CUDA",)

# Two multiprocessors, so that small tensors go through several programs.
_INTERPRETER = Machine("interpreter", 2)

_tickets: dict[tuple[int, int], Tensor] = {}


def implements(operator: str):
    """Registers the decorated launcher as the Triton implementation of ``operator``."""

    def register(launcher):
        torch.library.impl(f"fastvae::{operator}.triton", DISPATCH_KEYS, launcher)
        return launcher

    return register


def machine(device: torch.device) -> Machine:
    return _INTERPRETER if device.type == "cpu" else _machine(device.index)


@functools.cache
def _machine(index: int) -> Machine:
    properties = torch.cuda.get_device_properties(index)
    architecture = properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return Machine(architecture, properties.multi_processor_count)


def on(device: torch.device):
    """Triton launches on the current device: makes it that of the tensors."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def ticket(device: torch.device) -> Tensor:
    """A counter that is 0, for the programs of one launch to tell who is last; the last puts it back to 0.

    One a stream, since launches on different streams overlap and those on one do not. While a graph is captured, a new one whose zero is
    part of the graph: the graph may be replayed on any stream.
    """
    if device.type == "cpu" or torch.cuda.is_current_stream_capturing():
        return torch.zeros((), dtype=torch.int32, device=device)
    key = device.index, triton.runtime.driver.active.get_current_stream(device.index)
    if key not in _tickets:
        # In a thread of its own: this one may direct its allocations to the pool of a graph (torch.compile does, before it captures),
        # whose memory does not outlive the graph.
        with ThreadPoolExecutor(1) as thread:
            _tickets[key] = thread.submit(_new_ticket, device).result()
    return _tickets[key]


def _new_ticket(device: torch.device) -> Tensor:
    zero = torch.zeros((), dtype=torch.int32, device=device)
    # Once a stream: this thread's stream is not the one that the ticket is for.
    torch.cuda.current_stream(device).synchronize()
    return zero
