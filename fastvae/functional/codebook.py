"""Vector quantization: exact nearest codes, their gradients and losses, and the moving average of a codebook."""

import math
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._outputs import RVQ, VQ
from fastvae._types import QuantizerGradient, Reduction, check_choice
from fastvae.functional._call import apply
from fastvae.functional._checks import check_device, check_like, check_nonnegative, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops import codebook as ops
from fastvae.ops._results import reduction_number

GRADIENTS = get_args(QuantizerGradient)


@overload
def vq_nearest(x: Tensor, codebook: Tensor, *, return_distance: Literal[False] = False) -> Tensor: ...
@overload
def vq_nearest(x: Tensor, codebook: Tensor, *, return_distance: Literal[True]) -> tuple[Tensor, Tensor]: ...
@documented
def vq_nearest(x: Tensor, codebook: Tensor, *, return_distance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    r"""The nearest code of each vector, exactly: :math:`\arg\min_k \lVert x - c_k \rVert^2`, without the matrix of all distances.

    With the backends ``cpp``, ``cuda`` and ``triton`` the index is that of the smallest real-valued distance between the given inputs, the
    lowest one where distances are equal: a low-precision product leaves the codes that its rounding error cannot rule out, and float64,
    then exact arithmetic, decides among them (for float64 inputs: float64). With ``fallback`` float64 has the last word, and float32 on a
    device that has no float64. The index does not depend on the number of threads or the instruction set.

    A vector with NaN or infinite values has the index 0. A codebook on a GPU is not checked for such values, which would wait for it: with
    ``cuda`` and ``triton`` a code that has one is never the nearest.

    Args:
        $vectors
        $codebook
        return_distance: returns the squared distances too, in float32 (float64 for float64).

    Returns:
        int64 indices in the shape of ``x`` without its last dimension, or ``(indices, squared distances)``.

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it; on the CPU also for a codebook with NaN or infinite values.
    """
    rows, codes = _flatten(x, codebook)
    backend = _resolve("codebook_nearest", rows, codes)
    indices, distance = ops.nearest.overloads[backend](rows.detach(), codes.detach(), return_distance)
    indices = indices.view(x.shape[:-1])
    return (indices, distance.view(x.shape[:-1])) if return_distance else indices


@documented
def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment_cost: float = 0.25,
    gradient: QuantizerGradient = "straight_through",
    reduction: Reduction = "mean",
    codebook_cost: float = 1.0,
) -> VQ:
    r"""Replaces each vector with its nearest code, with a gradient and the losses of a VQ-VAE, in one pass.

    .. math:: \gamma\, \lVert \mathrm{sg}[x] - c \rVert^2 + \beta\, \lVert x - \mathrm{sg}[c] \rVert^2

    where :math:`c` is the nearest code (see :func:`vq_nearest`), :math:`\mathrm{sg}` stops the gradient, :math:`\beta` is
    ``commitment_cost`` and :math:`\gamma` ``codebook_cost`` (van den Oord et al., *Neural Discrete Representation Learning*, 2017). The
    codebook learns from the loss alone.

    Args:
        $vectors
        $codebook
        commitment_cost: :math:`\beta`, the weight of the term that pulls ``x`` to its code.
        $quantizer_gradient
        reduction: of the squared errors: ``"mean"`` over elements, ``"none"`` elementwise, ``"sum"``; with one head also ``"sample"``
            sum over all but the first dimension, and ``"batchmean"`` mean of those.
        codebook_cost: :math:`\gamma`, the weight of the term that pulls the codes to the vectors; 0 where
            :func:`codebook_ema_update_` moves them.

    Returns:
        ``VQ(quantized, indices, loss)``: the codes in the shape and dtype of ``x``, int64 indices, and the loss in float32 (float64 for
        float64; the dtype of ``x`` for ``"none"``).

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it; on the CPU also for a codebook with NaN or infinite values.
    """
    check_choice("gradient", gradient, GRADIENTS)
    number = reduction_number(reduction)
    costs = check_nonnegative("codebook_cost", codebook_cost), check_nonnegative("commitment_cost", commitment_cost)
    rows, codes = _flatten(x, codebook)
    if codebook.ndim == 3 and reduction in ("sample", "batchmean"):
        raise ValueError(f"reduction: got {reduction!r} with several heads, takes 'none', 'sum' or 'mean'")
    batch = x.shape[0] if x.ndim > 1 else 1
    backend = _resolve("codebook_quantize", rows, codes)
    arguments = rows, codes, batch, number, *costs, gradient == "rotation"
    quantized, indices, loss = apply(ops.VectorQuantize, arguments, backend)
    return VQ(quantized.view(x.shape), indices.view(x.shape[:-1]), loss.view(x.shape) if reduction == "none" else loss)


@documented
def residual_quantize(
    x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None, commitment_cost: float = 0.25, codebook_cost: float = 0.0
) -> RVQ:
    r"""Residual vector quantization in one pass: each step replaces what the steps before have left of a vector with its nearest code
    (Zeghidour et al., *SoundStream: An End-to-End Neural Audio Codec*, 2021, algorithm 1).

    .. math:: r_1 = x, \quad k_q = \arg\min_k \lVert r_q - c_{q,k} \rVert^2, \quad r_{q+1} = r_q - c_{q,k_q}, \quad
        \hat x = \sum_q c_{q,k_q}

    .. math:: \mathcal{L}_q = \beta\, \overline{(r_q - \mathrm{sg}[c_{q,k_q}])^2} + \gamma\, \overline{(\mathrm{sg}[r_q] - c_{q,k_q})^2}

    :math:`\mathrm{sg}` stops the gradient, and the bar is the mean over elements. Codes are rounded to the dtype of ``x`` before they are
    subtracted or added, and so is :math:`r_q`. Each index is exact, see :func:`vq_nearest`; a vector with NaN or infinite values has the
    index 0 in all steps. The gradient of ``quantized`` reaches ``x`` once and unchanged, that of each loss through :math:`r_q`; the
    codebooks learn from the losses alone.

    With ``cpp`` a block of vectors goes through all steps while it is in the cache. The other backends make the steps one by one. The
    backward pass keeps ``x``, the codebooks and the indices. Fewer steps, such as quantizer dropout draws, are fewer codebooks.

    Args:
        x: vectors, ``(..., dim)``; float32, bfloat16, float16 or float64.
        codebooks: the codes, ``(steps, codes, dim)``. Any floating dtype.
        mask: bool, the shape of ``x`` without its last dimension: ``False`` leaves a vector out of the losses, whatever it holds. It is
            quantized to 0, and its indices are -1.
        commitment_cost: :math:`\beta`, the weight of the term that pulls ``x`` to its codes.
        codebook_cost: :math:`\gamma`, the weight of the term that pulls the codes to the vectors; 0 where
            :func:`codebook_ema_update_` moves them.

    Returns:
        ``RVQ(quantized, indices, losses)``: the sums of the codes in the shape and dtype of ``x``, int64 indices of shape
        ``(*x.shape[:-1], steps)``, and the loss of each step, ``(steps,)``, in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it; on the CPU also for codebooks with NaN or infinite values.
    """
    return residual_steps(x, codebooks, mask, codebook_cost=codebook_cost, commitment_cost=commitment_cost, with_residuals=False)[0]


def residual_steps(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, *, codebook_cost: float, commitment_cost: float, with_residuals: bool
) -> tuple[RVQ, Tensor | None]:
    """:func:`residual_quantize` and, ``with_residuals``, what each step searches for, ``(steps, *x.shape)``; 0 for a vector that is left
    out."""
    costs = check_nonnegative("codebook_cost", codebook_cost), check_nonnegative("commitment_cost", commitment_cost)
    _check_residual(x, codebooks, mask)
    rows, (steps, codes, dim) = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), codebooks.shape
    row_mask = None if mask is None else mask.reshape(rows.shape[0])
    dtype = torch.promote_types(x.dtype, codebooks.dtype)
    backend = _backend.resolve("codebook_residual_quantize", x.device, dtype, multiply_adds=rows.numel() * codes, dim=dim)
    arguments = rows, codebooks, row_mask, *costs, with_residuals
    quantized, indices, losses, residuals = apply(ops.ResidualQuantize, arguments, backend)
    output = RVQ(quantized.view(x.shape), indices.view(*x.shape[:-1], steps), losses)
    return output, residuals.view(steps, *x.shape) if with_residuals else None


def _check_residual(x: Tensor, codebooks: Tensor, mask: Tensor | None) -> None:
    check_tensor("x", x)
    check_tensor("codebooks", codebooks)
    check_device("codebooks", codebooks, "x", x)
    if codebooks.ndim != 3 or 0 in codebooks.shape:
        raise ValueError(f"codebooks: got shape {tuple(codebooks.shape)}, takes (steps, codes, dim), at least one of each")
    if x.ndim == 0 or x.shape[-1] != codebooks.shape[-1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (..., {codebooks.shape[-1]}), the last dimension of codebooks")
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,))
        check_device("mask", mask, "x", x)
        check_shape("mask", mask, x.shape[:-1], "the shape of x without its last dimension")


@documented
@torch.no_grad()
def codebook_ema_update_(
    codebook: Tensor, ema_count: Tensor, ema_sum: Tensor, x: Tensor, indices: Tensor, *, decay: float = 0.99, eps: float = 1e-5
) -> Tensor:
    r"""Moves each code towards the mean of the vectors that fell on it, by exponential moving averages, in place.

    .. math:: n_k \leftarrow \alpha n_k + (1-\alpha) \lvert S_k \rvert, \quad m_k \leftarrow \alpha m_k + (1-\alpha) \sum_{i \in S_k} x_i,
              \quad c_k = \frac{m_k}{\hat n_k}, \quad \hat n_k = \frac{n_k + \epsilon}{\sum_j n_j + K \epsilon} \sum_j n_j

    van den Oord et al. (2017), appendix A.1. The sums are taken in the order of the vectors: the same call gives the same bits. A vector
    with NaN or infinite values is left out: it would make its code NaN for good.

    Args:
        codebook: ``(codes, dim)`` or ``(heads, codes, dim)``, float32 or float64; written.
        ema_count: :math:`n`, ``codebook.shape[:-1]``; written.
        ema_sum: :math:`m`, the shape of ``codebook``; written.
        $vectors
        indices: int64, ``x.shape[:-1]``; each below ``codes``, or negative for a vector that is left out.
        decay: :math:`\alpha` in [0, 1].
        eps: :math:`\epsilon`, so that an unused code does not divide by 0.

    Returns:
        How many vectors fell on each code, int64, in the shape of ``ema_count``; without those that are left out.

    Raises:
        $errors
    """
    counts, sums = codebook_sums(x, indices, codebook)
    codebook_ema_step_(codebook, ema_count, ema_sum, counts, sums, decay=decay, eps=eps)
    return counts


def codebook_sums(x: Tensor, indices: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of :func:`codebook_ema_update_`: what several processes add up before the second.

    Returns:
        ``(counts, sums)``: how many vectors fell on each code, int64, and their sums in the shape of ``codebook``; both without vectors
        that have a negative index, or NaN or infinite values.
    """
    rows, codes = _flatten(x, codebook)
    check_tensor("indices", indices, (torch.int64,))
    check_device("indices", indices, "x", x)
    check_shape("indices", indices, x.shape[:-1], "the shape of x without its last dimension")
    backend = _backend.resolve("codebook_sums", x.device, x.dtype)
    counts, sums = ops.sums.overloads[backend](rows.detach(), indices.reshape(rows.shape[:2]), codes.shape[1])
    return counts.view(codebook.shape[:-1]), sums.view(codebook.shape)


def codebook_ema_step_(
    codebook: Tensor, ema_count: Tensor, ema_sum: Tensor, counts: Tensor, sums: Tensor, *, decay: float = 0.99, eps: float = 1e-5
) -> None:
    """The second half of :func:`codebook_ema_update_`, with the counts and sums of :func:`codebook_sums`."""
    check_tensor("codebook", codebook, (torch.float32, torch.float64))
    check_like("ema_sum", ema_sum, "codebook", codebook)
    check_tensor("ema_count", ema_count, (codebook.dtype,))
    check_device("ema_count", ema_count, "codebook", codebook)
    check_shape("ema_count", ema_count, codebook.shape[:-1], "the shape of codebook without its last dimension")
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(f"decay: got {decay!r}, takes a number in [0, 1]")
    check_nonnegative("eps", eps)
    backend = _backend.resolve("codebook_ema_", codebook.device, codebook.dtype)
    state = codebook.detach(), ema_count, ema_sum
    # Operators see (heads, codes, dim), contiguous; a view writes through.
    written = [t.contiguous() for t in state]
    heads = [t if codebook.ndim == 3 else t[None] for t in (*written, counts, sums)]
    ops.ema_.overloads[backend](*heads, float(decay), float(eps))
    for tensor, copy in zip(state, written, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)


def _resolve(op: str, rows: Tensor, codes: Tensor) -> str:
    """The backend of a search for ``rows`` (heads, rows, dim) among ``codes`` (heads, codes, dim)."""
    dtype = torch.promote_types(rows.dtype, codes.dtype)
    return _backend.resolve(op, rows.device, dtype, multiply_adds=rows.numel() * codes.shape[1], dim=rows.shape[2])


def _flatten(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as (heads, rows, dim) and the codebook as (heads, codes, dim)."""
    check_tensor("x", x)
    check_tensor("codebook", codebook)
    check_device("codebook", codebook, "x", x)
    if codebook.ndim not in (2, 3):
        raise ValueError(f"codebook: got shape {tuple(codebook.shape)}, takes (codes, dim) or (heads, codes, dim)")
    if 0 in codebook.shape:
        raise ValueError(f"codebook: got shape {tuple(codebook.shape)}, takes at least one code of at least one dimension")
    if x.ndim == 0 or x.shape[-1] != codebook.shape[-1]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes (..., {codebook.shape[-1]}), the last dimension of codebook")
    if codebook.ndim == 2:
        return x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1]), codebook[None]
    if x.ndim < 2 or x.shape[0] != codebook.shape[0]:
        expected = f"({codebook.shape[0]}, ..., {codebook.shape[-1]})"
        raise ValueError(f"x: got shape {tuple(x.shape)}, takes {expected}, one slice a head of codebook")
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), codebook
