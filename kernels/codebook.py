"""Vector quantization on a GPU: the outputs of the indices, the sums over the rows of each code, and the moving averages.

The search for the nearest codes and the gradients of x have files of their own.

===========================  ========================  ===============================================  ==========================
kernel                       grid                      reads                                            writes
===========================  ========================  ===============================================  ==========================
codebook_gather_kernel       (programs,)               x, codebook, indices                             quantized, errors, loss
codebook_finite_rows_kernel  (programs,)               x, indices                                       finite_indices
codebook_parts_kernel        (parts, heads)            x, codebook, grad_loss, the parts                partial
codebook_sums_kernel         (blocks of codes, heads)  partial, first_parts                             sums
codebook_counts_kernel       (heads,)                  counts                                           ema_count, totals
codebook_ema_kernel          (blocks of codes, heads)  sums, totals, ema_count                          ema_sum, codebook
===========================  ========================  ===============================================  ==========================

The rows of a code are summed in their order: torch sorts the indices stably, the rows of each code are cut into parts, a program sums each
part, and another kernel adds the parts of a code. Throughout, x is (heads, rows, dim), codebook (heads, codes, dim) and indices (heads,
rows) int64; ``flat`` numbers the rows over the heads.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._codebook_gradient import codebook_backward_kernel, loss_gradient
from fastvae.kernels._codebook_pack import MAX_FLOAT, load_tile
from fastvae.kernels._codebook_search import nearest, rows_of
from fastvae.kernels._reduce import is_last, store_slots, sum_programs
from fastvae.ops import codebook as ops
from fastvae.ops._residual_steps import residual_backward_in_steps, residual_in_steps
from fastvae.ops._results import REDUCTIONS


@triton.jit(do_not_specialize=["rows"])
def codebook_gather_kernel(
    x, codebook, indices, quantized, errors, loss, slots, ticket, x_head_stride, x_stride, code_head_stride, code_stride,
    heads, rows, dim, loss_weight, scale, ELEMENTWISE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes the codes of the indices and the squared errors: ``loss_weight`` times each into ``loss`` (heads, rows, dim) with ELEMENTWISE,
    the sum over each row into ``errors`` (heads, rows), or ``scale`` times the sum over all into ``loss``, a scalar. Outputs that are None
    are not requested. Grid: (programs,), which take blocks of rows in turn.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(rows, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for block in range(program, heads * blocks, programs):
        head = (block // blocks).to(tl.int64)
        row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat = head * rows + row
        code = tl.load(indices + flat, mask=row < rows, other=0)
        row_sum = tl.zeros([ROWS], tl.float32)
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
            row_sum += tl.sum(error, axis=1)
        if errors is not None:
            tl.store(errors + flat, row_sum, mask=row < rows)
        total += row_sum
    if slots is not None:
        store_slots(slots + program, tl.sum(total, axis=0), None)
        if is_last(ticket, programs):
            tl.store(loss, sum_programs(slots, programs) * scale)


@triton.jit(do_not_specialize=["rows"])
def codebook_finite_rows_kernel(
    x, indices, finite_indices, x_head_stride, x_stride, heads, rows, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Writes the index of each row as int32, or -1 for a row that is not finite, to ``finite_indices`` (heads, rows). Grid: (programs,),
    which take blocks of rows in turn."""
    blocks = tl.cdiv(rows, ROWS)
    for block in range(tl.program_id(0), heads * blocks, tl.num_programs(0)):
        head = (block // blocks).to(tl.int64)
        row = (block % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        flat, inside = head * rows + row, row < rows
        finite = tl.full([ROWS], 1, tl.int32)
        for first in range(0, dim, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            values = load_tile(x + head * x_head_stride, row, x_stride, column, inside[:, None] & (column < dim)[None, :])
            finite = tl.minimum(finite, tl.min(tl.where(tl.abs(values) <= MAX_FLOAT, 1, 0), axis=1))
        index = tl.load(indices + flat, mask=inside, other=-1).to(tl.int32)
        tl.store(finite_indices + flat, tl.where(finite == 1, index, -1), mask=inside)


@triton.jit(do_not_specialize=["rows", "codes", "parts"])
def codebook_parts_kernel(
    x, codebook, grad_loss, order, starts, first_parts, owners, partial, x_head_stride, x_stride, code_head_stride, code_stride,
    rows, codes, dim, parts, rows_per_sample, REDUCTION: tl.constexpr, LENGTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums x over the rows of each part or, where there is a grad_loss, grad_loss * (c - x). Grid: (parts, heads).

    Pointers: order, starts, first_parts and owners as in :class:`_Parts`; partial (heads, parts, dim) float32.
    """
    head, part = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    code = tl.load(owners + head * parts + part)
    if code < codes:
        slot = head * (codes + 1) + code
        begin = tl.load(starts + slot) + (part - tl.load(first_parts + slot)) * LENGTH
        count = tl.minimum(tl.load(starts + slot + 1) - begin, LENGTH).to(tl.int32)
        order += head * rows + begin
        x += head * x_head_stride
        code_pointer = codebook + head * code_head_stride + code * code_stride
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
                    code_values = tl.load(code_pointer + column, mask=column < dim, other=0.0).to(tl.float32)
                    weights = loss_gradient(grad_loss, flat, flat[:, None] * dim + column[None, :], mask, rows_per_sample, REDUCTION)
                    values = tl.where(mask, weights * (code_values[None, :] - values), 0.0)
                total += values
            tl.store(partial + (head * parts + part) * dim + column, tl.sum(total, axis=0), mask=column < dim)


@triton.jit(do_not_specialize=["codes", "parts"])
def codebook_sums_kernel(partial, first_parts, sums, codes, dim, parts, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Adds the partial sums of the parts of each code and multiplies by ``factor``. Grid: (blocks of codes, heads).

    Pointers: partial (heads, parts, dim) float32; first_parts (heads, codes + 1) int64; sums (heads, codes, dim).
    """
    head = tl.program_id(1).to(tl.int64)
    code = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin = tl.load(first_parts + head * (codes + 1) + code, mask=code < codes, other=0)
    count = tl.load(first_parts + head * (codes + 1) + code + 1, mask=code < codes, other=0) - begin
    max_count = tl.max(count, axis=0)
    for first in range(0, dim, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for part in range(0, max_count):
            mask = (part < count)[:, None] & (column < dim)[None, :]
            total += load_tile(partial + head * parts * dim, begin + part, dim, column, mask)
        mask = (code < codes)[:, None] & (column < dim)[None, :]
        tl.store(sums + ((head * codes + code)[:, None] * dim + column[None, :]), total * factor, mask=mask)


@triton.jit(do_not_specialize=["codes"])
def codebook_counts_kernel(ema_count, counts, totals, codes, decay, complement, BLOCK: tl.constexpr):
    """Updates the moving averages of the counts of a head, and writes their sum to ``totals``. Grid: (heads,).

    Pointers: ema_count (heads, codes) float32; counts (heads, codes) int64; totals (heads,) float64. ``complement`` is 1 - decay.
    """
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
    """Updates the moving averages of the sums, and the codes, which are their quotients by the smoothed counts. Grid: (blocks of codes,
    heads).

    Pointers: codebook, ema_sum and sums (heads, codes, dim); ema_count (heads, codes); totals (heads,) float64.
    """
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
        average = tl.load(ema_sum + at, mask=mask, other=0.0) * decay + complement * tl.load(sums + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(ema_sum + at, average, mask=mask)
        tl.store(codebook + at, average * inverse[:, None], mask=mask & used[:, None])


def _blocks(x: Tensor) -> tuple[dict, int]:
    """The options of a kernel over blocks of rows, and the number of programs that take the blocks in turn."""
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
    """The rows of each head, sorted by code, and the parts of at most PART_ROWS rows into which the rows of a code are cut; all int64."""

    order: Tensor  # (heads, rows): the rows, sorted by code
    starts: Tensor  # (heads, codes + 1): the position of the first row of each code, and the end
    first_parts: Tensor  # (heads, codes + 1): the number of the first part of each code, and the end
    owners: Tensor  # (heads, parts): the code of each part, or ``codes`` where there is no such part

    @classmethod
    def of(cls, indices: Tensor, codes: int) -> "_Parts":
        """Sorts ``indices`` (heads, rows) int32, because 32 bits are sorted faster than 64. Rows whose index is negative or not below
        ``codes`` have no part. The number of parts is the largest possible one, the number of codes plus that of full parts, so that
        nothing here waits for the device."""
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


_device.implements(ops.residual)(residual_in_steps("triton"))
_device.implements(ops.residual_backward)(residual_backward_in_steps("triton"))
