"""Vector quantization in plain PyTorch: a screen by matrix products, behind which float64 decides the few rows that are left.

The screen computes the score ``|c|^2 / 2 - x . c`` of every code, which orders the codes as their distances from ``x`` do, for some rows
at a time. Where the two smallest scores of a row are further apart than rounding can move them, the smallest is that of the nearest code.
The other rows keep the codes that rounding cannot rule out, and the squared differences of these, summed in float64, decide.
"""

import math
import os

import torch
from torch import Tensor

from fastvae.fallback import _device
from fastvae.fallback._blocks import block_elements
from fastvae.fallback._register import implements
from fastvae.ops import codebook as ops
from fastvae.ops._autograd import without_autocast
from fastvae.ops._residual_steps import residual_backward_in_steps, residual_in_steps
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, widest_dtype

# Scores of a chunk of rows, in blocks: a matrix product is faster with more rows than elementwise operations ask for.
_BLOCKS_OF_SCORES = 4
_FEWEST_ROWS = 64
# On a processor without other settings oneDNN rounds the operands of float32 products only where this variable asks for it.
_FAST_MATH = os.environ.get("ONEDNN_DEFAULT_FPMATH_MODE", os.environ.get("DNNL_DEFAULT_FPMATH_MODE", "STRICT")).upper() != "STRICT"


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices of the codes nearest to ``x`` (heads, rows, dim): the lowest where distances are equal, 0 for rows that are not finite."""
    indices = x.new_empty(x.shape[:2], dtype=torch.int64)
    # Autocast would round the operands of the products, which the bound on the rounding does not know of.
    with without_autocast(x.device):
        for rows, codes, found in zip(x, codebook, indices, strict=True):
            _Search(codes, torch.promote_types(x.dtype, codebook.dtype)).run(rows, found)
    return indices


class _Products:
    """The scores of all codes by products in one dtype, and how far rounding can move them."""

    def __init__(self, codes: Tensor, dtype: torch.dtype):
        self.dtype = dtype
        self.codes = codes.to(dtype)
        self.half_norms = self.codes.square().sum(1).mul_(0.5)
        # Each of two scores is a sum of dim + 1 terms, added in any order, and the half norm among them is such a sum itself: rounding
        # moves it by (dim + 2) eps / 2 of |x| |c| + |c|^2. The rest of the 8 allows for the rounding of this bound.
        dim, finfo = codes.shape[1], torch.finfo(dtype)
        rounded = (dim + 8) * finfo.eps
        self.rounding = rounded / (1.0 - rounded) + 2.0 * _operand_rounding(codes.device, dtype)
        self.underflow = 8.0 * (dim + 1) * finfo.tiny
        # Underflow takes up to the smallest normal number from each square of a norm.
        self.norm_underflow = math.sqrt(dim * finfo.tiny)
        self.longest = self.half_norms.max().mul(2.0).sqrt().add(self.norm_underflow)

    def scores(self, rows: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addmm(self.half_norms, rows, self.codes.T, alpha=-1.0, out=out)

    def bound(self, rows: Tensor) -> Tensor:
        """How much nearer than another code a code can seem to a row, or the other way round, by rounding alone."""
        lengths = rows.square().sum(1).sqrt_().add_(self.norm_underflow)
        return (lengths + self.longest).mul_(self.longest).mul_(self.rounding).add_(self.underflow)


def _operand_rounding(device: torch.device, dtype: torch.dtype) -> float:
    """How much the operands of a float32 product are rounded, relative: torch may be told to use bfloat16 or TF32."""
    if dtype != torch.float32:
        return 0.0
    if device.type == "cpu":
        precision, exact = torch.backends.mkldnn.matmul.fp32_precision, not _FAST_MATH  # type: ignore[attr-defined]  # torch adds it at import
    elif device.type == "cuda":
        precision, exact = torch.backends.cuda.matmul.fp32_precision, True
    else:
        precision, exact = "unknown", False
    return 0.0 if exact and precision in ("ieee", "none") else 2.0**-7


class _Search:
    """The search of one head's codebook."""

    def __init__(self, codes: Tensor, dtype: torch.dtype):
        self.codes = codes
        self.screen = _Products(codes, torch.float64 if dtype == torch.float64 else torch.float32)
        self.precise: _Products | None = None

    def run(self, x: Tensor, indices: Tensor) -> None:
        count = self.codes.shape[0]
        step = max(_BLOCKS_OF_SCORES * block_elements(x.device) // count, _FEWEST_ROWS)
        scratch = x.new_empty((min(step, x.shape[0]), count), dtype=self.screen.dtype)
        for part, found in zip(x.split(step), indices.split(step), strict=True):
            rows = part.to(self.screen.dtype)
            scores = self.screen.scores(rows, out=scratch[: rows.shape[0]])
            smallest, position = scores.min(1, keepdim=True)
            found.copy_(position.squeeze(1))
            second = scores.scatter_(1, position, torch.inf).amin(1)
            # Written so that a row with NaN, or with an infinite bound, is not decided.
            undecided = (second.sub_(smallest.squeeze(1)) > self.screen.bound(rows)).logical_not_().nonzero().squeeze(1)
            if undecided.shape[0]:
                found[undecided] = self.decide(part[undecided])

    def decide(self, x: Tensor) -> Tensor:
        """The nearest codes of a few rows by float64, or by float32 on a device that has no other."""
        if self.precise is None:
            self.precise = _Products(self.codes, widest_dtype(x.device))
        precise = self.precise
        rows = x.to(precise.dtype)
        scores = precise.scores(rows)
        limit = scores.amin(1).add_(precise.bound(rows))
        candidates = (scores > limit.unsqueeze(1)).logical_not_()
        if int(candidates.sum()) > 4 * x.shape[0]:
            candidates &= self._first_of_its_kind()
        row, code = candidates.nonzero().unbind(1)
        nearest = self._lowest_of_the_nearest(precise.codes, rows, row, code)
        return torch.where(torch.isfinite(rows).all(1), nearest, 0)

    def _first_of_its_kind(self) -> Tensor:
        """A mask of the codes that equal no earlier code. Later copies are never the answer, and a codebook may be full of them."""
        _, kind = torch.unique(self.codes.cpu(), dim=0, return_inverse=True)
        numbers = torch.arange(kind.shape[0], device="cpu")
        first = torch.full_like(numbers, kind.shape[0]).scatter_reduce_(0, kind, numbers, "amin")
        return (first[kind] == numbers).to(self.codes.device)

    def _lowest_of_the_nearest(self, codes: Tensor, rows: Tensor, row: Tensor, code: Tensor) -> Tensor:
        """The candidate codes of each row, given as pairs of numbers, that are nearest to it, and of these the lowest."""
        pairs = max(block_elements(rows.device) // rows.shape[1], 1)
        parts = [
            (rows[some_rows] - codes[some_codes]).square_().sum(1)
            for some_rows, some_codes in zip(row.split(pairs), code.split(pairs), strict=True)
        ]
        distances = torch.cat(parts)
        shortest = distances.new_full(rows.shape[:1], torch.inf).scatter_reduce_(0, row, distances, "amin")
        # The comparison is > and not ==, because a NaN would fulfil no equation and leave its row without a code.
        chosen = torch.where(distances > shortest[row], self.codes.shape[0], code)
        return torch.full_like(shortest, self.codes.shape[0], dtype=torch.int64).scatter_reduce_(0, row, chosen, "amin")


def _check_finite(codebook: Tensor) -> None:
    if _device.is_cpu(codebook.device) and not torch.isfinite(codebook).all():
        raise ValueError("codebook: got NaN or infinite values, takes finite ones")


def _lookup(codebook: Tensor, indices: Tensor) -> Tensor:
    """The codes (heads, rows, dim) at ``indices`` (heads, rows)."""
    heads, codes, dim = codebook.shape
    if heads == 1:
        return codebook[0].index_select(0, indices[0]).unsqueeze(0)
    first = torch.arange(0, heads * codes, codes, device=indices.device).unsqueeze(1)
    return codebook.reshape(-1, dim).index_select(0, (indices + first).view(-1)).view(heads, -1, dim)


@implements(ops.nearest)
def codebook_nearest(arguments: ops.NearestArguments) -> ops.NearestResults:
    x, codebook = arguments.x, arguments.codebook
    _check_finite(codebook)
    indices, dtype = nearest(x, codebook), accumulation_dtype(x.dtype)
    if not arguments.with_distance:
        return ops.NearestResults(indices, x.new_empty((0,), dtype=dtype))
    wide = widest_dtype(x.device)
    return ops.NearestResults(indices, (x.to(wide) - _lookup(codebook, indices).to(wide)).square_().sum(-1).to(dtype))


@implements(ops.quantize)
def codebook_quantize(arguments: ops.QuantizeArguments) -> ops.QuantizeResults:
    x, codebook, batch, reduction, loss_weight = arguments
    _check_finite(codebook)
    indices, dtype = nearest(x, codebook), accumulation_dtype(x.dtype)
    codes = _lookup(codebook, indices)
    errors = (x.to(dtype) - codes.to(dtype)).square_()
    if reduction == REDUCTIONS["none"]:
        loss = errors.mul_(loss_weight).to(x.dtype)
    elif reduction == REDUCTIONS["sample"]:
        loss = errors.reshape(batch, -1).sum(1).mul_(loss_weight) if errors.numel() else errors.new_zeros((batch,))
    else:
        loss = errors.sum().mul_(loss_weight * ops.loss_scale(x.shape, batch, reduction))
    return ops.QuantizeResults(codes.to(x.dtype), indices, loss)


@implements(ops.quantize_backward)
def codebook_quantize_backward(arguments: ops.QuantizeBackwardArguments) -> ops.QuantizeBackwardResults:
    x, codebook, grad_loss = arguments.x, arguments.codebook, arguments.grad_loss
    dtype = accumulation_dtype(x.dtype)
    wide = x.to(dtype)
    codes = _lookup(codebook, arguments.indices).to(dtype)
    incoming = None if arguments.grad_quantized is None else arguments.grad_quantized.to(dtype)
    if arguments.rotation and incoming is not None:
        incoming = _rotate_back(incoming, wide, codes)
    grad_codebook = arguments.allocate().grad_codebook.zero_()
    if grad_loss is None:
        grad_x = torch.zeros_like(wide) if incoming is None else incoming
        return ops.QuantizeBackwardResults(_fresh(grad_x, x, arguments.grad_quantized), grad_codebook)
    weights = _loss_weights(grad_loss.to(dtype), x.shape, arguments.batch, arguments.reduction)
    pull = torch.sub(wide, codes, out=codes).mul_(weights)
    if arguments.with_codebook:
        sums = _sums_by_code(pull, arguments.indices, codebook.shape[1])
        grad_codebook = sums.mul_(-arguments.codebook_cost).to(codebook.dtype)
    cost = arguments.commitment_cost
    grad_x = pull.mul_(cost) if incoming is None else torch.add(incoming, pull, alpha=cost, out=pull)
    return ops.QuantizeBackwardResults(_fresh(grad_x, x, arguments.grad_quantized), grad_codebook)


def _fresh(gradient: Tensor, like: Tensor, incoming: Tensor | None) -> Tensor:
    """The gradient in the dtype of ``like``, contiguous, and never the incoming one itself: an operator returns no argument."""
    gradient = gradient.to(like.dtype).contiguous()
    return gradient.clone() if gradient is incoming else gradient


def _loss_weights(grad_loss: Tensor, shape: torch.Size, batch: int, reduction: int) -> Tensor:
    """Twice what the gradient of each element's squared error is multiplied with."""
    if reduction == REDUCTIONS["none"]:
        return grad_loss * 2.0
    if reduction == REDUCTIONS["sample"]:
        return grad_loss.mul(2.0).repeat_interleave(shape[1] // max(batch, 1)).view(1, -1, 1)
    return grad_loss * (2.0 * ops.loss_scale(shape, batch, reduction))


def _rotate_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """The transpose of the rotation and scaling that takes ``x`` to its code: I - 2 r r^T + 2 x c^T for unit x and c, r halfway."""
    tiny = torch.finfo(x.dtype).tiny
    x_norm, code_norm = (t.norm(dim=-1, keepdim=True).clamp_(min=tiny) for t in (x, codes))
    x_unit, code_unit = x / x_norm, codes / code_norm
    between = x_unit + code_unit
    length = between.norm(dim=-1, keepdim=True)
    # Where the two are opposite, the sum is what their rounding leaves, and has no direction.
    between = torch.where(length <= 16.0 * torch.finfo(x.dtype).eps, 0.0, between.div_(length))
    along_between, along_code = ((t * grad).sum(-1, keepdim=True).mul_(2.0) for t in (between, code_unit))
    scale = torch.where(code_norm > tiny, code_norm, 0.0).div_(x_norm)
    return x_unit.mul_(along_code).sub_(between.mul_(along_between)).add_(grad).mul_(scale)


def _sums_by_code(rows: Tensor, bins: Tensor, count: int) -> Tensor:
    """The sums of the rows (heads, rows, dim) of each bin (heads, rows)."""
    sums = rows.new_zeros((rows.shape[0], count, rows.shape[2]))
    return sums.scatter_add_(1, bins.unsqueeze(2).expand(rows.shape), rows)


implements(ops.residual)(residual_in_steps("fallback"))
implements(ops.residual_backward)(residual_backward_in_steps("fallback"))


@implements(ops.sums)
def codebook_sums(arguments: ops.SumsArguments) -> ops.SumsResults:
    x, indices, codes = arguments
    # One bin more, for the rows that are left out.
    bins = torch.where((indices < 0) | ~torch.isfinite(x).all(-1), codes, indices)
    counts = torch.zeros((x.shape[0], codes + 1), dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, bins, torch.ones_like(bins))
    sums = _sums_by_code(x.to(accumulation_dtype(x.dtype)), bins, codes + 1)
    return ops.SumsResults(counts[:, :codes].contiguous(), sums[:, :codes].contiguous())


@implements(ops.ema_)
def codebook_ema_(arguments: ops.EmaArguments) -> None:
    codebook, ema_count, ema_sum, counts, sums, decay, eps = arguments
    ema_count.mul_(decay).add_(counts.to(ema_count.dtype), alpha=1.0 - decay)
    ema_sum.mul_(decay).add_(sums.to(ema_sum.dtype), alpha=1.0 - decay)
    total = ema_count.sum(-1, keepdim=True)
    smoothed = ((ema_count + eps) / (total + codebook.shape[1] * eps)).mul_(total).unsqueeze(-1)
    codebook.copy_(torch.where(smoothed > 0, ema_sum / smoothed, codebook))
