"""Entropies of binary codes in plain PyTorch, by a softmax over all codes: the definition and the oracle of the tests."""

import math

import torch
from torch import Tensor, distributed

from fastvae.ops import binary_code_entropy as ops
from fastvae.ops._autograd import in_plain_torch, without_autocast
from fastvae.ops._results import accumulation_dtype, widest_dtype


def binary_code_entropy(
    x: Tensor, inv_temperature: float = 100.0, *, mask: Tensor | None = None, group: "distributed.ProcessGroup | None" = None
) -> tuple[Tensor, Tensor]:
    """:func:`fastvae.functional.binary_code_entropy`, differentiable any number of times."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    row_mask = None if mask is None else mask.reshape(rows.shape[0])
    entropy, code_sums = binary_code_entropy_forward(ops.ForwardArguments(rows, row_mask, inv_temperature))
    return entropy.view(x.shape[:-1]), ops.entropy_of_mean(code_sums, rows.shape[0], row_mask, group)


def _all_codes(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The codes in {-1, 1}^dim by their numbers."""
    bits = torch.arange(dim - 1, -1, -1, device=device)
    return ((torch.arange(1 << dim, device=device)[:, None] >> bits) & 1).to(dtype) * 2 - 1


def _log_probabilities(x: Tensor, mask: Tensor | None, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """Those of each code in each row, and the codes; a row that is left out has those of 0."""
    kept = x if mask is None else torch.where(mask[:, None], x, 0.0)
    logits = (4.0 * inv_temperature * kept.to(widest_dtype(x.device))).clamp(-ops.MAX_LOGIT, ops.MAX_LOGIT)
    codes = _all_codes(x.shape[1], logits.dtype, x.device)
    with without_autocast(x.device):
        return torch.log_softmax(logits @ codes.T / 2, -1), codes


def _kept(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows if mask is None else torch.where(mask.view(-1, *(1,) * (rows.ndim - 1)), rows, 0.0)


@in_plain_torch(ops.BinaryCodeEntropy)
@ops.forward.implement("reference")
def binary_code_entropy_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    """The operator, differentiable any number of times in either mode where it is called as this function."""
    x, mask, inv_temperature = arguments
    dtype = accumulation_dtype(x.dtype)
    log_p, _ = _log_probabilities(x, mask, inv_temperature)
    p = log_p.exp()
    return ops.ForwardResults(_kept(-(p * log_p).sum(-1), mask).to(dtype), _kept(p, mask).sum(0).to(dtype))


@ops.backward.implement("reference")
def _binary_code_entropy_backward(arguments: ops.BackwardArguments) -> Tensor:
    x, mask, inv_temperature = arguments.x, arguments.mask, arguments.inv_temperature
    log_p, codes = _log_probabilities(x, mask, inv_temperature)
    p = log_p.exp()
    grad_p = torch.zeros_like(p)
    if arguments.grad_entropy is not None:
        grad_p = grad_p - log_p * arguments.grad_entropy.to(p.dtype)[:, None]
    if arguments.grad_code_sums is not None:
        grad_p = grad_p + arguments.grad_code_sums.to(p.dtype)
    grad_log_p = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
    with without_autocast(x.device):
        grad_x = 2.0 * inv_temperature * (grad_log_p @ codes)
    return _kept(grad_x, mask).to(x.dtype).contiguous()
