"""The contractive penalty and the epilogues of the Gram form on a GPU.

The forward pass reads the weight once, for the norms of its rows, and the hidden values once; so does the backward pass. Sums over units,
samples or inputs are made in two stages, whose order depends on the sizes and the machine alone.
"""

import torch
import triton
import triton.language as tl

from fastvae._ops import ACTIVATIONS, REDUCTIONS, reduced_shape
from fastvae.kernels import _device, _launch
from fastvae.kernels._reduce import is_last, store_row_sums, sum_programs, sum_slots
from fastvae.reference._reduce import reduction_scale

NONE, SAMPLE = tl.constexpr(REDUCTIONS["none"]), tl.constexpr(REDUCTIONS["sample"])
SIGMOID, TANH = tl.constexpr(ACTIVATIONS["sigmoid"]), tl.constexpr(ACTIVATIONS["tanh"])
RELU, LEAKY_RELU, ELU = tl.constexpr(ACTIVATIONS["relu"]), tl.constexpr(ACTIVATIONS["leaky_relu"]), tl.constexpr(ACTIVATIONS["elu"])
SOFTPLUS, SILU = tl.constexpr(ACTIVATIONS["softplus"]), tl.constexpr(ACTIVATIONS["silu"])
GELU, GELU_TANH = tl.constexpr(ACTIVATIONS["gelu"]), tl.constexpr(ACTIVATIONS["gelu_tanh"])


@triton.jit
def logistic(a):
    e = tl.exp(-tl.abs(a))
    r = 1.0 / (1.0 + e)
    return tl.where(a < 0, e * r, r)


@triton.jit
def expm1_negative(x):
    # Near 0 the difference of 1 and exp would cancel.
    p = tl.fma(x, 1.3888889e-3, 8.3333333e-3)
    p = tl.fma(x, p, 4.1666667e-2)
    p = tl.fma(x, p, 1.6666667e-1)
    p = tl.fma(x, p, 0.5)
    return tl.where(x > -0.35, x * tl.fma(x, p, 1.0), tl.exp(x) - 1.0)


@triton.jit
def constant(value, h):
    """``value``, and NaN where ``h`` is."""
    return tl.where(h == h, value, h)


@triton.jit
def derivatives(h, alpha, ACTIVATION: tl.constexpr):
    """The activation's derivative from the hidden value, and the derivative of that."""
    if ACTIVATION == SIGMOID:
        return h * (1.0 - h), tl.fma(h, -2.0, 1.0)
    elif ACTIVATION == TANH:
        return tl.fma(-h, h, 1.0), -2.0 * h
    elif ACTIVATION == RELU:
        return constant(tl.where(h <= 0, 0.0, 1.0), h), constant(0.0, h)
    elif ACTIVATION == LEAKY_RELU:
        return constant(tl.where(h <= 0, alpha, 1.0), h), constant(0.0, h)
    elif ACTIVATION == ELU:
        return tl.where(h <= 0, h + alpha, constant(1.0, h)), constant(tl.where(h <= 0, 1.0, 0.0), h)
    elif ACTIVATION == SOFTPLUS:
        slope = -expm1_negative(-alpha * h)
        return slope, alpha * (1.0 - slope)
    elif ACTIVATION == SILU:
        sigma = logistic(h)
        product = sigma * logistic(-h)
        return tl.fma(h, product, sigma), product * tl.fma(h, tl.fma(sigma, -2.0, 1.0), 2.0)
    elif ACTIVATION == GELU:
        density = 0.398942280 * tl.exp(-0.5 * h * h)
        return tl.fma(h, density, 0.5 + 0.5 * tl.erf(h * 0.707106781)), density * tl.fma(-h, h, 2.0)
    elif ACTIVATION == GELU_TANH:
        square = h * h
        a = 1.59576912 * h * tl.fma(square, 0.044715, 1.0)
        sigma, complement = logistic(a), logistic(-a)
        inner, curvature = 0.797884561 * tl.fma(square, 0.134145, 1.0), 0.214064466 * h
        spread, tanh = 2.0 * sigma * complement, sigma - complement
        change = spread * tl.fma(h, tl.fma(-2.0 * tanh, inner * inner, curvature), 2.0 * inner)
        return tl.fma(h * spread, inner, sigma), change
    else:
        return constant(1.0, h), constant(0.0, h)


@triton.jit
def matrix_block(first_row, first_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows (int64) and columns of a block, and which of its elements there are."""
    row = tl.cast(first_row, tl.int64) + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    return row, column, (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit(do_not_specialize=["rows"])
def squared_norms_kernel(
    weight, norms, slots, ticket, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr
):
    """The squared norm of each row. Grid: (groups, splits)."""
    first_row = tl.program_id(0) * ROWS
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    row = tl.cast(first_row, tl.int64) + tl.arange(0, ROWS)
    for first in range(tl.program_id(1) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        row, column, mask = matrix_block(first_row, first, rows, columns, ROWS, COLUMNS)
        values = tl.load(weight + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total = tl.fma(values, values, total)
    store_row_sums(tl.sum(total, axis=1), norms, slots, ticket, row, rows, SPLIT)


@triton.jit(do_not_specialize=["rows"])
def penalty_kernel(
    hidden, norms, penalty, slots, ticket, rows, columns, stride, alpha, scale,
    ACTIVATION: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The penalty elementwise, of each row (a sample), or summed. Grid: (groups, splits)."""
    group, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    row = tl.cast(group * ROWS, tl.int64) + tl.arange(0, ROWS)
    for first in range(split * COLUMNS, columns, splits * COLUMNS):
        row, column, mask = matrix_block(group * ROWS, first, rows, columns, ROWS, COLUMNS)
        h = tl.load(hidden + row[:, None] * stride + column[None, :], mask=mask).to(tl.float32)
        norm = tl.load(norms + column, mask=column < columns, other=0.0)
        slope, _ = derivatives(h, alpha, ACTIVATION)
        elements = slope * slope * norm[None, :]
        if REDUCTION == NONE:
            tl.store(penalty + row[:, None] * columns + column[None, :], elements, mask=mask)
        else:
            total += tl.where(mask, elements, 0.0)
    if REDUCTION == SAMPLE:
        store_row_sums(tl.sum(total, axis=1), penalty, slots, ticket, row, rows, SPLIT)
    elif REDUCTION != NONE:
        programs = tl.num_programs(0) * splits
        tl.store(slots + group * splits + split, tl.sum(total))
        if is_last(ticket, programs):
            tl.store(penalty, sum_programs(slots, programs) * scale)


@triton.jit(do_not_specialize=["rows"])
def hidden_backward_kernel(
    grad_output, hidden, norms, grad_hidden, sums, slots, ticket, rows, columns, stride, alpha, scale,
    ACTIVATION: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the hidden values and, summed over the samples, what the gradients of the weight's rows are multiples of; each where
    it is not None. Grid: (groups, splits)."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    first_column = tl.program_id(0) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    norm = tl.load(norms + column, mask=column < columns, other=0.0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(split * ROWS, rows, splits * ROWS):
        row, _, mask = matrix_block(first, first_column, rows, columns, ROWS, COLUMNS)
        if REDUCTION == NONE:
            incoming = tl.load(grad_output + row[:, None] * columns + column[None, :], mask=mask).to(tl.float32)
        elif REDUCTION == SAMPLE:
            incoming = tl.load(grad_output + row, mask=row < rows).to(tl.float32)[:, None]
        else:
            incoming = tl.load(grad_output).to(tl.float32) * scale
        h = tl.load(hidden + row[:, None] * stride + column[None, :], mask=mask).to(tl.float32)
        slope, change = derivatives(h, alpha, ACTIVATION)
        if grad_hidden is not None:
            gradient = incoming * norm[None, :] * (2.0 * slope * change)
            tl.store(grad_hidden + row[:, None] * columns + column[None, :], gradient, mask=mask)
        if sums is not None:
            total += tl.where(mask, incoming * slope * slope, 0.0)
    if sums is not None:
        tl.store(slots + tl.cast(split, tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)
        if is_last(ticket, tl.num_programs(0) * splits):
            for first in range(0, columns, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                mask = column < columns
                tl.store(sums + column, sum_slots(slots, column, mask, splits, columns, ROWS, COLUMNS), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def weight_backward_kernel(weight, sums, grad_weight, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each row of the weight times twice its sum. Grid: (groups, splits)."""
    first_row = tl.program_id(0) * ROWS
    for first in range(tl.program_id(1) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        row, column, mask = matrix_block(first_row, first, rows, columns, ROWS, COLUMNS)
        factor = 2.0 * tl.load(sums + row, mask=row < rows)
        values = tl.load(weight + row[:, None] * stride + column[None, :], mask=mask).to(tl.float32)
        tl.store(grad_weight + row[:, None] * columns + column[None, :], values * factor[:, None], mask=mask)


@_device.implements("jacobian_forward")
def _forward(hidden, weight, activation, alpha, reduction, grad_scale, with_grad_hidden, with_grad_weight):
    dtype = hidden.dtype if reduction == REDUCTIONS["none"] else torch.float32
    penalty = hidden.new_empty(reduced_shape(hidden.shape, reduction), dtype=dtype)
    norms = hidden.new_empty(weight.shape[:1], dtype=torch.float32)
    hidden, weight = _rows(hidden), _rows(weight)
    with _device.on(hidden.device):
        _squared_norms(weight, norms)
        if hidden.numel() == 0:
            penalty.zero_()
        else:
            _penalty(hidden, norms, penalty, activation, alpha, reduction)
    if not (with_grad_hidden or with_grad_weight):
        return penalty, norms, hidden.new_empty((0,)), weight.new_empty((0,))
    incoming = hidden.new_full((), grad_scale, dtype=torch.float32)
    return penalty, norms, *_backward(incoming, hidden, weight, norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight)


def _rows(tensor):
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _squared_norms(weight, norms):
    rows, columns = weight.shape
    if weight.numel() == 0:
        norms.zero_()
        return
    config = _launch.row_sums(rows, columns, weight.element_size(), _device.machine(weight.device))
    split = config.splits > 1
    slots, ticket = (norms.new_empty(config.splits * rows), _device.ticket(norms.device)) if split else (None, None)
    squared_norms_kernel[config.groups, config.splits](
        weight, norms, slots, ticket, rows, columns, weight.stride(0),
        ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


def _penalty(hidden, norms, penalty, activation, alpha, reduction):
    rows, columns = hidden.shape
    config = _launch.row_sums(rows, columns, hidden.element_size(), _device.machine(hidden.device))
    split, elementwise, by_row = config.splits > 1, reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"]
    slots, ticket = None, None
    if not elementwise and (split or not by_row):
        slots = norms.new_empty(config.splits * (rows if by_row else config.groups))
        ticket = _device.ticket(norms.device)
    penalty_kernel[config.groups, config.splits](
        hidden, norms, penalty, slots, ticket, rows, columns, hidden.stride(0), alpha, reduction_scale(hidden.shape, reduction),
        ACTIVATION=activation, REDUCTION=reduction, ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


@_device.implements("jacobian_backward")
def _backward(grad_output, hidden, weight, squared_norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight):
    grad_hidden = hidden.new_empty(hidden.shape if with_grad_hidden else (0,))
    grad_weight = weight.new_empty(weight.shape if with_grad_weight else (0,))
    hidden, weight = _rows(hidden), _rows(weight)
    if hidden.numel() == 0:
        return grad_hidden, grad_weight.zero_()
    (rows, columns), machine = hidden.shape, _device.machine(hidden.device)
    config = _launch.column_sums(rows, columns, hidden.element_size(), machine)
    sums, slots, ticket = None, None, None
    if with_grad_weight:
        sums, slots = squared_norms.new_empty(columns), squared_norms.new_empty(config.splits * columns)
        ticket = _device.ticket(hidden.device)
    with _device.on(hidden.device):
        hidden_backward_kernel[config.groups, config.splits](
            grad_output.contiguous(), hidden, squared_norms, grad_hidden if with_grad_hidden else None, sums, slots, ticket,
            rows, columns, hidden.stride(0), alpha, reduction_scale(hidden.shape, reduction),
            ACTIVATION=activation, REDUCTION=reduction, ROWS=config.rows, COLUMNS=config.columns, **_launch.OPTIONS,
        )  # fmt: skip
        if grad_weight.numel():
            config = _launch.row_sums(*weight.shape, weight.element_size(), machine)
            weight_backward_kernel[config.groups, config.splits](
                weight, sums, grad_weight, *weight.shape, weight.stride(0), ROWS=config.rows, COLUMNS=config.columns, **_launch.OPTIONS
            )
    return grad_hidden, grad_weight


@triton.jit
def sample_and_row(index, rows, ROWS: tl.constexpr):
    """The samples (int64) and rows of the matrices' rows ``index``, which are numbered through all samples."""
    sample = index // rows
    return sample, index - sample * rows


@triton.jit
def left_offset(sample, row, rows, columns, BATCHED: tl.constexpr):
    if BATCHED:
        return (sample * rows + row) * columns
    else:
        return row * columns


@triton.jit(do_not_specialize=["count"])
def gram_rows_kernel(
    left, inner, outer, product, scaled, dots, count, rows, columns,
    BATCHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``scaled = outer left inner``, or, where it is None, the sum over a row of ``left inner product``. Grid: (groups,)."""
    index = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    sample, row = sample_and_row(index, rows, ROWS)
    there = index < count
    lefts, inners = left_offset(sample, row, rows, columns, BATCHED)[:, None], (sample * columns)[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, columns, COLUMNS):
        column = (first + tl.arange(0, COLUMNS))[None, :]
        mask = there[:, None] & (column < columns)
        values = tl.load(left + lefts + column, mask=mask, other=0.0) * tl.load(inner + inners + column, mask=mask, other=0.0)
        position = index[:, None] * columns + column
        if scaled is not None:
            tl.store(scaled + position, values * tl.load(outer + index, mask=there)[:, None], mask=mask)
        else:
            total = tl.fma(values, tl.load(product + position, mask=mask, other=0.0), total)
    if scaled is None:
        tl.store(dots + index, tl.sum(total, axis=1), mask=there)


@triton.jit(do_not_specialize=["batch"])
def gram_columns_kernel(
    left, inner, outer, product, grad_inner, grad_left, batch, rows, columns,
    BATCHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``grad_inner``, a sum over the rows of a sample; with BATCHED ``grad_left`` too, a product. Grid: (batch, groups of columns)."""
    sample = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    factor = tl.load(inner + sample * columns + column, mask=inside, other=0.0)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        position = (sample * rows + row)[:, None] * columns + column[None, :]
        outers = tl.load(outer + sample * rows + row, mask=row < rows, other=0.0)[:, None]
        weighted = outers * tl.load(product + position, mask=mask, other=0.0)
        lefts = left_offset(sample, row, rows, columns, BATCHED)[:, None] + column[None, :]
        total = tl.fma(tl.load(left + lefts, mask=mask, other=0.0), weighted, total)
        if BATCHED:
            tl.store(grad_left + position, factor * weighted, mask=mask)
    tl.store(grad_inner + sample * columns + column, tl.sum(total, axis=0), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def gram_left_kernel(inner, outer, product, grad_left, batch, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """``grad_left`` where all samples share ``left``: a sum over them. Grid: (groups of rows, groups of columns)."""
    row, column, mask = matrix_block(tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS, rows, columns, ROWS, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for sample in range(0, batch):
        start = tl.cast(sample, tl.int64)
        outers = tl.load(outer + start * rows + row, mask=row < rows, other=0.0)[:, None]
        inners = tl.load(inner + start * columns + column, mask=column < columns, other=0.0)[None, :]
        values = tl.load(product + (start * rows + row)[:, None] * columns + column[None, :], mask=mask, other=0.0)
        total = tl.fma(outers * inners, values, total)
    tl.store(grad_left + row[:, None] * columns + column[None, :], total, mask=mask)


@_device.implements("jacobian_gram_scale")
def _gram_scale(left, inner, outer):
    (batch, rows), columns = outer.shape, inner.shape[1]
    scaled = left.new_empty((batch * rows, columns))
    if scaled.numel():
        _gram_rows(left, inner, outer, None, scaled, None)
    return scaled


def _gram_rows(left, inner, outer, product, scaled, dots):
    (batch, rows), columns = outer.shape, inner.shape[1]
    config = _launch.row_sums(batch * rows, columns, left.element_size(), _device.machine(left.device))
    with _device.on(left.device):
        gram_rows_kernel[(config.groups,)](
            left.contiguous(), inner.contiguous(), outer.contiguous(), product, scaled, dots, batch * rows, rows, columns,
            BATCHED=left.ndim == 3, ROWS=config.rows, COLUMNS=config.columns, **_launch.OPTIONS,
        )  # fmt: skip


@_device.implements("jacobian_gram_reduce")
def _gram_reduce(left, inner, outer, product, with_grad):
    (batch, rows), columns, batched = outer.shape, inner.shape[1], left.ndim == 3
    dots = outer.new_empty(outer.shape)
    grad_inner, grad_left = (t.new_empty(t.shape if with_grad else (0,)) for t in (inner, left))
    if product.numel() == 0:
        return dots.zero_(), grad_inner.zero_(), grad_left.zero_()
    left, inner, outer, product = (t.contiguous() for t in (left, inner, outer, product))
    _gram_rows(left, inner, outer, product, None, dots)
    if with_grad:
        config = _launch.column_sums(rows, columns, left.element_size(), _device.machine(left.device))
        block = {"ROWS": config.rows, "COLUMNS": config.columns, **_launch.OPTIONS}
        with _device.on(left.device):
            gram_columns_kernel[batch, config.groups](
                left, inner, outer, product, grad_inner, grad_left, batch, rows, columns, BATCHED=batched, **block
            )
            if not batched:
                gram_left_kernel[triton.cdiv(rows, config.rows), config.groups](
                    inner, outer, product, grad_left, batch, rows, columns, **block
                )
    return dots, grad_inner, grad_left
