"""Vector quantization on a GPU: the codes of the nearest indices with the loss, the gradients, and the moving averages.

Sums over the rows of a code are taken in row order: the indices are sorted, stably, the rows of each code are cut into parts, programs sum
a part each, and others the parts of a code.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._nearest import LARGEST_FLOAT, load_tile, nearest, rows_of
from fastvae.kernels._reduce import is_last, sum_programs
from fastvae.ops import codebook as ops
from fastvae.ops._results import REDUCTIONS

NONE, SAMPLE = tl.constexpr(REDUCTIONS["none"]), tl.constexpr(REDUCTIONS["sample"])
# The smallest normal float32, below which a norm is not divided by.
TINY = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["rows"])
def codebook_gather_kernel(
    x, codebook, indices, quantized, errors, loss, slots, ticket, x_head_stride, x_stride, code_head_stride, code_stride,
    heads, rows, dim, loss_weight, scale, ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The codes of the indices, and ``loss_weight`` times the squared errors: elementwise, or summed over each row into ``errors``, or over
    all and times ``scale`` into ``loss``; what is None is not written. Grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(rows, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(program, heads * blocks, programs):
        head = (block // blocks).to(tl.int64)
        row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat = head * rows + row
        code = tl.load(indices + flat, mask=row < rows, other=0)
        of_row = tl.zeros([ROWS], tl.float32)
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = (row < rows)[:, None] & (column < dim)[None, :]
            values = load_tile(x + head * x_head_stride, row, x_stride, column, mask)
            codes = load_tile(codebook + head * code_head_stride, code, code_stride, column, mask)
            at = flat[:, None] * dim + column[None, :]
            error = (values - codes) * (values - codes)
            if quantized is not None:
                tl.store(quantized + at, codes, mask=mask)
            if ELEMENTWISE:
                tl.store(loss + at, loss_weight * error, mask=mask)
            of_row += tl.sum(error, axis=1)
        if errors is not None:
            tl.store(errors + flat, of_row, mask=row < rows)
        total += of_row
    if slots is not None:
        tl.store(slots + program, tl.sum(total, axis=0))
        if is_last(ticket, programs):
            tl.store(loss, sum_programs(slots, programs) * scale)


@triton.jit
def loss_gradient(grad_loss, flat, at, mask, rows_per_sample, REDUCTION: tl.constexpr):
    """The gradient that comes in for the loss of each element of some rows."""
    if REDUCTION == NONE:
        return tl.load(grad_loss + at, mask=mask, other=0.0).to(tl.float32)
    elif REDUCTION == SAMPLE:
        sample = flat // rows_per_sample
        return tl.load(grad_loss + sample[:, None], mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(grad_loss).to(tl.float32)


@triton.jit
def norms_of(base, own, row, code, x_stride, code_stride, inside, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x_square, code_square = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < dim)[None, :]
        values, codes = load_tile(base, row, x_stride, column, mask), load_tile(own, code, code_stride, column, mask)
        x_square += tl.sum(values * values, axis=1)
        code_square += tl.sum(codes * codes, axis=1)
    return tl.maximum(tl.sqrt(x_square), TINY), tl.sqrt(code_square)


@triton.jit
def rotation_of(
    grad, base, own, row, code, grad_stride, x_stride, code_stride, inside, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """What of x, of the code and of the gradient that comes in the gradient of x consists, per row: the transpose of the rotation and
    scaling that take x to its code."""
    x_norm, code_norm = norms_of(base, own, row, code, x_stride, code_stride, inside, dim, ROWS, COLUMNS)
    x_factor, code_factor = 1.0 / x_norm, 1.0 / tl.maximum(code_norm, TINY)
    square, along, along_code = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < dim)[None, :]
        x_unit = load_tile(base, row, x_stride, column, mask) * x_factor[:, None]
        code_unit = load_tile(own, code, code_stride, column, mask) * code_factor[:, None]
        incoming = load_tile(grad, row, grad_stride, column, mask)
        between = x_unit + code_unit
        square += tl.sum(between * between, axis=1)
        along += tl.sum(between * incoming, axis=1)
        along_code += tl.sum(code_unit * incoming, axis=1)
    between_norm = tl.maximum(tl.sqrt(square), TINY)
    along = 2.0 * (along / between_norm) / between_norm
    scale = code_norm / x_norm
    return scale, x_factor * (2.0 * along_code - along), code_factor * -along


@triton.jit(do_not_specialize=["rows"])
def codebook_backward_kernel(
    grad_quantized, grad_loss, x, codebook, indices, grad_x, grad_head_stride, grad_stride, x_head_stride, x_stride,
    code_head_stride, code_stride, heads, rows, dim, rows_per_sample, factor,
    REDUCTION: tl.constexpr, ROTATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of x: that of the codes, unchanged or turned, and ``factor`` times that of the loss. Grid: (programs,)."""
    blocks = tl.cdiv(rows, ROWS)
    for block in range(tl.program_id(0), heads * blocks, tl.num_programs(0)):
        head = (block // blocks).to(tl.int64)
        row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat, inside = head * rows + row, row < rows
        code = tl.load(indices + flat, mask=inside, other=0)
        base, own = x + head * x_head_stride, codebook + head * code_head_stride
        if ROTATION:
            scale, of_x, of_code = rotation_of(
                grad_quantized + head * grad_head_stride, base, own, row, code, grad_stride, x_stride, code_stride, inside, dim,
                ROWS, COLUMNS,
            )  # fmt: skip
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < dim)[None, :]
            at = flat[:, None] * dim + column[None, :]
            gradient = tl.zeros([ROWS, COLUMNS], tl.float32)
            values, codes = load_tile(base, row, x_stride, column, mask), load_tile(own, code, code_stride, column, mask)
            if grad_quantized is not None:
                gradient = load_tile(grad_quantized + head * grad_head_stride, row, grad_stride, column, mask)
            if ROTATION:
                gradient = scale[:, None] * (gradient + of_x[:, None] * values + of_code[:, None] * codes)
            if grad_loss is not None:
                incoming = loss_gradient(grad_loss, flat, at, mask, rows_per_sample, REDUCTION)
                gradient += factor * incoming * (values - codes)
            tl.store(grad_x + at, gradient, mask=mask)


@triton.jit(do_not_specialize=["rows"])
def codebook_finite_rows_kernel(x, indices, kept, x_head_stride, x_stride, heads, rows, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``kept`` is the index of each row as int32, -1 for a row that is not finite. Grid: (programs,)."""
    blocks = tl.cdiv(rows, ROWS)
    for block in range(tl.program_id(0), heads * blocks, tl.num_programs(0)):
        head = (block // blocks).to(tl.int64)
        row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat, inside = head * rows + row, row < rows
        finite = tl.full([ROWS], 1, tl.int32)
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            values = load_tile(x + head * x_head_stride, row, x_stride, column, inside[:, None] & (column < dim)[None, :])
            finite = tl.minimum(finite, tl.min(tl.where(tl.abs(values) <= LARGEST_FLOAT, 1, 0), axis=1))
        index = tl.load(indices + flat, mask=inside, other=-1).to(tl.int32)
        tl.store(kept + flat, tl.where(finite == 1, index, -1), mask=inside)


@triton.jit(do_not_specialize=["rows", "codes", "parts"])
def codebook_parts_kernel(
    x, codebook, grad_loss, order, starts, first_parts, owners, partial, x_head_stride, x_stride, code_head_stride, code_stride,
    rows, codes, dim, parts, rows_per_sample, REDUCTION: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sum over a part of a code's rows of x, or, with a gradient of the loss, of that times code - x. Grid: (parts, heads)."""
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    code = tl.load(owners + head * parts + part)
    if code < codes:
        slot = head * (codes + 1) + code
        begin = tl.load(starts + slot) + (part - tl.load(first_parts + slot)) * LENGTH
        count = tl.minimum(tl.load(starts + slot + 1) - begin, LENGTH).to(tl.int32)
        order += head * rows + begin
        x += head * x_head_stride
        own_code = codebook + head * code_head_stride + code * code_stride
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            total = tl.zeros([ROWS, COLUMNS], tl.float32)
            for start in range(0, count, ROWS):
                position = start + tl.arange(0, ROWS)
                row = tl.load(order + position, mask=position < count, other=0)
                mask = (position < count)[:, None] & (column < dim)[None, :]
                values = load_tile(x, row, x_stride, column, mask)
                if grad_loss is not None:
                    flat = head * rows + row
                    own = tl.load(own_code + column, mask=column < dim, other=0.0).to(tl.float32)
                    incoming = loss_gradient(grad_loss, flat, flat[:, None] * dim + column[None, :], mask, rows_per_sample, REDUCTION)
                    values = tl.where(mask, incoming * (own[None, :] - values), 0.0)
                total += values
            tl.store(partial + (head * parts + part) * dim + column, tl.sum(total, axis=0), mask=column < dim)


@triton.jit(do_not_specialize=["codes", "parts"])
def codebook_sums_kernel(partial, first_parts, sums, codes, dim, parts, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``factor`` times the sums of the parts of each code. Grid: (blocks of codes, heads)."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(first_parts + head * (codes + 1) + code, mask=code < codes, other=0)
    count = tl.load(first_parts + head * (codes + 1) + code + 1, mask=code < codes, other=0) - begin
    most = tl.max(count, axis=0)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in range(0, most):
            mask = (part < count)[:, None] & (column < dim)[None, :]
            total += load_tile(partial + head * parts * dim, begin + part, dim, column, mask)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        tl.store(sums + ((head * codes + code)[:, None] * dim + column[None, :]), total * factor, mask=mask)


@triton.jit(do_not_specialize=["codes"])
def codebook_counts_kernel(ema_count, counts, totals, codes, decay, complement, BLOCK: tl.constexpr):
    """The moving averages of the counts of a head, and their sum. Grid: (heads,)."""
    head = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, codes, BLOCK):
        code = first + tl.arange(0, BLOCK)
        at, mask = head * codes + code, code < codes
        count = tl.load(ema_count + at, mask=mask, other=0.0) * decay + complement * tl.load(counts + at, mask=mask, other=0).to(tl.float32)
        tl.store(ema_count + at, count, mask=mask)
        total += count.to(tl.float64)
    tl.store(totals + head, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["codes"])
def codebook_ema_kernel(
    codebook, ema_count, ema_sum, sums, totals, codes, dim, decay, complement, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The moving averages of the sums, and the codes as their quotients by the smoothed counts. Grid: (blocks of codes, heads)."""
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot = head * codes + code
    total = tl.load(totals + head)
    count = tl.load(ema_count + slot, mask=code < codes, other=0.0).to(tl.float64)
    smoothed = (count + eps) / (total + codes.to(tl.float64) * eps) * total
    used = smoothed > 0.0
    inverse = tl.where(used, 1.0 / smoothed, 0.0).to(tl.float32)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        at = slot[:, None] * dim + column[None, :]
        mean = tl.load(ema_sum + at, mask=mask, other=0.0) * decay + complement * tl.load(sums + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(ema_sum + at, mean, mask=mask)
        tl.store(codebook + at, mean * inverse[:, None], mask=mask & used[:, None])


def _blocks(x: Tensor) -> tuple[dict, int]:
    """The blocks of rows that kernels take, as options, and how many programs take them."""
    machine = _device.machine(x.device)
    config = _launch.row_blocks(x.shape[0], x.shape[1], x.shape[2], x.element_size(), machine)
    return {"ROWS": config.rows, "COLUMNS": config.columns, **_launch.OPTIONS}, config.programs


@_device.implements(ops.nearest)
def _nearest(arguments: ops.NearestArguments) -> ops.NearestResults:
    rows, codes = rows_of(arguments.x), rows_of(arguments.codebook)
    results = arguments.allocate()._replace(indices=nearest(rows, codes))
    if results.distance.numel():
        _gather(rows, codes, results.indices, errors=results.distance)
    return results


def _gather(x, codebook, indices, quantized=None, errors=None, loss=None, elementwise=False, loss_weight=1.0, scale=1.0):
    options, programs = _blocks(x.tensor)
    heads, rows, dim = x.tensor.shape
    slots, ticket = None, None
    with _device.on(indices.device):
        if loss is not None and not elementwise:
            slots, ticket = indices.new_empty(programs, dtype=torch.float32), _device.ticket(indices.device)
        codebook_gather_kernel[(programs,)](
            x.tensor, codebook.tensor, indices, quantized, errors, loss, slots, ticket, *x[1:], *codebook[1:],
            heads, rows, dim, loss_weight, scale, ELEMENTWISE=elementwise, **options,
        )  # fmt: skip


@_device.implements(ops.quantize)
def _quantize(arguments: ops.QuantizeArguments) -> ops.QuantizeResults:
    x, codebook, batch, reduction, loss_weight = arguments
    elementwise, by_sample = reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"]
    quantized, _, loss = arguments.allocate()
    rows, codes = rows_of(x), rows_of(codebook)
    indices = nearest(rows, codes)
    if x.numel() == 0:
        return ops.QuantizeResults(quantized, indices, loss.zero_())
    if by_sample:
        errors = indices.new_empty(indices.shape, dtype=torch.float32)
        _gather(rows, codes, indices, quantized, errors)
        loss = errors.view(batch, -1).sum(1).mul_(loss_weight)
    else:
        scale = loss_weight * ops.loss_scale(x.shape, batch, reduction)
        _gather(rows, codes, indices, quantized, loss=loss, elementwise=elementwise, loss_weight=loss_weight, scale=scale)
    return ops.QuantizeResults(quantized, indices, loss)


@_device.implements(ops.quantize_backward)
def _backward(arguments: ops.QuantizeBackwardArguments) -> ops.QuantizeBackwardResults:
    grad_quantized, grad_loss, x, codebook, indices, batch, reduction, codebook_cost, commitment_cost, rotation, with_codebook = arguments
    results = grad_x, grad_codebook = arguments.allocate()
    if x.numel() == 0 or grad_loss is None:
        grad_codebook.zero_()
    if x.numel() == 0:
        return results
    rows, codes, indices = rows_of(x), rows_of(codebook), indices.contiguous()
    incoming = rows_of(x if grad_quantized is None else grad_quantized)
    weights = None if grad_loss is None else grad_loss.contiguous()
    scale = 2.0 * ops.loss_scale(x.shape, batch, reduction)
    rows_per_sample = max(indices.numel() // max(batch, 1), 1)
    options, programs = _blocks(x)
    with _device.on(x.device):
        codebook_backward_kernel[(programs,)](
            None if grad_quantized is None else incoming.tensor, weights, rows.tensor, codes.tensor, indices, grad_x,
            *incoming[1:], *rows[1:], *codes[1:], *x.shape, rows_per_sample, scale * commitment_cost,
            REDUCTION=reduction, ROTATION=rotation and grad_quantized is not None, **options,
        )  # fmt: skip
    if with_codebook and weights is not None:
        _sum_by_code(
            rows, _Parts.of(indices.to(torch.int32), codebook.shape[1]), grad_codebook, scale * codebook_cost, codes, weights,
            rows_per_sample, reduction,
        )  # fmt: skip
    return results


class _Parts(NamedTuple):
    """The rows of each head in the order of their codes, and how the rows of a code are cut into parts."""

    order: Tensor
    starts: Tensor
    first_parts: Tensor
    owners: Tensor

    @classmethod
    def of(cls, indices: Tensor, codes: int) -> "_Parts":
        """Rows whose index (int32: 32 bits are sorted faster than 64) is negative, or not below ``codes``, have no part. Nothing here waits
        for the device: there are at most so many parts as codes and full parts together."""
        heads, rows = indices.shape
        number = torch.arange(codes + 1, dtype=torch.int32, device=indices.device).expand(heads, -1).contiguous()
        ordered, order = indices.sort(dim=1, stable=True)
        starts = torch.searchsorted(ordered, number)
        counts = starts.diff(dim=1)
        full = (counts + _launch.PART_ROWS - 1).div_(_launch.PART_ROWS, rounding_mode="floor")
        first_parts = torch.nn.functional.pad(full.cumsum(1), (1, 0))
        parts = torch.arange(codes + rows // _launch.PART_ROWS, device=indices.device).expand(heads, -1).contiguous()
        owners = torch.searchsorted(first_parts[:, 1:].contiguous(), parts, right=True)
        return cls(order, starts, first_parts, owners)


def _sum_by_code(x, parts, sums, factor, codebook=None, weights=None, rows_per_sample=1, reduction=REDUCTIONS["sum"]):
    heads, rows, dim = x.tensor.shape
    codes, count = sums.shape[1], parts.owners.shape[1]
    partial = sums.new_empty((heads, count, dim), dtype=torch.float32)
    options, _ = _blocks(x.tensor)
    codebook = x if codebook is None else codebook
    with _device.on(sums.device):
        codebook_parts_kernel[count, heads](
            x.tensor, codebook.tensor, weights, *parts, partial, *x[1:], *codebook[1:], rows, codes, dim, count, rows_per_sample,
            REDUCTION=reduction, LENGTH=_launch.PART_ROWS, **options,
        )  # fmt: skip
        codebook_sums_kernel[triton.cdiv(codes, options["ROWS"]), heads](
            partial, parts.first_parts, sums, codes, dim, count, factor, **options
        )


@_device.implements(ops.sums)
def _sums(arguments: ops.SumsArguments) -> ops.SumsResults:
    rows, sums = rows_of(arguments.x), arguments.allocate().sums
    parts = _Parts.of(_indices_of_finite_rows(rows, arguments.indices.contiguous()), arguments.codes)
    if sums.numel():
        _sum_by_code(rows, parts, sums, 1.0)
    return ops.SumsResults(parts.starts.diff(dim=1), sums)


def _indices_of_finite_rows(x, indices):
    kept = torch.empty_like(indices, dtype=torch.int32)
    if kept.numel():
        options, programs = _blocks(x.tensor)
        with _device.on(indices.device):
            codebook_finite_rows_kernel[(programs,)](x.tensor, indices, kept, *x[1:], *x.tensor.shape, **options)
    return kept


@_device.implements(ops.ema_)
def _ema_(arguments: ops.EmaArguments) -> None:
    codebook, ema_count, ema_sum, counts, sums, decay, eps = arguments
    heads, codes, dim = codebook.shape
    totals = counts.new_empty((heads,), dtype=torch.float64)
    options, _ = _blocks(codebook)
    with _device.on(codebook.device):
        codebook_counts_kernel[(heads,)](ema_count, counts.contiguous(), totals, codes, decay, 1.0 - decay, BLOCK=1024, **_launch.OPTIONS)
        codebook_ema_kernel[triton.cdiv(codes, options["ROWS"]), heads](
            codebook, ema_count, ema_sum, sums.contiguous(), totals, codes, dim, decay, 1.0 - decay, eps, **options
        )
