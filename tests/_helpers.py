"""What the tests share: where operators run, how close results have to be, and inputs in every layout."""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastvae import _backend
from fastvae.ops._results import accumulation_dtype

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

# Arithmetic is in float32 (float64 for float64) and rounds once to the dtype of the result, so the relative tolerance of a 16-bit result is
# half a unit in its last place. The noise of two backends agrees to NOISE_TOLERANCE, absolute.
TOLERANCES = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.bfloat16: {"rtol": 4.0e-3, "atol": 2e-6},
    torch.float16: {"rtol": 5.0e-4, "atol": 2e-6},
}
NOISE_TOLERANCE = 2e-6


@dataclass(frozen=True)
class Place:
    """A device and a backend that serves it; a test with an argument ``place`` runs with that backend forced (see conftest.py)."""

    device: str
    backend: str

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}"


def places(*ops: str, dtype: torch.dtype = torch.float32) -> list[Place]:
    """Every device and backend of this machine that serves all of ``ops``."""
    serving = {device: [_backend.serving(op, device, dtype) for op in ops] for device in DEVICES}
    return [Place(device, b) for device in DEVICES for b in serving[device][0] if all(b in served for served in serving[device])]


def each_place(*ops: str, dtype: torch.dtype = torch.float32):
    return pytest.mark.parametrize("place", places(*ops, dtype=dtype), ids=str)


def each_place_and_dtype(*ops: str):
    pairs = [
        pytest.param(place, dtype, id=f"{place}-{str(dtype).removeprefix('torch.')}")
        for dtype in TOLERANCES
        for place in places(*ops, dtype=dtype)
    ]
    return pytest.mark.parametrize(("place", "dtype"), pairs)


def compiled_places(op: str) -> list[Place]:
    """The CPU backends whose kernels fix the order of their sums themselves; plain PyTorch sums in an order that follows the number of
    threads."""
    return [place for place in places(op) if place.device == "cpu" and place.backend not in _backend.ON_EVERY_DEVICE]


@contextmanager
def threads(count: int):
    """Runs the CPU kernels with so many threads."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def accumulated(dtype: torch.dtype, reduction: str) -> torch.dtype:
    """The dtype of a loss."""
    return dtype if reduction == "none" else accumulation_dtype(dtype)


def assert_close(
    actual: Tensor, oracle: Tensor, dtype: torch.dtype, *, scale: float = 1.0, magnitude: float = 0.0, roundings: int = 1
) -> None:
    """``actual`` has dtype ``dtype`` and the values of ``oracle``, which is in float64.

    Args:
        scale: the size of the numbers whose difference an element is, where it is not of order 1.
        magnitude: the largest sum of absolute values behind an element, where a sum cancels.
        roundings: how often the result was rounded to ``dtype``.
    """
    assert actual.dtype == dtype
    assert actual.shape == oracle.shape
    rtol, atol = TOLERANCES[dtype]["rtol"] * roundings, TOLERANCES[dtype]["atol"] * scale
    rounded = oracle.to(dtype).double()
    expected = torch.where(rounded.isinf(), rounded, oracle)
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=max(atol, rtol * magnitude), equal_nan=True)


def assert_gradient_close(gradient: Tensor, full_oracle: Tensor, *, scale: float = 1.0, roundings: int = 1) -> None:
    """``gradient`` of an argument is the sum of ``full_oracle``, the gradient of that argument expanded.

    Where the two differ in shape each term may have been rounded to the dtype of the argument, to half its smallest number at best.
    """
    dtype, shared = gradient.dtype, gradient.shape != full_oracle.shape and gradient.numel() > 0
    magnitude = 0.0
    if shared:
        finfo = torch.finfo(dtype)
        terms = full_oracle.numel() / gradient.numel()
        scale = max(scale, terms * finfo.tiny * finfo.eps / TOLERANCES[dtype]["atol"])
        magnitude = float(full_oracle.abs().sum_to_size(gradient.shape).max())
        roundings = 2
    summed = full_oracle.sum_to_size(gradient.shape)
    assert_close(gradient, summed, dtype, scale=scale, magnitude=magnitude, roundings=roundings)


LAYOUTS = ("contiguous", "chunked", "permuted", "sliced", "offset", "expanded", "channels_last")


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """``tensor`` in another memory layout, as it is where the layout needs more dimensions; only ``expanded`` changes values."""
    if layout == "chunked" and tensor.ndim > 1:
        return torch.cat([tensor, tensor], dim=1).chunk(2, dim=1)[1]
    if layout == "permuted":
        order = tuple(reversed(range(tensor.ndim)))
        return tensor.permute(order).contiguous().permute(order)
    if layout == "sliced" and tensor.ndim > 0:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.reshape(-1)])[1:].view(tensor.shape)
    if layout == "expanded" and tensor.numel() > 0:
        return tensor.reshape(-1)[0].expand(tensor.shape)
    if layout == "channels_last" and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


class Source:
    """Reproducible random inputs, the same on every device."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, seed: int = 0):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, layout: str = "contiguous", dtype: torch.dtype | None = None) -> Tensor:
        return self._place(torch.randn(shape, generator=self.generator, dtype=torch.float64), layout, dtype)

    def uniform(self, *shape: int, layout: str = "contiguous", dtype: torch.dtype | None = None) -> Tensor:
        return self._place(torch.rand(shape, generator=self.generator, dtype=torch.float64), layout, dtype)

    def image(self, *shape: int, layout: str = "contiguous") -> Tensor:
        return self._place(torch.randint(256, shape, generator=self.generator), layout, torch.uint8)

    def _place(self, values, layout, dtype):
        return lay_out(values.to(self.device, dtype or self.dtype), layout)


def leaf(tensor: Tensor) -> Tensor:
    """A leaf with the values and strides of ``tensor``."""
    return tensor.detach().requires_grad_()


def wide_leaf(tensor: Tensor) -> Tensor:
    """The oracle's copy: float64, of its own."""
    return tensor.detach().double().requires_grad_()


class Recorder(TorchDispatchMode):
    """Notes every operator that runs inside it."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))

    def backends(self) -> set[str]:
        """The backends of the package's operators that ran."""
        return {func._overloadname for func in self.operators if func.namespace == "fastvae"}


def kept_bytes(call: Callable[[], object], *known: Tensor) -> int:
    """The memory that the graph of what ``call`` returns keeps for the backward pass, without that of the tensors that are known."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    assert any(t.requires_grad for t in tree_leaves(result) if isinstance(t, Tensor))
    own = {tensor.untyped_storage().data_ptr() for tensor in known}
    return sum(size for address, size in storages.items() if address not in own)


def compiled_path(family: str, instruction_set: str) -> str:
    """The path of ``family`` where an instruction set is chosen: avx512_vnni has kernels of its own for the codebook's integer products."""
    return "avx512" if instruction_set == "avx512_vnni" and family != "codebook" else instruction_set


def brief(cases: Iterable, often: Iterable):
    """Parameters of a test that takes long: those named in ``often``, and the others as long proofs. ``cases`` may be a dictionary."""
    named = cases if isinstance(cases, dict) else {str(case): case for case in cases}
    assert set(often) <= named.keys()
    return [pytest.param(case, id=name, marks=() if name in often else pytest.mark.prove) for name, case in named.items()]
