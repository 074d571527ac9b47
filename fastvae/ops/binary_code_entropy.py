"""Entropies of binary codes: the operators over torch's own products, their autograd.Function, and what is added over processes."""

from typing import NamedTuple

import torch
from torch import Tensor, distributed

from fastvae.ops._autograd import first_derivative_only
from fastvae.ops._operator import Operator
from fastvae.ops._results import accumulation_dtype, empty_like

# One float a code is kept for the backward pass: 64 MiB in float32.
MAX_DIM = 24
# The sigmoid of minus this is 0 in float64 too, so a limit on the logits of bits changes no result but infinity times 0.
MAX_LOGIT = 1000.0


class ForwardResults(NamedTuple):
    """``code_sums`` has the probabilities of each code, summed over the rows: ``(2^dim,)``, the first dimension of ``x`` being the highest
    bit of a code's number. Both results are in the dtype of sums."""

    entropy: Tensor  # (rows,)
    code_sums: Tensor


class ForwardArguments(NamedTuple):
    """``x`` is ``(rows, dim)``; rows whose ``mask`` is False count as absent, whatever they hold."""

    x: Tensor
    mask: Tensor | None
    inv_temperature: float

    def allocate(self) -> ForwardResults:
        dtype = accumulation_dtype(self.x.dtype)
        codes = 1 << int(self.x.shape[1])
        return ForwardResults(self.x.new_empty(self.x.shape[:1], dtype=dtype), self.x.new_empty((codes,), dtype=dtype))


class BackwardArguments(NamedTuple):
    grad_entropy: Tensor | None
    grad_code_sums: Tensor | None
    x: Tensor
    mask: Tensor | None
    inv_temperature: float

    def allocate(self) -> Tensor:
        return empty_like(self.x)


forward = Operator("binary_code_entropy_forward", ForwardArguments)
backward = Operator("binary_code_entropy_backward", BackwardArguments)


class BinaryCodeEntropy(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, mask, ctx.inv_temperature, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, mask)

    @staticmethod
    @first_derivative_only("fastvae.reference.binary_code_entropy")
    def backward(ctx, grad_entropy, grad_code_sums):
        if grad_entropy is None and grad_code_sums is None:
            return forward.gradients()
        grad_x = backward.overloads[ctx.backend](grad_entropy, grad_code_sums, *ctx.saved_tensors, ctx.inv_temperature)
        return forward.gradients(x=grad_x)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over the processes of a group; the gradient is the sum of theirs, so that it is that of the sum of all losses."""

    @staticmethod
    def forward(tensor, group):
        total = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.group = inputs

    @staticmethod
    def backward(ctx, grad_output):
        return _SumOverProcesses.apply(grad_output, ctx.group), None


def entropy_of_mean(code_sums: Tensor, rows: int, mask: Tensor | None, group: "distributed.ProcessGroup | None") -> Tensor:
    """The entropy of the mean distribution of the rows, or of those of all processes; 0 where there are none."""
    count = code_sums.new_full((), rows) if mask is None else mask.sum(dtype=code_sums.dtype)
    if group is not None:
        code_sums, count = (_SumOverProcesses.apply(tensor, group) for tensor in (code_sums, count))
    probabilities = code_sums / count.clamp(min=1)
    # The limit keeps the gradient of p log p finite at 0, where the gradient of p itself is 0.
    return -torch.special.xlogy(probabilities, probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny)).sum()
