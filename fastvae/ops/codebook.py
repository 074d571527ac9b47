"""Vector quantization: the operators and their autograd.Functions.

``x`` is (heads, rows, dim) and ``codebook`` (heads, codes, dim); in residual quantization ``x`` is (rows, dim) and ``codebooks`` (steps,
codes, dim).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops._autograd import first_derivative_only
from fastvae.ops._operator import Operator, Size, Written
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, empty_if, empty_like, reduction_scale


def loss_scale(shape: torch.Size, batch: int, reduction: int) -> float:
    """The factor of the sum of the squared errors of ``shape``, of ``batch`` samples, in the loss."""
    return reduction_scale(shape if reduction == REDUCTIONS["mean"] else torch.Size((batch,)), reduction)


class NearestResults(NamedTuple):
    indices: Tensor  # int64, (heads, rows)
    distance: Tensor  # squared, in the accumulation dtype; no elements where it was not asked for


class NearestArguments(NamedTuple):
    x: Tensor
    codebook: Tensor
    with_distance: bool

    def allocate(self) -> NearestResults:
        x, dtype = self.x, accumulation_dtype(self.x.dtype)
        distance = x.new_empty(x.shape[:2] if self.with_distance else (0,), dtype=dtype)
        return NearestResults(x.new_empty(x.shape[:2], dtype=torch.int64), distance)


class QuantizeResults(NamedTuple):
    """The nearest codes in the dtype of ``x``, their indices, and the loss: in the shape of ``x`` for "none", (batch,) for "sample", else
    0-dim."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor


class QuantizeArguments(NamedTuple):
    """The loss is ``loss_weight`` times the reduced squared errors; ``batch`` samples share the rows of each head evenly."""

    x: Tensor
    codebook: Tensor
    batch: Size
    reduction: int
    loss_weight: float

    def allocate(self) -> QuantizeResults:
        x, elementwise = self.x, self.reduction == REDUCTIONS["none"]
        shape = x.shape if elementwise else (self.batch,) if self.reduction == REDUCTIONS["sample"] else ()
        loss = x.new_empty(shape, dtype=x.dtype if elementwise else accumulation_dtype(x.dtype))
        return QuantizeResults(empty_like(x), x.new_empty(x.shape[:2], dtype=torch.int64), loss)


class QuantizeBackwardResults(NamedTuple):
    grad_x: Tensor
    grad_codebook: Tensor  # no elements where it was not asked for


class QuantizeBackwardArguments(NamedTuple):
    grad_quantized: Tensor | None
    grad_loss: Tensor | None
    x: Tensor
    codebook: Tensor
    indices: Tensor
    batch: Size
    reduction: int
    codebook_cost: float
    commitment_cost: float
    rotation: bool
    with_codebook: bool

    def allocate(self) -> QuantizeBackwardResults:
        return QuantizeBackwardResults(empty_like(self.x), empty_if(self.with_codebook, self.codebook))


class ResidualResults(NamedTuple):
    """``quantized`` is the sum of the codes. A row that is left out has the index -1 and is 0 elsewhere."""

    quantized: Tensor  # (rows, dim) in the dtype of ``x``
    indices: Tensor  # int64, (rows, steps)
    losses: Tensor  # (steps,) in the accumulation dtype
    residuals: Tensor  # (steps, rows, dim), what each step searches for; no elements where it was not asked for


class ResidualArguments(NamedTuple):
    """Each step searches its codebook for what the codes of the steps before have left of ``x``, in the dtype of ``x``. The loss of a step
    is ``loss_weight`` times the mean squared error. ``mask``, bool of shape (rows,), is False for rows that are left out."""

    x: Tensor
    codebooks: Tensor
    mask: Tensor | None
    loss_weight: float
    with_residuals: bool

    def allocate(self) -> ResidualResults:
        x, (rows, dim), steps = self.x, self.x.shape, self.codebooks.shape[0]
        losses = x.new_empty((steps,), dtype=accumulation_dtype(x.dtype))
        residuals = x.new_empty((steps, rows, dim) if self.with_residuals else (0,))
        return ResidualResults(empty_like(x), x.new_empty((rows, steps), dtype=torch.int64), losses, residuals)


class ResidualBackwardResults(NamedTuple):
    grad_x: Tensor
    grad_codebooks: Tensor  # no elements where it was not asked for


class ResidualBackwardArguments(NamedTuple):
    grad_quantized: Tensor | None
    grad_losses: Tensor | None
    x: Tensor
    codebooks: Tensor
    mask: Tensor | None
    indices: Tensor
    codebook_cost: float
    commitment_cost: float
    with_codebooks: bool

    def allocate(self) -> ResidualBackwardResults:
        return ResidualBackwardResults(empty_like(self.x), empty_if(self.with_codebooks, self.codebooks))


class SumsResults(NamedTuple):
    counts: Tensor  # int64, (heads, codes)
    sums: Tensor  # (heads, codes, dim) in the accumulation dtype, added in the order of the rows


class SumsArguments(NamedTuple):
    """Counts the rows of ``x`` that fell on each code, and sums them. A negative index leaves its row out, and so does a row with NaN or
    infinite values."""

    x: Tensor
    indices: Tensor
    codes: Size

    def allocate(self) -> SumsResults:
        x, shape = self.x, (self.x.shape[0], self.codes)
        sums = x.new_empty((*shape, x.shape[2]), dtype=accumulation_dtype(x.dtype))
        return SumsResults(x.new_empty(shape, dtype=torch.int64), sums)


class EmaArguments(NamedTuple):
    """One step of the exponential moving averages, and the codebook as their quotient."""

    codebook: Written
    ema_count: Written
    ema_sum: Written
    counts: Tensor
    sums: Tensor
    decay: float
    eps: float

    def allocate(self) -> None:
        """The operator only writes."""


nearest = Operator("codebook_nearest", NearestArguments)
quantize = Operator("codebook_quantize", QuantizeArguments)
quantize_backward = Operator("codebook_quantize_backward", QuantizeBackwardArguments)
residual = Operator("codebook_residual_quantize", ResidualArguments)
residual_backward = Operator("codebook_residual_quantize_backward", ResidualBackwardArguments)
sums = Operator("codebook_sums", SumsArguments)
ema_ = Operator("codebook_ema_", EmaArguments)


class VectorQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, codebook, batch, reduction, codebook_cost, commitment_cost, rotation, backend):
        return quantize.overloads[backend](x, codebook, batch, reduction, codebook_cost + commitment_cost)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, codebook, *ctx.options, ctx.backend = inputs
        _, indices, _ = output
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, codebook, indices)

    @staticmethod
    @first_derivative_only("fastvae.reference.codebook")
    def backward(ctx, grad_quantized, _, grad_loss):
        with_codebook = ctx.needs_input_grad[1]
        grad_x, grad_codebook = quantize_backward.overloads[ctx.backend](
            grad_quantized, grad_loss, *ctx.saved_tensors, *ctx.options, with_codebook
        )
        return grad_x, grad_codebook if with_codebook else None, *(None,) * (len(ctx.options) + 1)


class ResidualQuantize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, codebooks, mask, codebook_cost, commitment_cost, with_residuals, backend):
        return residual.overloads[backend](x, codebooks, mask, codebook_cost + commitment_cost, with_residuals)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, codebooks, mask, *ctx.costs, _, ctx.backend = inputs
        _, indices, _, residuals = output
        ctx.mark_non_differentiable(indices, residuals)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, codebooks, mask, indices)

    @staticmethod
    @first_derivative_only("fastvae.reference.codebook")
    def backward(ctx, grad_quantized, _, grad_losses, __):
        with_codebooks = ctx.needs_input_grad[1]
        grad_x, grad_codebooks = residual_backward.overloads[ctx.backend](
            grad_quantized, grad_losses, *ctx.saved_tensors, *ctx.costs, with_codebooks
        )
        return grad_x, grad_codebooks if with_codebooks else None, None, None, None, None, None
