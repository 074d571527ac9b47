"""Residual quantization of a backend that searches one codebook at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.ops._results import REDUCTIONS, accumulation_dtype
from fastvae.ops.codebook import (
    ResidualArguments,
    ResidualBackwardArguments,
    ResidualBackwardResults,
    ResidualResults,
    quantize,
    quantize_backward,
)


def residual_in_steps(backend: str) -> Callable:
    """``codebook_residual_quantize`` by ``codebook_quantize`` of a backend."""
    quantize_one = quantize.overloads[backend]

    def residual_quantize(arguments: ResidualArguments) -> ResidualResults:
        x, codebooks, mask, loss_weight, with_residuals = arguments
        results = arguments.allocate()
        left, total = _kept(x, mask), torch.zeros_like(x, dtype=results.losses.dtype, memory_format=torch.contiguous_format)
        # With a mask the sum of each row is needed.
        batch, reduction = (1, REDUCTIONS["mean"]) if mask is None else (x.shape[0], REDUCTIONS["sample"])
        for step, codebook in enumerate(codebooks):
            if with_residuals:
                results.residuals[step] = left
            codes, index, loss = quantize_one(left[None], codebook[None], batch, reduction, loss_weight)
            codes = _kept(codes[0], mask)
            results.indices[:, step] = index[0] if mask is None else torch.where(mask, index[0], -1)
            results.losses[step] = loss if mask is None else torch.where(mask, loss, 0.0).sum() * _residual_scale(x, mask)
            left = left - codes
            total += codes
        results.quantized.copy_(total)
        return results

    return residual_quantize


def residual_backward_in_steps(backend: str) -> Callable:
    """``codebook_residual_quantize_backward`` by ``codebook_quantize_backward`` of a backend."""
    backward_one = quantize_backward.overloads[backend]

    def residual_quantize_backward(arguments: ResidualBackwardArguments) -> ResidualBackwardResults:
        grad_quantized, grad_losses, x, codebooks, mask, indices, *costs, with_codebooks = arguments
        results, dtype = arguments.allocate(), accumulation_dtype(x.dtype)
        grad_x = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        if grad_quantized is not None:
            grad_x += _kept(grad_quantized, mask)
        pulls: list[Tensor] = []
        results.grad_codebooks.zero_()
        if grad_losses is not None:
            left = _kept(x, mask)
            weights = (grad_losses.to(dtype) * _residual_scale(x, mask))[:, None, None].expand(-1, *x.shape)
            for step, codebook in enumerate(codebooks):
                index = indices[:, step].clamp(min=0)
                operands = left.to(dtype)[None], codebook[None], index[None]
                weight = _kept(weights[step], mask)[None]
                grad_left, grad_codebook = backward_one(None, weight, *operands, 1, REDUCTIONS["none"], *costs, False, with_codebooks)
                pulls.append(grad_left[0])
                if with_codebooks:
                    results.grad_codebooks[step] = grad_codebook[0]
                left = left - _kept(codebook[index].to(x.dtype), mask)
            # The order in which autograd adds the terms of a chain of single quantizers, which a checkpointed pass is.
            later = torch.zeros_like(grad_x)
            for pull in reversed(pulls[1:]):
                later += pull
            grad_x.add_(later).add_(pulls[0])
        results.grad_x.copy_(grad_x)
        return results

    return residual_quantize_backward


def _kept(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The rows, with 0 for those that are left out: they may hold NaN."""
    return rows if mask is None else torch.where(mask[:, None], rows, 0.0)


def _residual_scale(x: Tensor, mask: Tensor | None) -> Tensor | float:
    """The factor of a step's sum of squared errors in its loss."""
    if mask is None:
        return 1.0 / max(x.numel(), 1)
    return 1.0 / (mask.sum(dtype=accumulation_dtype(x.dtype)) * x.shape[1]).clamp(min=1)
