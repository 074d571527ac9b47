"""Operators work on blocks of a matrix, so that the temporaries of a block stay in the caches of the CPU that computes it."""

import math
import threading
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastvae.fallback import _device
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, reduction_scale

# A float32 temporary of so many elements is 2 MiB. In smaller blocks the launches of operations, some microseconds each, take a third of
# the time; the temporaries of larger ones leave the last of the caches.
_ELEMENTS_PER_THREAD = 1 << 19
# Elsewhere the time to launch an operation decides, so blocks only bound the memory of the temporaries.
_ELEMENTS_ELSEWHERE = 1 << 24
# The most bytes in a dtype that a thread keeps for temporaries.
_KEPT_BYTES = 1 << 26

Block = tuple[slice, slice]
# The block of a matrix that is small enough to be one; no view of it is made, which counts where tensors are small.
_WHOLE = slice(None), slice(None)


def block_elements(device: torch.device) -> int:
    """The number of elements of a block on ``device``."""
    return _ELEMENTS_PER_THREAD * torch.get_num_threads() if _device.is_cpu(device) else _ELEMENTS_ELSEWHERE


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """(samples, elements of a sample)."""
    return (shape[0], math.prod(shape[1:])) if len(shape) else (1, 1)


def blocks(rows: int, columns: int, device: torch.device, width: int = 1) -> Iterator[Block]:
    """The blocks of a matrix, for :func:`take`; each block of a contiguous matrix is contiguous.

    Args:
        width: the number of elements that stand behind an entry of the matrix.
    """
    limit = max(block_elements(device) // max(width, 1), 1)
    if rows * columns * width == 0:
        return
    if rows * columns <= limit:
        yield _WHOLE
    elif columns > limit:
        step = even_step(columns, limit)
        for row in range(rows):
            for column in range(0, columns, step):
                yield slice(row, row + 1), slice(column, min(column + step, columns))
    else:
        step = even_step(rows, limit // columns)
        for row in range(0, rows, step):
            yield slice(row, min(row + step, rows)), slice(0, columns)


def even_step(length: int, limit: int) -> int:
    """The length of each piece where as few pieces as possible are of nearly the same length."""
    return -(-length // -(-length // limit))


def take(matrix: Tensor, block: Block) -> Tensor:
    """The block of a matrix whose dimensions of size 1 are broadcast."""
    if block is _WHOLE:
        return matrix
    rows, columns = block
    return matrix[rows if matrix.shape[0] > 1 else slice(None), columns if matrix.shape[1] > 1 else slice(None)]


def shared_matrix(value: Tensor, shape: torch.Size) -> Tensor:
    """``value``, which broadcasts to ``shape`` and has as many dimensions, as a matrix that broadcasts to :func:`matrix_shape`.

    A dimension in which the value does not vary keeps the size 1, so that at most one sample is written out.
    """
    if not len(shape):
        return value.reshape(1, 1)
    rows = shape[0] if value.shape[0] != 1 else 1
    trailing = shape[1:] if math.prod(value.shape[1:]) != 1 else value.shape[1:]
    return value.expand(rows, *trailing).reshape(rows, math.prod(trailing))


class Reduced:
    """The reduction of elements that are computed block by block, for operators whose result has the shape of ``like``."""

    def __init__(self, like: Tensor, reduction: int):
        self.like, self.shape, self.reduction = like, like.shape, reduction
        size, dtype = matrix_shape(like.shape), accumulation_dtype(like.dtype)
        if reduction == REDUCTIONS["none"]:
            self.elements = like.new_empty(size)
        elif reduction == REDUCTIONS["sample"]:
            self.samples = like.new_zeros(size[0], dtype=dtype)
        else:
            self.sums: list[Tensor] = []

    def add(self, block: Block, elements: Tensor) -> None:
        if self.reduction == REDUCTIONS["none"]:
            take(self.elements, block).copy_(elements)
        elif self.reduction == REDUCTIONS["sample"]:
            self.samples[block[0]].add_(elements.sum(1))
        else:
            self.sums.append(elements.sum())

    def result(self) -> Tensor:
        if self.reduction == REDUCTIONS["none"]:
            return self.elements.view(self.shape)
        if self.reduction == REDUCTIONS["sample"]:
            return self.samples.view(self.shape[:1])
        if not self.sums:
            return self.like.new_zeros((), dtype=accumulation_dtype(self.like.dtype))
        total = self.sums[0] if len(self.sums) == 1 else torch.stack(self.sums).sum()
        return total.mul_(reduction_scale(self.shape, self.reduction))


def gradient_matrix(grad_output: Tensor, shape: torch.Size, reduction: int, dtype: torch.dtype) -> Tensor:
    """The gradient of :class:`Reduced` as a matrix that broadcasts to the samples and their elements."""
    rows, columns = matrix_shape(shape)
    size = {REDUCTIONS["none"]: (rows, columns), REDUCTIONS["sample"]: (rows, 1)}.get(reduction, (1, 1))
    return grad_output.to(dtype).reshape(size) * reduction_scale(shape, reduction)


class Room:
    """Memory for a temporary of each block in turn."""

    def __init__(self, memory: Tensor):
        self.memory = memory
        # The piece whose elements the memory holds, where it is known.
        self.piece: Tensor | None = None

    def like(self, piece: Tensor) -> Tensor:
        """The memory in the shape of a piece; what it held is lost."""
        return self.shaped(piece.shape, piece.device)

    def shaped(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        size, self.piece = math.prod(shape), None
        if self.memory.numel() < size or self.memory.device != device:
            # A later call outside inference mode could not write a tensor that was made inside.
            with torch.inference_mode(False):
                self.memory = torch.empty(size, dtype=self.memory.dtype, device=device)
        return self.memory[:size].view(shape)

    def widened(self, piece: Tensor) -> Tensor:
        """The piece in the dtype of the memory and contiguous, so that sums do not depend on strides: itself, where it is so.

        It is only read: what was widened last is not widened again.
        """
        if piece.dtype == self.memory.dtype and piece.is_contiguous():
            return piece
        if piece is self.piece:
            return self.memory[: piece.numel()].view(piece.shape)
        widened = self.like(piece).copy_(piece)
        self.piece = piece
        return widened


class _Kept(threading.local):
    """The memory of a thread's rooms that are not in use, on a CPU: what is asked for anew comes as pages that the system clears first,
    which takes as long as an operation or two on them."""

    def __init__(self):
        self.memories: dict[torch.dtype, list[Tensor]] = defaultdict(list)

    def take(self, dtype: torch.dtype) -> Tensor:
        memories = self.memories[dtype]
        return memories.pop() if memories else torch.empty(0, dtype=dtype, device="cpu")

    def put(self, memory: Tensor) -> None:
        memories = self.memories[memory.dtype]
        if _device.is_cpu(memory.device) and memory.nbytes + sum(kept.nbytes for kept in memories) <= _KEPT_BYTES:
            memories.append(memory)


_kept = _Kept()


class Rooms:
    """The rooms of a call by their names, in one dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.rooms: dict[Hashable, Room] = {}

    def __getitem__(self, name: Hashable) -> Room:
        if name not in self.rooms:
            self.rooms[name] = Room(_kept.take(self.dtype))
        return self.rooms[name]

    def __enter__(self) -> "Rooms":
        return self

    def __exit__(self, *_) -> None:
        # The room that is asked for first finds its own memory again.
        for room in reversed(self.rooms.values()):
            _kept.put(room.memory)


@contextmanager
def written(output: Tensor, room: Room) -> Iterator[Tensor]:
    """Memory in the room's dtype for what ``output`` gets: itself, where it is of that dtype."""
    memory = output if output.dtype == room.memory.dtype else room.like(output)
    yield memory
    if memory is not output:
        output.copy_(memory)
