"""Vector quantization in plain PyTorch: the definition and the oracle of the tests."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from fastvae._outputs import RVQ, VQ
from fastvae._types import QuantizerGradient, Reduction, check_choice
from fastvae.ops import codebook as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, reduction_number

_CHUNK_ELEMENTS = 1 << 24
# A search for the indices (heads, rows) of the codes (heads, codes, dim) nearest to vectors (heads, rows, dim).
Search = Callable[[Tensor, Tensor], Tensor]


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices of the codes nearest to ``x`` (heads, rows, dim): squared distances in float64, the lowest index where they are equal."""
    # The sums of two equal codes are equal where their elements are added in one order, which torch takes from the strides.
    x, wide = x.contiguous(), codebook.double().contiguous()
    rows = max(_CHUNK_ELEMENTS // max(codebook[0].numel(), 1), 1)
    return torch.stack([_nearest_in(rows, x_head, code_head) for x_head, code_head in zip(x, wide, strict=True)])


def _nearest_in(rows: int, x: Tensor, codebook: Tensor) -> Tensor:
    chunks = [((chunk.double()[:, None] - codebook) ** 2).sum(-1).argmin(-1) for chunk in x.split(rows)]
    indices = torch.cat(chunks) if x.shape[0] else x.new_empty((0,), dtype=torch.int64)
    return torch.where(torch.isfinite(x).all(-1), indices, 0)


def _nearest_by_product(x: Tensor, codebook: Tensor) -> Tensor:
    """:func:`nearest` by one matrix product in float64, for other runtimes: for any number of rows, without reading a value."""
    codes = codebook.double()
    scores = codes.square().sum(-1).unsqueeze(1) - 2.0 * (x.double() @ codes.transpose(1, 2))
    return torch.where(torch.isfinite(x).all(-1), scores.argmin(-1), 0)


def lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes (heads, rows, dim) at ``indices`` (heads, rows)."""
    return codebook.gather(1, indices[..., None].expand(*indices.shape, codebook.shape[-1]))


def vq_nearest(x: Tensor, codebook: Tensor, *, return_distance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastvae.functional.vq_nearest`: squared distances in float64, the lowest index where they are equal."""
    rows, codes = _by_head(x.detach(), codebook.detach())
    indices, distance = _codebook_nearest(ops.NearestArguments(rows, codes, return_distance))
    indices = indices.view(x.shape[:-1])
    return (indices, distance.view(x.shape[:-1])) if return_distance else indices


def vector_quantize(
    x: Tensor,
    codebook: Tensor,
    *,
    commitment_cost: float = 0.25,
    gradient: QuantizerGradient = "straight_through",
    reduction: Reduction = "mean",
    codebook_cost: float = 1.0,
) -> VQ:
    """:func:`fastvae.functional.vector_quantize`, differentiable any number of times; the rotation is held constant."""
    check_choice("gradient", gradient, get_args(QuantizerGradient))
    _check_finite(codebook)
    rows, codes = _by_head(x, codebook)
    options = x.shape[0] if x.ndim > 1 else 1, reduction_number(reduction), codebook_cost, commitment_cost, gradient == "rotation"
    quantized, indices, loss = quantize_batch(rows, codes, *options)
    return VQ(quantized.view(x.shape), indices.view(x.shape[:-1]), loss.view(x.shape) if reduction == "none" else loss)


def residual_quantize(
    x: Tensor, codebooks: Tensor, *, mask: Tensor | None = None, commitment_cost: float = 0.25, codebook_cost: float = 0.0
) -> RVQ:
    """:func:`fastvae.functional.residual_quantize`, differentiable any number of times."""
    _check_finite(codebooks, "codebooks")
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    row_mask = None if mask is None else mask.reshape(rows.shape[0])
    quantized, indices, losses, _ = residual_batch(rows, codebooks, row_mask, codebook_cost, commitment_cost)
    return RVQ(quantized.view(x.shape), indices.view(*x.shape[:-1], codebooks.shape[0]), losses)


@torch.no_grad()
def codebook_ema_update_(
    codebook: Tensor, ema_count: Tensor, ema_sum: Tensor, x: Tensor, indices: Tensor, *, decay: float = 0.99, eps: float = 1e-5
) -> Tensor:
    """:func:`fastvae.functional.codebook_ema_update_`."""
    rows, codes = _by_head(x, codebook)
    counts, sums = _codebook_sums(ops.SumsArguments(rows, indices.reshape(rows.shape[:2]), codes.shape[1]))
    codes, count, total = (t if codebook.ndim == 3 else t[None] for t in (codebook, ema_count, ema_sum))
    _codebook_ema_(ops.EmaArguments(codes, count, total, counts, sums, decay, eps))
    return counts.view(ema_count.shape)


def _by_head(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as (heads, rows, dim) and the codebook as (heads, codes, dim)."""
    if codebook.ndim == 2:
        x, codebook = x[None], codebook[None]
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]), codebook


@in_plain_torch(ops.VectorQuantize)
def _quantize_in_plain_torch(inputs: tuple) -> tuple[Tensor, Tensor, Tensor]:
    return quantize_batch(*inputs)


def quantize_batch(
    x, codebook, batch: int, reduction: int, codebook_cost, commitment_cost, rotation: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``codebook_quantize`` with its gradients, those of straight-through and losses, as autograd's."""
    indices = nearest(x.detach(), codebook.detach())
    dtype = accumulation_dtype(x.dtype)
    wide, codes = x.to(dtype), lookup(codebook, indices).to(dtype)
    errors = codebook_cost * (codes - wide.detach()) ** 2 + commitment_cost * (codes.detach() - wide) ** 2
    quantized = rotate(wide, codes) if rotation else wide + (codes - wide).detach()
    return quantized.to(x.dtype), indices, _reduce(errors, batch, reduction, x.dtype)


class _Step(NamedTuple):
    """A step of residual quantization: what it searches for, (rows, dim), its indices, -1 for rows that are left out, and their codes,
    which are 0 there, in the accumulation dtype."""

    residual: Tensor
    indices: Tensor
    codes: Tensor


def _residual_steps(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, found: Tensor | None = None, search: Search = nearest
) -> Iterator[_Step]:
    """The steps, by a ``search`` each or by the indices (rows, steps) that one has ``found``. The residuals are differentiable in ``x``,
    the codes in ``codebooks``."""
    kept = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device) if mask is None else mask
    residual = torch.where(kept[:, None], x, 0.0)
    for step, codebook in enumerate(codebooks):
        indices = search(residual.detach()[None], codebook.detach()[None])[0] if found is None else found[:, step].clamp(min=0)
        codes = torch.where(kept[:, None], codebook[indices].to(accumulation_dtype(x.dtype)), 0.0)
        yield _Step(residual, torch.where(kept, indices, -1), codes)
        residual = residual - codes.detach().to(x.dtype)


@in_plain_torch(ops.ResidualQuantize)
def _residual_in_plain_torch(inputs: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, _ = inputs
    return residual_batch(*arguments)


def residual_batch(
    x: Tensor, codebooks: Tensor, mask: Tensor | None, codebook_cost: float, commitment_cost: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``codebook_residual_quantize`` with its gradients as autograd's; the residuals carry none."""
    steps = list(_residual_steps(x, codebooks, mask))
    scale, losses = _residual_scale(x, mask), []
    for step in steps:
        wide = step.residual.to(step.codes.dtype)
        errors = codebook_cost * (step.codes - wide.detach()) ** 2 + commitment_cost * (step.codes.detach() - wide) ** 2
        losses.append(errors.sum() * scale)
    # The first residual is x without the rows that are left out.
    quantized = steps[0].residual + (_sum_of_codes(steps, x.dtype) - steps[0].residual).detach()
    return quantized, _indices(steps), torch.stack(losses), torch.stack([step.residual.detach() for step in steps])


def _sum_of_codes(steps: list[_Step], dtype: torch.dtype) -> Tensor:
    """Each code is rounded to the dtype of the vectors, and so is the sum."""
    return torch.stack([step.codes.to(dtype).to(step.codes.dtype) for step in steps]).sum(0).to(dtype)


def _indices(steps: list[_Step]) -> Tensor:
    return torch.stack([step.indices for step in steps], -1)


def _residual_scale(x: Tensor, mask: Tensor | None) -> Tensor | float:
    """The factor of a step's sum of squared errors in its loss."""
    if mask is None:
        return 1.0 / max(x.numel(), 1)
    return 1.0 / (mask.sum(dtype=accumulation_dtype(x.dtype)) * x.shape[1]).clamp(min=1)


def rotate(x: Tensor, codes: Tensor) -> Tensor:
    """``codes`` as a rotation and scaling of ``x``, held constant: I - 2 r r^T + 2 c x^T for unit x and c, r halfway between them."""
    x_unit, code_unit, between, scale = _rotation(x.detach(), codes.detach())
    scaled = scale * (x - 2 * between * _dot(between, x) + 2 * code_unit * _dot(x_unit, x))
    return scaled + (codes - scaled).detach()


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """The transpose of :func:`rotate`."""
    x_unit, code_unit, between, scale = _rotation(x, codes)
    return scale * (grad - 2 * between * _dot(between, grad) + 2 * x_unit * _dot(code_unit, grad))


def _rotation(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tiny = torch.finfo(x.dtype).tiny
    x_norm, code_norm = (t.norm(dim=-1, keepdim=True) for t in (x, codes))
    x_unit, code_unit = x / x_norm.clamp(min=tiny), codes / code_norm.clamp(min=tiny)
    between = x_unit + code_unit
    length = between.norm(dim=-1, keepdim=True)
    # Where the two are opposite, the sum is what their rounding leaves, and has no direction.
    between = torch.where(length <= 16.0 * torch.finfo(x.dtype).eps, 0.0, between / length)
    return x_unit, code_unit, between, code_norm / x_norm.clamp(min=tiny)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _reduce(errors: Tensor, batch: int, reduction: int, dtype: torch.dtype) -> Tensor:
    if reduction == REDUCTIONS["none"]:
        return errors.to(dtype)
    if reduction == REDUCTIONS["sample"]:
        return errors.reshape(batch, -1).sum(1) if errors.numel() else errors.new_zeros((batch,))
    return errors.sum() * ops.loss_scale(errors.shape, batch, reduction)


def _check_finite(codebook: Tensor, argument: str = "codebook") -> None:
    if codebook.device.type == "cpu" and not torch.isfinite(codebook).all():
        raise ValueError(f"{argument}: got NaN or infinite values, takes finite ones")


@ops.nearest.implement("reference")
def _codebook_nearest(arguments: ops.NearestArguments) -> ops.NearestResults:
    _check_finite(arguments.codebook)
    return _nearest_results(arguments, nearest)


@ops.nearest.define
def _nearest_for_other_runtimes(arguments: ops.NearestArguments) -> ops.NearestResults:
    return _nearest_results(arguments, _nearest_by_product)


def _nearest_results(arguments: ops.NearestArguments, search: Search) -> ops.NearestResults:
    x, codebook = arguments.x, arguments.codebook
    indices, dtype = search(x, codebook), accumulation_dtype(x.dtype)
    if not arguments.with_distance:
        return ops.NearestResults(indices, x.new_empty((0,), dtype=dtype))
    return ops.NearestResults(indices, ((x.double() - lookup(codebook, indices).double()) ** 2).sum(-1).to(dtype))


@ops.quantize.implement("reference")
def _codebook_quantize(arguments: ops.QuantizeArguments) -> ops.QuantizeResults:
    _check_finite(arguments.codebook)
    return _quantize_results(arguments, nearest)


@ops.quantize.define
def _quantize_for_other_runtimes(arguments: ops.QuantizeArguments) -> ops.QuantizeResults:
    return _quantize_results(arguments, _nearest_by_product)


def _quantize_results(arguments: ops.QuantizeArguments, search: Search) -> ops.QuantizeResults:
    x, codebook = arguments.x, arguments.codebook
    indices, dtype = search(x, codebook), accumulation_dtype(x.dtype)
    codes = lookup(codebook, indices).to(dtype)
    errors = arguments.loss_weight * (x.to(dtype) - codes) ** 2
    return ops.QuantizeResults(codes.to(x.dtype), indices, _reduce(errors, arguments.batch, arguments.reduction, x.dtype))


@ops.quantize_backward.implement("reference")
def _codebook_quantize_backward(arguments: ops.QuantizeBackwardArguments) -> ops.QuantizeBackwardResults:
    x, codebook, indices = arguments.x, arguments.codebook, arguments.indices
    dtype = accumulation_dtype(x.dtype)
    wide, codes = x.to(dtype), lookup(codebook, indices).to(dtype)
    grad_x, grad_codebook = torch.zeros_like(wide), torch.zeros_like(arguments.allocate().grad_codebook, dtype=dtype)
    if arguments.grad_quantized is not None:
        incoming = arguments.grad_quantized.to(dtype)
        grad_x = grad_x + (_rotate_back(incoming, wide, codes) if arguments.rotation else incoming)
    if arguments.grad_loss is not None:
        weight = _expand(arguments.grad_loss.to(dtype), x.shape, arguments.batch, arguments.reduction)
        pull = 2.0 * weight * (wide - codes)
        grad_x = grad_x + arguments.commitment_cost * pull
        if arguments.with_codebook:
            grad_codebook.scatter_add_(1, indices[..., None].expand(x.shape), -arguments.codebook_cost * pull)
    return ops.QuantizeBackwardResults(grad_x.to(x.dtype).contiguous(), grad_codebook.to(codebook.dtype))


@ops.residual.implement("reference")
def _codebook_residual_quantize(arguments: ops.ResidualArguments) -> ops.ResidualResults:
    _check_finite(arguments.codebooks, "codebooks")
    return _residual_results(arguments, nearest)


@ops.residual.define
def _residual_for_other_runtimes(arguments: ops.ResidualArguments) -> ops.ResidualResults:
    return _residual_results(arguments, _nearest_by_product)


def _residual_results(arguments: ops.ResidualArguments, search: Search) -> ops.ResidualResults:
    x, codebooks, mask, loss_weight, with_residuals = arguments
    steps = list(_residual_steps(x, codebooks, mask, search=search))
    scale = loss_weight * _residual_scale(x, mask)
    losses = torch.stack([(step.residual.to(step.codes.dtype) - step.codes).square().sum() * scale for step in steps])
    residuals = torch.stack([step.residual for step in steps]) if with_residuals else x.new_empty((0,))
    return ops.ResidualResults(_sum_of_codes(steps, x.dtype), _indices(steps), losses.to(steps[0].codes.dtype), residuals)


@ops.residual_backward.implement("reference")
def _codebook_residual_quantize_backward(arguments: ops.ResidualBackwardArguments) -> ops.ResidualBackwardResults:
    grad_quantized, grad_losses, x, codebooks, mask, indices, codebook_cost, commitment_cost, with_codebooks = arguments
    dtype = accumulation_dtype(x.dtype)
    grad_x = torch.zeros(x.shape, dtype=dtype, device=x.device)
    grad_codebooks = torch.zeros_like(arguments.allocate().grad_codebooks, dtype=dtype)
    if grad_quantized is not None:
        grad_x = grad_x + (grad_quantized if mask is None else torch.where(mask[:, None], grad_quantized, 0.0))
    if grad_losses is not None:
        weights = 2.0 * grad_losses.to(dtype) * _residual_scale(x, mask)
        for number, step in enumerate(_residual_steps(x, codebooks, mask, indices)):
            pull = weights[number] * (step.residual.to(dtype) - step.codes)
            grad_x = grad_x + commitment_cost * pull
            if with_codebooks:
                grad_codebooks[number].index_add_(0, step.indices.clamp(min=0), -codebook_cost * pull)
    return ops.ResidualBackwardResults(grad_x.to(x.dtype).contiguous(), grad_codebooks.to(codebooks.dtype))


def _expand(grad_loss: Tensor, shape: torch.Size, batch: int, reduction: int) -> Tensor:
    if reduction == REDUCTIONS["none"]:
        return grad_loss
    if reduction == REDUCTIONS["sample"]:
        rows = shape[1] // max(batch, 1)
        return grad_loss.repeat_interleave(rows).view(1, -1, 1)
    return grad_loss * ops.loss_scale(shape, batch, reduction)


@ops.sums.implement("reference")
def _codebook_sums(arguments: ops.SumsArguments) -> ops.SumsResults:
    x, indices, codes = arguments
    # One bin more, for the rows that are left out.
    bins = torch.where((indices < 0) | ~torch.isfinite(x).all(-1), codes, indices)
    counts = torch.zeros((x.shape[0], codes + 1), dtype=torch.int64, device=x.device).scatter_add(1, bins, torch.ones_like(bins))
    sums = torch.zeros((x.shape[0], codes + 1, x.shape[2]), dtype=accumulation_dtype(x.dtype), device=x.device)
    sums = sums.scatter_add(1, bins[..., None].expand(x.shape), x.to(sums.dtype))
    return ops.SumsResults(counts[:, :codes].contiguous(), sums[:, :codes].contiguous())


@ops.ema_.implement("reference")
def _codebook_ema_(arguments: ops.EmaArguments) -> None:
    codebook, ema_count, ema_sum, counts, sums, decay, eps = arguments
    ema_count.mul_(decay).add_(counts.to(ema_count.dtype), alpha=1.0 - decay)
    ema_sum.mul_(decay).add_(sums.to(ema_sum.dtype), alpha=1.0 - decay)
    total = ema_count.sum(-1, keepdim=True)
    smoothed = (ema_count + eps) / (total + codebook.shape[1] * eps) * total
    codebook.copy_(torch.where(smoothed[..., None] > 0, ema_sum / smoothed[..., None], codebook))
