"""Entropies of binary codes by torch's own products: there are no kernels, so this serves every device.

The bits of a code are independent, so its probability is the product of those of its first and its last half. With the probabilities of
all first halves in a row of ``A`` and of all last halves in a row of ``B``, the sums over rows are ``A^T B``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.fallback._register import implements
from fastvae.ops import binary_code_entropy as ops
from fastvae.ops._autograd import without_autocast
from fastvae.ops._results import accumulation_dtype

# So many elements (16 MiB in float32) of A and B are made at a time. Of 24 bits those are 512 rows, enough for the product to take longer
# than a pass over its result.
_BLOCK_ELEMENTS = 1 << 22


class _Half(NamedTuple):
    """The probabilities of some bits, ``(rows, bits)``, that each is 1 and that it is 0."""

    one: Tensor
    zero: Tensor

    def of_codes(self) -> Tensor:
        """The probabilities of all codes of these bits, ``(rows, 2^bits)``, the first bit being the highest of a code's number."""
        rows, bits = self.one.shape
        codes = self.one.new_empty((rows, 1 << bits))
        codes[:, :1] = 1.0
        # Each bit, the lowest first, makes two codes of each that is there: with 0 in its place, and behind all of those with 1.
        for bit in range(bits):
            column, count = slice(bits - bit - 1, bits - bit), 1 << bit
            torch.mul(codes[:, :count], self.one[:, column], out=codes[:, count : 2 * count])
            codes[:, :count].mul_(self.zero[:, column])
        return codes

    def grad_logits(self, weighted: Tensor) -> Tensor:
        """The gradient of the bits' logits, from the codes' probabilities times their gradients, ``(rows, 2^bits)``."""
        places = torch.arange(self.one.shape[1] - 1, -1, -1, device=weighted.device)
        is_one = torch.arange(weighted.shape[1], device=weighted.device)[:, None] >> places & 1
        with_one, with_zero = (weighted @ torch.cat([is_one, 1 - is_one], 1).to(weighted.dtype)).chunk(2, 1)
        # Both terms are small where a bit is nearly certain, so nothing cancels.
        return with_one * self.zero - with_zero * self.one


class _Block(NamedTuple):
    """Some rows: their logits, what is made of them, and which of them count (None where all do)."""

    rows: slice
    logits: Tensor
    halves: tuple[_Half, _Half]
    mask: Tensor | None

    def kept(self, values: Tensor) -> Tensor:
        """``values``, of which a row belongs to each of these rows, with 0 in the rows that do not count."""
        return values if self.mask is None else torch.where(self.mask[:, None], values, 0.0)

    def entropy(self) -> Tensor:
        size = self.logits.abs()
        return self.kept(F.softplus(-size) + size * torch.sigmoid(-size)).sum(1)

    def grad_from_entropy(self, grad_entropy: Tensor) -> Tensor:
        """The part of the logits' gradient that comes through the entropies of the rows."""
        one, zero = (torch.cat(parts, 1) for parts in zip(*self.halves, strict=True))
        return -self.logits * one * zero * grad_entropy[:, None]

    def grad_from_sums(self, grad_code_sums: Tensor) -> Tensor:
        """The part of the logits' gradient that comes through the sums over rows."""
        first, last = (half.of_codes() for half in self.halves)
        grad = grad_code_sums.view(first.shape[1], last.shape[1])
        weighted = (last @ grad.T).mul_(first), (first @ grad).mul_(last)
        return torch.cat([half.grad_logits(w) for half, w in zip(self.halves, weighted, strict=True)], 1)


def _blocks(x: Tensor, mask: Tensor | None, inv_temperature: float) -> Iterator[_Block]:
    count, dim = x.shape
    step = max(_BLOCK_ELEMENTS >> (dim + 1) // 2 + 1, 1)
    for start in range(0, count, step):
        rows = slice(start, min(start + step, count))
        block_mask = None if mask is None else mask[rows]
        values = x[rows].to(accumulation_dtype(x.dtype))
        if block_mask is not None:
            # A row that does not count may hold NaN.
            values = torch.where(block_mask[:, None], values, 0.0)
        logits = (values * (4.0 * inv_temperature)).clamp_(-ops.MAX_LOGIT, ops.MAX_LOGIT)
        both = zip(*(torch.sigmoid(sign).split([dim // 2, dim - dim // 2], 1) for sign in (logits, -logits)), strict=True)
        first, last = (_Half(one, zero) for one, zero in both)
        yield _Block(rows, logits, (first, last), block_mask)


@implements(ops.forward)
def binary_code_entropy_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    dim = arguments.x.shape[1]
    results = arguments.allocate()
    sums = results.code_sums.zero_().view(1 << dim // 2, 1 << dim - dim // 2)
    with without_autocast(arguments.x.device):
        for block in _blocks(*arguments):
            results.entropy[block.rows] = block.entropy()
            first, last = (half.of_codes() for half in block.halves)
            sums.addmm_(block.kept(first).T, last)
    return results


@implements(ops.backward)
def binary_code_entropy_backward(arguments: ops.BackwardArguments) -> Tensor:
    x, inv_temperature = arguments.x, arguments.inv_temperature
    grad_x = arguments.allocate()
    with without_autocast(x.device):
        for block in _blocks(x, arguments.mask, inv_temperature):
            grad_logits = torch.zeros_like(block.logits)
            if arguments.grad_entropy is not None:
                grad_logits += block.grad_from_entropy(arguments.grad_entropy[block.rows])
            if arguments.grad_code_sums is not None:
                grad_logits += block.grad_from_sums(arguments.grad_code_sums)
            grad_x[block.rows] = block.kept(grad_logits).mul_(4.0 * inv_temperature)
    return grad_x
