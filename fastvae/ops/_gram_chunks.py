"""The Gram form of a backend that leaves the products to torch, some samples at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.ops.jacobian import GramArguments, GramResults, gram_reduce, gram_scale

# Elements of a chunk's scaled matrix, few enough that memory does not grow with the batch. A processor starts a chunk's ten operations in
# microseconds, and 8 MiB of float32 are in its cache for the next. A GPU needs about 25 us to launch them, in which it reads and writes
# 100 MB: its chunks have 64 MiB, of which three at a time exist (the scaled matrix, its product, and with weights the weighted one).
GRAM_ELEMENTS, GPU_GRAM_ELEMENTS = 1 << 21, 1 << 24


def gram_elements(device: torch.device) -> int:
    return GRAM_ELEMENTS if device.type == "cpu" else GPU_GRAM_ELEMENTS


def gram_in_chunks(backend: str) -> Callable:
    """``jacobian_gram`` by torch's products between ``jacobian_gram_scale`` and ``jacobian_gram_reduce`` of a backend."""
    scale, reduce = gram_scale.overloads[backend], gram_reduce.overloads[backend]

    def gram_norms(arguments: GramArguments) -> GramResults:
        left, inner, outer, gram, weights, with_grad = arguments
        rows, columns = outer.shape[1], inner.shape[1]
        count = max(gram_elements(left.device) // max(rows * columns, 1), 1)
        parts, grad_gram = [], torch.zeros_like(gram) if with_grad else gram.new_empty((0,))
        for start in range(0, outer.shape[0], count):
            chunk = slice(start, start + count)
            lefts, inners, outers = left[chunk] if left.ndim == 3 else left, inner[chunk], outer[chunk]
            scaled = scale(lefts, inners, outers)
            weighted_outers, weighted = outers, scaled
            if weights is not None:
                weighted_outers = outers * weights[chunk].unsqueeze(1)
                weighted = scaled * weights[chunk].repeat_interleave(rows).unsqueeze(1)
            parts.append(reduce(lefts, inners, weighted_outers, scaled @ gram, with_grad))
            if with_grad:
                _add_symmetric_product(grad_gram, scaled, weighted)
        if not parts:
            grad_left, grad_inner, grad_outer = (torch.zeros_like(t) if with_grad else t.new_empty((0,)) for t in (left, inner, outer))
            return GramResults(outer.sum(1), grad_left, grad_inner, grad_outer, grad_gram)
        dots_of_parts, inner_of_parts, left_of_parts = zip(*parts, strict=True)
        dots = torch.cat(dots_of_parts)
        norms = (outer * dots).sum(1)
        if not with_grad:
            return GramResults(norms, *(gram.new_empty((0,)) for _ in range(4)))
        grad_left = torch.cat(left_of_parts) if left.ndim == 3 else sum(left_of_parts[1:], left_of_parts[0])
        grad_outer = 2 * dots if weights is None else 2 * dots * weights.unsqueeze(1)
        return GramResults(norms, 2 * grad_left, 2 * torch.cat(inner_of_parts), grad_outer, _mirrored(grad_gram))

    return gram_norms


def _add_symmetric_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds ``a.T @ b``, which is symmetric, to ``total``, but for the lower left quarter."""
    half = a.shape[1] // 2
    total[:half].addmm_(a[:, :half].T, b)
    total[half:, half:].addmm_(a[:, half:].T, b[:, half:])


def _mirrored(total: Tensor) -> Tensor:
    """Writes the lower left quarter of a symmetric matrix."""
    half = total.shape[1] // 2
    total[half:, :half].copy_(total[:half, half:].T)
    return total
