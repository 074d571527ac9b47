"""What the tests change in Triton's interpreter: it takes less time, and an access outside the arguments of a kernel is an error."""

import numpy
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


class LanguageOfALaunch:
    """Gives triton.language its interpreted functions once a launch. The interpreter does it again at each call of a function that is not a
    kernel, by looking through the whole module, and that is half of the time that its programs take."""

    def __init__(self):
        self.patch, self.scope, self.patched = interpreter._patch_lang, interpreter._LangPatchScope(), set()

    def __call__(self, function):
        modules = {module.__name__ for module in (tl, tl.core) if any(value is module for value in function.__globals__.values())}
        if not self.scope._changes:
            self.patched.clear()
        if not modules <= self.patched:
            # The launch restores these changes too when it ends.
            self.scope._changes += self.patch(function)._changes
            self.patched |= modules
        return self.scope


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of the first byte of a tensor and of the one after its last."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def tensors_of(arguments) -> list[torch.Tensor]:
    """Those in a tuple of arguments; operands of many members are tuples themselves."""
    return [
        tensor
        for argument in arguments
        for tensor in (tensors_of(argument) if isinstance(argument, tuple) else [argument])
        if isinstance(tensor, torch.Tensor)
    ]


class Memory:
    """The memory of the tensors that a launch has as arguments."""

    def __init__(self):
        self.begins = self.ends = numpy.zeros(0, numpy.uint64)

    def set(self, tensors: list[torch.Tensor]) -> None:
        pieces: list[list[int]] = []
        for begin, end in sorted(map(extent, tensors)):
            if pieces and begin <= pieces[-1][1]:
                pieces[-1][1] = max(pieces[-1][1], end)
            else:
                pieces.append([begin, end])
        self.begins, self.ends = numpy.array(pieces, numpy.uint64).reshape(-1, 2).T

    def check(self, pointers, mask) -> None:
        addresses = pointers.data[mask.data] if mask is not None else pointers.data.ravel()
        size = numpy.uint64(max(pointers.get_element_ty().primitive_bitwidth // 8, 1))
        place = numpy.searchsorted(self.begins, addresses, side="right")
        outside = (place == 0) | (addresses + size > self.ends[numpy.maximum(place, 1) - 1])
        if outside.any():
            raise IndexError(f"{int(outside.sum())} of {addresses.size} lanes access memory outside the arguments of the kernel")


def watch_memory(patch) -> None:
    """Makes an access outside the arguments of a kernel an error, of lanes that a mask does not exclude."""
    memory = Memory()
    init, load, store = GridExecutor._init_args_hst, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    exchange, update = InterpreterBuilder.create_atomic_cas, InterpreterBuilder.create_atomic_rmw

    def init_arguments(self, arguments, options):
        on_host = init(self, arguments, options)
        memory.set(tensors_of((*on_host[0], *on_host[1].values())))
        return on_host

    def create_masked_load(self, pointers, mask, *rest):
        memory.check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self, pointers, value, mask, *rest):
        memory.check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def create_atomic_cas(self, pointers, *rest):
        memory.check(pointers, None)
        return exchange(self, pointers, *rest)

    def create_atomic_rmw(self, operation, pointers, value, mask, *rest):
        memory.check(pointers, mask)
        return update(self, operation, pointers, value, mask, *rest)

    patch.setattr(GridExecutor, "_init_args_hst", init_arguments)
    for function in (create_masked_load, create_masked_store, create_atomic_cas, create_atomic_rmw):
        patch.setattr(InterpreterBuilder, function.__name__, function)
