"""Activation checkpointing runs a forward pass again inside the backward pass. A module whose forward pass changes it has to tell the two
apart: the second one sees what the first one saw, and changes nothing."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._torch_private import graph_is_retained, has_saved_tensor_hooks, in_backward_pass, without_dispatch_modes
from fastvae.nn._snapshot import snapshot

# Each pending pass holds a copy of the codebook. A loop in training mode under torch.no_grad(), without backward passes, leaves so many.
MAX_PENDING = 16

# The inputs of the two passes are equal but for what an operator without a fixed order of sums does to them.
_TOLERANCE = 1e-2


def is_recomputing() -> bool:
    """Whether this forward pass runs inside a backward pass: it repeats an earlier one and must leave no trace."""
    return not torch.compiler.is_compiling() and in_backward_pass()


def may_be_recomputed() -> bool:
    """Whether this forward pass may be the first of two: checkpointing runs that one without gradients (``use_reentrant=True``) or under
    hooks on saved tensors (``use_reentrant=False``)."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return False
    return not torch.is_grad_enabled() or has_saved_tensor_hooks()


class Fingerprint(NamedTuple):
    """Identifies an input: its device and shape, and its sums over all but the last dimension, float32."""

    device: torch.device
    shape: torch.Size
    sums: Tensor


class _Pass(NamedTuple):
    number: int
    fingerprint: Fingerprint
    seen: Any


class PendingPasses:
    """The first passes of a module that may be recomputed, each with what the module saw then, found again by their input."""

    def __init__(self):
        self._passes: list[_Pass] = []
        # Numbers of passes that have been recomputed. Where checkpoints are nested they are once more, in the same backward pass.
        self._recomputed: set[int] = set()
        self._count = 0
        self._forgot = False
        self.compiled = False

    def __len__(self) -> int:
        return len(self._passes) - len(self._recomputed)

    def __deepcopy__(self, memo) -> "PendingPasses":
        return PendingPasses()

    def __reduce__(self):
        return PendingPasses, ()

    def remember(self, fingerprint: Fingerprint, seen) -> None:
        """Adds a pass.

        Args:
            fingerprint: of the pass's input, see :func:`fingerprint`.
            seen: what :meth:`recall` gives back.
        """
        self._passes = [each for each in self._passes if each.number not in self._recomputed]
        self._recomputed.clear()
        if not self._passes:
            self._forgot = False
        self._count += 1
        self._passes.append(_Pass(self._count, fingerprint, seen))
        if self._passes[0].number <= self._count - MAX_PENDING:
            del self._passes[0]
            self._forgot = True

    def recall(self, fingerprint: Fingerprint):
        """The record of the first pass that this one recomputes; ``None`` where there was none, such as in evaluation mode.

        Raises:
            RuntimeError: where the pass is none of the last ``MAX_PENDING``.
        """
        candidates = [each for each in self._passes if each.fingerprint[:2] == fingerprint[:2]]
        if not candidates and not self._forgot:
            return None
        # One pass alone is the one, and the host need not wait for the device to compare.
        found = candidates[0] if len(candidates) == 1 and not self._forgot else self._nearest(candidates, fingerprint)
        if not graph_is_retained():
            self._recomputed.add(found.number)
        return found.seen

    def _nearest(self, candidates: list[_Pass], fingerprint: Fingerprint) -> _Pass:
        distances = {each.number: _distance(each.fingerprint.sums, fingerprint.sums) for each in candidates}
        # Among equal inputs the latest pass is recomputed first, because a backward pass goes through its graph from the end.
        best = min(candidates, key=lambda each: (distances[each.number], each.number in self._recomputed, -each.number), default=None)
        if best is None or distances[best.number] > _TOLERANCE:
            raise RuntimeError(
                f"a quantizer under activation checkpointing remembers {MAX_PENDING} passes, and the one that is recomputed is none of "
                "them: run its backward pass sooner"
            )
        return best


def _distance(known: Tensor, sums: Tensor) -> float:
    """Relative to the size of ``sums``, which may be 0."""
    # Selective checkpointing counts operators, and the first pass had none of these.
    with without_dispatch_modes():
        size = sums.norm().clamp(min=torch.finfo(sums.dtype).tiny)
        return ((known - sums).norm() / size).item()


def keep_out_of_checkpoints(passes: PendingPasses) -> None:
    """Lets torch.compile leave a checkpoint around the module to eager mode, or refuse it under ``fullgraph=True``: its graph would run the
    module twice unawares. It does so where a module writes an attribute."""
    if torch.compiler.is_compiling():
        passes.compiled = True


def fingerprint(x: Tensor) -> Fingerprint:
    """The weights of the sums differ by row, since plain sums are 0 behind a normalisation. NaN and infinite values count 0."""
    rows = torch.nan_to_num(x.detach().reshape(-1, x.shape[-1]).float(), 0.0, 0.0, 0.0)
    sums = (rows * torch.linspace(0.5, 1.0, rows.shape[0], device=rows.device)[:, None]).sum(0)
    return Fingerprint(x.device, x.shape, sums)


class _Valued(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, value: Tensor) -> Tensor:
        return _copy(value)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """A copy of ``value``, whose gradient goes to ``tensor``."""
    return _Valued.apply(tensor, value) if tensor.requires_grad else _copy(value)


def stacked_copy(tensors: list[Tensor], *, change: bool) -> Tensor:
    """A copy of the tensors as one, whose gradient goes to them. ``change`` says whether they change before the backward pass."""
    stacked = torch.stack(tensors)
    return with_value(stacked, stacked) if change and torch.compiler.is_compiling() else stacked


def _copy(value: Tensor) -> Tensor:
    return snapshot(value, once=True) if torch.compiler.is_compiling() else value.detach().clone()
