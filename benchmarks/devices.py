"""How time and memory are taken on each kind of device.

A device offers ``modes``. In ``launch`` every call starts from Python, as in a plain training loop; in ``graph`` (CUDA) the calls are
replayed from a CUDA graph, so that the device's time is seen alone.
"""

import itertools
import math
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.registry import Operation, Unavailable
from fastvae.training import _measure

# Runs at least so many operations and returns the seconds of one.
Sample = Callable[[int], float]

# The flags of /proc/cpuinfo that decide how fast products are, and what they are called here. A processor with a vector extension has
# those before it too.
VECTOR_EXTENSIONS = {"avx2": "avx2", "avx512f": "avx512", "avx512_vnni": "avx512_vnni", "avx512_bf16": "avx512_bf16"}
MATRIX_EXTENSIONS = {"amx_bf16": "amx"}


def decisive(features: Iterable[str]) -> tuple[str, ...]:
    """The features that tell one processor from another of the same name: the last vector extension, and those for matrices."""
    features = tuple(features)
    vector = [name for name in VECTOR_EXTENSIONS.values() if name in features]
    return (*vector[-1:], *(name for name in MATRIX_EXTENSIONS.values() if name in features))


class Cpu:
    kind = "cpu"
    modes = ("launch",)
    # The backends that are measured one against the other, beside the one that a call takes by itself.
    backends: tuple[str, ...] = ()
    device = torch.device("cpu")
    matmul_size = 1024

    @property
    def name(self) -> str:
        return _cpuinfo("model name") or platform.processor() or platform.machine()

    @property
    def features(self) -> tuple[str, ...]:
        flags = _cpuinfo("flags").split()
        return tuple(name for flag, name in (VECTOR_EXTENSIONS | MATRIX_EXTENSIONS).items() if flag in flags)

    def rotation(self, nbytes: int) -> int:
        """How many sets of inputs the calls take in turn. One: in a training step what a loss reads has just been written."""
        return 1

    def sampler(self, operations: Sequence[Operation], mode: str) -> Sample:
        turn = itertools.cycle(operations)

        def sample(calls: int) -> float:
            start = time.perf_counter()
            for operation in itertools.islice(turn, calls):
                operation()
            return (time.perf_counter() - start) / calls

        return sample

    def synchronised(self, operation: Operation) -> Operation:
        """The operation as one that is over when it returns."""
        return operation

    def peak_memory(self, operation: Operation) -> int:
        """The most bytes that torch's allocator held during one call, over what it held before."""
        return _measure.peak_memory(operation)


def _cpuinfo(key: str) -> str:
    """A line of the first processor's description; empty where the system has none."""
    listing = Path("/proc/cpuinfo")
    found = re.search(rf"^{key}\s*: (.+)$", listing.read_text(), re.MULTILINE) if listing.exists() else None
    return found[1] if found else ""


class Cuda:
    kind = "cuda"
    modes = ("launch", "graph")
    backends: tuple[str, ...] = ("cuda", "triton")
    features: tuple[str, ...] = ()
    matmul_size = 8192

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)

    @property
    def name(self) -> str:
        return self.properties.name

    def rotation(self, nbytes: int) -> int:
        """As many sets of inputs as exceed the L2 cache twice, up to 64: a set this small stays in the cache in real use too."""
        return min(1 + math.ceil(2 * self.properties.L2_cache_size / nbytes), 64)

    def sampler(self, operations: Sequence[Operation], mode: str) -> Sample:
        if mode == "launch":
            return self._timed(operations)
        replay = _capture(operations).replay

        def sample(calls: int) -> float:
            return replays(math.ceil(calls / len(operations))) / len(operations)

        replays = self._timed([replay])
        return sample

    def _timed(self, operations: Sequence[Operation]) -> Sample:
        turn = itertools.cycle(operations)
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample(calls: int) -> float:
            start.record()
            for operation in itertools.islice(turn, calls):
                operation()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) * 1e-3 / calls

        return sample

    def synchronised(self, operation: Operation) -> Operation:
        """The operation as one that is over when it returns."""

        def synchronised():
            outputs = operation()
            torch.cuda.synchronize(self.device)
            return outputs

        return synchronised

    def peak_memory(self, operation: Operation) -> int:
        """The most bytes that torch's allocator held during one call, over what it held before."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        operation()
        return torch.cuda.max_memory_allocated(self.device) - before


def _capture(operations: Sequence[Operation]) -> torch.cuda.CUDAGraph:
    """One graph of all the operations; a few calls on a side stream come first, as torch's notes on CUDA graphs ask."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for operation in (*operations, *operations):
                operation()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            for operation in operations:
                operation()
    except RuntimeError as error:
        raise Unavailable(f"cannot be captured in a CUDA graph: {error}") from error
    return graph


Device = Cpu | Cuda


def available() -> tuple[Device, ...]:
    return (Cpu(), Cuda()) if torch.cuda.is_available() else (Cpu(),)


def named(kind: str) -> Device:
    found = {device.kind: device for device in available()}
    if kind not in found:
        raise Unavailable(f"device: got {kind!r}, this machine has {', '.join(found)}")
    return found[kind]
