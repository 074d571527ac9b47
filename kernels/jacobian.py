"""The contractive penalty and the epilogues of the Gram form on a GPU.

With n the squared norms of the weight's rows and s the sums over the samples of the squared slopes, the penalty is ``sum_j n_j s_j``: one
kernel sums over the samples, in parts, and a second one, which adds up the parts for its own rows, has the norms, their share of the
penalty and the gradient of the weight at hand together.

For B samples, H units and D inputs of ``size`` bytes that is, in each direction, one pass over hidden and one over the weight, and nothing
of their sizes is written but their gradients: size (B H + H D) bytes forward, twice as many backward. At B 512, D 3072, H 1024 those are
15 and 29 MB of float32, by 512 programs (hidden) and 1024 (weight), which keep 132 multiprocessors full. At B 128, D 784, H 256 they are
0.9 and 1.9 MB by 32 and 256 programs of one block each: all of it is under way at once, and what counts is the two launches.
"""

import torch
import triton
import triton.language as tl

from fastvae._ops import ACTIVATIONS, REDUCTIONS, reduced_shape
from fastvae.kernels import _device, _launch
from fastvae.kernels._index import NONE, SAMPLE, zero_outside
from fastvae.kernels._math import expm1, logistic, standard_normal
from fastvae.kernels._reduce import is_last, store_row_sums, store_slot_sums, sum_programs, sum_slots
from fastvae.reference._reduce import reduction_scale
from fastvae.reference.jacobian import gram_in_chunks

SIGMOID, TANH = tl.constexpr(ACTIVATIONS["sigmoid"]), tl.constexpr(ACTIVATIONS["tanh"])
RELU, LEAKY_RELU, ELU = tl.constexpr(ACTIVATIONS["relu"]), tl.constexpr(ACTIVATIONS["leaky_relu"]), tl.constexpr(ACTIVATIONS["elu"])
SOFTPLUS, SILU = tl.constexpr(ACTIVATIONS["softplus"]), tl.constexpr(ACTIVATIONS["silu"])
GELU, GELU_TANH = tl.constexpr(ACTIVATIONS["gelu"]), tl.constexpr(ACTIVATIONS["gelu_tanh"])


@triton.jit
def unless_nan(value, h):
    """``value``, and NaN where ``h`` is."""
    return tl.where(h == h, value, h)


@triton.jit
def gelu_tanh(h):
    # The hyperbolic tangent of a is a logistic function of 2 a.
    square = h * h
    sigma, complement = logistic(1.59576912 * h * tl.fma(square, 0.044715, 1.0))
    inner, curvature = 0.797884561 * tl.fma(square, 0.134145, 1.0), 0.214064466 * h
    half_slope, tanh = 2.0 * sigma * complement, sigma - complement
    change = half_slope * tl.fma(h, tl.fma(-2.0 * tanh, inner * inner, curvature), 2.0 * inner)
    return tl.fma(h * half_slope, inner, sigma), change


@triton.jit
def derivatives(h, alpha, ACTIVATION: tl.constexpr):
    """The activation's derivative from the hidden value, see fastvae/reference/jacobian.py, and the derivative of that."""
    if ACTIVATION == SIGMOID:
        return h * (1.0 - h), tl.fma(h, -2.0, 1.0)
    elif ACTIVATION == TANH:
        return tl.fma(-h, h, 1.0), -2.0 * h
    elif ACTIVATION == RELU:
        return unless_nan(tl.where(h <= 0, 0.0, 1.0), h), unless_nan(0.0, h)
    elif ACTIVATION == LEAKY_RELU:
        return unless_nan(tl.where(h <= 0, alpha, 1.0), h), unless_nan(0.0, h)
    elif ACTIVATION == ELU:
        return tl.where(h <= 0, h + alpha, unless_nan(1.0, h)), unless_nan(tl.where(h <= 0, 1.0, 0.0), h)
    elif ACTIVATION == SOFTPLUS:
        slope = -expm1(-alpha * h)
        return slope, alpha * (1.0 - slope)
    elif ACTIVATION == SILU:
        sigma, complement = logistic(h)
        product = sigma * complement
        return tl.fma(h, product, sigma), product * tl.fma(h, tl.fma(sigma, -2.0, 1.0), 2.0)
    elif ACTIVATION == GELU:
        density, distribution = standard_normal(h)
        return tl.fma(h, density, distribution), density * tl.fma(-h, h, 2.0)
    elif ACTIVATION == GELU_TANH:
        return gelu_tanh(h)
    else:
        return unless_nan(1.0, h), unless_nan(0.0, h)


@triton.jit
def block_of(program, BLOCK: tl.constexpr):
    """The rows or columns of a program, as int64."""
    return tl.cast(program, tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def mask_of(row, rows, column, columns):
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def load_block(pointer, row, column, stride, mask):
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_weights(grad_output, row, column, stride, rows, mask, REDUCTION: tl.constexpr):
    """How often the elements count: as often as their own gradient, or their sample's, says; once where all have the same."""
    if REDUCTION == NONE:
        return load_block(grad_output, row, column, stride, mask)
    elif REDUCTION == SAMPLE:
        return tl.load(grad_output + row * stride, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    else:
        return 1.0


@triton.jit
def times_scalar(factor, gradient):
    """``factor`` times the gradient of a scalar, where that is not None."""
    if gradient is None:
        return factor
    else:
        return tl.load(gradient).to(tl.float32) * factor


@triton.jit(do_not_specialize=["rows"])
def jacobian_units_kernel(
    hidden, grad_output, norms, grad_hidden, sums, rows, columns, stride, grad_stride, alpha, factor,
    ACTIVATION: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the hidden values, and of each unit the weighted squared slopes, summed over this program's samples; each where it is
    not None. Grid: (groups, splits)."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    column = block_of(tl.program_id(0), COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grad_hidden is not None:
        of_all = None if REDUCTION == NONE or REDUCTION == SAMPLE else grad_output  # noqa: SIM109 (Triton has no `in`)
        norm = tl.load(norms + column, mask=column < columns, other=0.0) * (2.0 * times_scalar(factor, of_all))
    for first in range(tl.cast(split, tl.int64) * ROWS, rows, splits * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = mask_of(row, rows, column, columns)
        weights = load_weights(grad_output, row, column, grad_stride, rows, mask, REDUCTION)
        slope, change = derivatives(load_block(hidden, row, column, stride, mask), alpha, ACTIVATION)
        if grad_hidden is not None:
            gradient = weights * norm[None, :] * slope * change
            tl.store(grad_hidden + row[:, None] * columns + column[None, :], gradient, mask=mask)
        if sums is not None:
            total += zero_outside(weights * (slope * slope), mask)
    if sums is not None:
        tl.store(sums + tl.cast(split, tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "parts"])
def jacobian_weight_kernel(
    weight, sums, grad_output, norms, penalty, grad_weight, slots, shares, ticket, rows, columns, stride, parts, scale, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The squared norms of the rows, the penalty, and the rows' gradients, each where it is not None. The sums of the units come in
    ``parts``; ``grad_output`` is the gradient of a scalar. With SPLIT the norms are summed over the programs of grid axis 1.

    Grid: (groups, splits).
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = block_of(tl.program_id(0), ROWS)
    PARTS: tl.constexpr = COLUMNS if COLUMNS < 128 else 128
    if sums is not None:
        unit_sums = sum_slots(sums, row, row < rows, parts, rows, PARTS, ROWS)
    if grad_weight is not None:
        factors = unit_sums * (2.0 * times_scalar(factor, grad_output))
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(split, tl.int64) * COLUMNS, columns, splits * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = mask_of(row, rows, column, columns)
        values = load_block(weight, row, column, stride, mask)
        if norms is not None:
            squares = tl.fma(values, values, squares)
        if grad_weight is not None:
            tl.store(grad_weight + row[:, None] * columns + column[None, :], values * factors[:, None], mask=mask)
    if norms is not None:
        norm = tl.sum(squares, axis=1)
        if penalty is None:
            store_row_sums(norm, norms, slots, ticket, row, rows, SPLIT)
        else:
            programs = tl.num_programs(0) * splits
            tl.store((slots + split.to(tl.int64) * rows if SPLIT else norms) + row, norm, mask=row < rows)
            tl.store(shares + tl.program_id(0).to(tl.int64) * splits + split, tl.sum(zero_outside(norm * unit_sums, row < rows)))
            if is_last(ticket, programs):
                if SPLIT:
                    store_slot_sums(norms, slots, rows, splits)
                tl.store(penalty, sum_programs(shares, programs) * scale)


@triton.jit(do_not_specialize=["rows"])
def jacobian_penalty_kernel(
    hidden, norms, penalty, slots, ticket, rows, columns, stride, alpha,
    ACTIVATION: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The penalty elementwise or of each row. Grid: (groups, splits)."""
    row = block_of(tl.program_id(0), ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(tl.program_id(1), tl.int64) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = mask_of(row, rows, column, columns)
        slope, _ = derivatives(load_block(hidden, row, column, stride, mask), alpha, ACTIVATION)
        elements = slope * slope * tl.load(norms + column, mask=column < columns, other=0.0)[None, :]
        if REDUCTION == NONE:
            tl.store(penalty + row[:, None] * columns + column[None, :], elements, mask=mask)
        else:
            total += zero_outside(elements, mask)
    if REDUCTION == SAMPLE:
        store_row_sums(tl.sum(total, axis=1), penalty, slots, ticket, row, rows, SPLIT)


@triton.jit(do_not_specialize=["batch"])
def jacobian_gram_scale_kernel(
    left, inner, outer, scaled, batch, rows, columns, BATCHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """``scaled = outer left inner`` of each sample. Grid: (groups of rows, groups of columns, splits)."""
    row, column = block_of(tl.program_id(0), ROWS), block_of(tl.program_id(1), COLUMNS)
    mask = mask_of(row, rows, column, columns)
    values = load_block(left, row, column, columns, mask)
    for index in range(tl.program_id(2), batch, tl.num_programs(2)):
        sample = tl.cast(index, tl.int64)
        start = sample * rows * columns
        if BATCHED:
            values = load_block(left + start, row, column, columns, mask)
        outers = tl.load(outer + sample * rows + row, mask=row < rows)[:, None]
        inners = tl.load(inner + sample * columns + column, mask=column < columns)[None, :]
        tl.store(scaled + start + row[:, None] * columns + column[None, :], outers * values * inners, mask=mask)


@triton.jit(do_not_specialize=["batch"])
def jacobian_gram_reduce_kernel(
    left, inner, outer, product, dots, grad_inner, grad_left, batch, rows, columns,
    BATCHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of left, inner, outer and product, in each result without the factor that it stands for: ``dots`` their sums over the
    columns, one part a group of columns; where not None ``grad_inner`` those over the rows, one part a group of rows, and ``grad_left``
    those over the samples, one part a split, or with BATCHED the products themselves.

    ``product`` is read once. Grid: (groups of rows, groups of columns, splits).
    """
    row, column = block_of(tl.program_id(0), ROWS), block_of(tl.program_id(1), COLUMNS)
    row_group, column_group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    mask = mask_of(row, rows, column, columns)
    position = row[:, None] * columns + column[None, :]
    lefts, total = load_block(left, row, column, columns, mask), tl.zeros([ROWS, COLUMNS], tl.float32)
    for index in range(tl.program_id(2), batch, tl.num_programs(2)):
        sample = tl.cast(index, tl.int64)
        start = sample * rows * columns
        if BATCHED:
            lefts = load_block(left + start, row, column, columns, mask)
        products = load_block(product + start, row, column, columns, mask)
        inners = tl.load(inner + sample * columns + column, mask=column < columns, other=0.0)[None, :]
        dot = tl.sum(products * (lefts * inners), axis=1)
        tl.store(dots + (column_group * batch + sample) * rows + row, dot, mask=row < rows)
        if grad_inner is not None:
            weighted = products * tl.load(outer + sample * rows + row, mask=row < rows, other=0.0)[:, None]
            of_columns = tl.sum(weighted * lefts, axis=0)
            tl.store(grad_inner + (row_group * batch + sample) * columns + column, of_columns, mask=column < columns)
            if BATCHED:
                tl.store(grad_left + start + position, weighted * inners, mask=mask)
            else:
                total += weighted * inners
    if grad_inner is not None and not BATCHED:
        tl.store(grad_left + tl.program_id(2).to(tl.int64) * rows * columns + position, total, mask=mask)


@_device.implements("jacobian_forward")
def _forward(hidden, weight, activation, alpha, reduction, grad_scale, with_grad_hidden, with_grad_weight):
    elementwise, by_row = reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"]
    penalty = hidden.new_empty(reduced_shape(hidden.shape, reduction), dtype=hidden.dtype if elementwise else torch.float32)
    norms = hidden.new_empty(weight.shape[:1], dtype=torch.float32)
    grad_hidden, grad_weight = _empty_if(with_grad_hidden, hidden), _empty_if(with_grad_weight, weight)
    empty = hidden.numel() == 0
    with _device.on(hidden.device):
        if empty or elementwise or by_row:
            _pass_over_weight(weight, norms=norms)
        if empty:
            penalty.zero_()
            grad_weight.zero_()
        elif elementwise or by_row:
            _penalty(hidden, norms, penalty, activation, alpha, reduction)
        else:
            scale = reduction_scale(hidden.shape, reduction)
            numbers = activation, alpha, reduction, grad_scale * scale
            sums = _pass_over_hidden(hidden, None, norms, None, True, *numbers)
            to = grad_weight if with_grad_weight else None
            _pass_over_weight(weight, sums, None, norms, penalty, to, scale, grad_scale * scale)
            if with_grad_hidden:
                _pass_over_hidden(hidden, None, norms, grad_hidden, False, *numbers)
    return penalty, norms, grad_hidden, grad_weight


def _empty_if(wanted, like):
    return like.new_empty(like.shape if wanted else (0,))


@_device.implements("jacobian_backward")
def _backward(grad_output, hidden, weight, squared_norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight):
    grad_hidden, grad_weight = _empty_if(with_grad_hidden, hidden), _empty_if(with_grad_weight, weight)
    if hidden.numel() == 0:
        return grad_hidden, grad_weight.zero_()
    scale = reduction_scale(hidden.shape, reduction)
    with _device.on(hidden.device):
        to = grad_hidden if with_grad_hidden else None
        sums = _pass_over_hidden(hidden, grad_output, squared_norms, to, with_grad_weight, activation, alpha, reduction, scale)
        if with_grad_weight:
            of_scalar = grad_output if grad_output.ndim == 0 else None
            _pass_over_weight(weight, sums, of_scalar, grad_weight=grad_weight, factor=scale)
    return grad_hidden, grad_weight


def _rows(matrix):
    """Rows are contiguous, and as far apart as they are."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _pass_over_hidden(hidden, grad_output, norms, grad_hidden, with_sums, activation, alpha, reduction, factor):
    """Writes ``grad_hidden`` where it is not None; returns the sums of the units in parts, (parts, units), where asked for."""
    (rows, columns), hidden = hidden.shape, _rows(hidden)
    if reduction == REDUCTIONS["none"]:
        grad_output = _rows(grad_output)
    grad_stride = grad_output.stride(0) if grad_output is not None and grad_output.ndim else 0
    config = _launch.column_sums(rows, columns, hidden.element_size(), _device.machine(hidden.device))
    sums = norms.new_empty((config.splits, columns)) if with_sums else None
    jacobian_units_kernel[config.groups, config.splits](
        hidden, grad_output, norms, grad_hidden, sums, rows, columns, hidden.stride(0), grad_stride, alpha, factor,
        ACTIVATION=activation, REDUCTION=reduction, ROWS=config.rows, COLUMNS=config.columns, **_launch.OPTIONS,
    )  # fmt: skip
    return sums


def _pass_over_weight(weight, sums=None, grad_output=None, norms=None, penalty=None, grad_weight=None, scale=1.0, factor=1.0):
    (rows, columns), weight = weight.shape, _rows(weight)
    if rows == 0:
        return
    # Of no columns the norm is 0.
    config = _launch.row_sums(rows, max(columns, 1), weight.element_size(), _device.machine(weight.device))
    split = norms is not None and config.splits > 1
    slots = norms.new_empty((config.splits, rows)) if split else None
    shares = norms.new_empty((config.groups, config.splits)) if penalty is not None else None
    ticket = _device.ticket(weight.device) if split or penalty is not None else None
    jacobian_weight_kernel[config.groups, config.splits](
        weight, sums, grad_output, norms, penalty, grad_weight, slots, shares, ticket,
        rows, columns, weight.stride(0), 0 if sums is None else sums.shape[0], scale, factor,
        ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


def _penalty(hidden, norms, penalty, activation, alpha, reduction):
    (rows, columns), hidden = hidden.shape, _rows(hidden)
    config = _launch.row_sums(rows, columns, hidden.element_size(), _device.machine(hidden.device))
    split = config.splits > 1 and reduction == REDUCTIONS["sample"]
    slots, ticket = (norms.new_empty((config.splits, rows)), _device.ticket(norms.device)) if split else (None, None)
    jacobian_penalty_kernel[config.groups, config.splits](
        hidden, norms, penalty, slots, ticket, rows, columns, hidden.stride(0), alpha,
        ACTIVATION=activation, REDUCTION=reduction, ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


def _matrices(left, outer, inner):
    """(batch, rows, columns), how they are shared among programs, the grid, and the kernels' options."""
    sizes = *outer.shape, inner.shape[1]
    config = _launch.matrices(*sizes, left.element_size(), _device.machine(left.device))
    options = {"BATCHED": left.ndim == 3, "ROWS": config.rows, "COLUMNS": config.columns, **_launch.OPTIONS}
    return sizes, config, (config.row_groups, config.column_groups, config.splits), options


@_device.implements("jacobian_gram_scale")
def _gram_scale(left, inner, outer):
    scaled = left.new_empty((outer.numel(), inner.shape[1]))
    if scaled.numel():
        sizes, _, grid, options = _matrices(left, outer, inner)
        with _device.on(left.device):
            jacobian_gram_scale_kernel[grid](*(t.contiguous() for t in (left, inner, outer)), scaled, *sizes, **options)
    return scaled


@_device.implements("jacobian_gram_reduce")
def _gram_reduce(left, inner, outer, product, with_grad):
    if product.numel() == 0:
        return torch.zeros_like(outer), *(t.new_zeros(t.shape if with_grad else (0,)) for t in (inner, left))
    (batch, rows, columns), config, grid, options = _matrices(left, outer, inner)
    dots = outer.new_empty((config.column_groups, batch, rows))
    grad_inner = grad_left = None
    if with_grad:
        grad_inner = inner.new_empty((config.row_groups, batch, columns))
        grad_left = left.new_empty((1, *left.shape) if left.ndim == 3 else (config.splits, *left.shape))
    with _device.on(left.device):
        tensors = (t.contiguous() for t in (left, inner, outer, product))
        jacobian_gram_reduce_kernel[grid](*tensors, dots, grad_inner, grad_left, batch, rows, columns, **options)
    return tuple(left.new_empty((0,)) if parts is None else _add_up(parts) for parts in (dots, grad_inner, grad_left))


def _add_up(parts):
    return parts[0] if len(parts) == 1 else parts.sum(0)


_device.implements("jacobian_gram")(gram_in_chunks("triton"))
