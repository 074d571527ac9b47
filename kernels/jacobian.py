"""The contractive penalty, and the elementwise work and sums around the matrix products of the Gram form, on a GPU.

The penalty of sample b and unit j is phi'(h_bj)^2 |W_j|^2. With n_j the squared norm of row j of the weight, and s_j the sum over the
samples of phi'(h_bj)^2, its sum is ``sum_j n_j s_j``. So one kernel computes partial sums of s_j over the samples. A second one adds those
for its own rows, reads the rows for n_j, and has all that the penalty and the gradient of the weight need.

============================  ===============================  ============================================  ===========================
kernel                        grid                             reads                                         writes
============================  ===============================  ============================================  ===========================
jacobian_units_kernel         (groups, splits)                 hidden, norms, grad_output                    grad_hidden, unit_sums
jacobian_weight_kernel        (groups, splits)                 weight, unit_sums, grad_output                norms, penalty, grad_weight
jacobian_penalty_kernel       (groups, splits)                 hidden, norms                                 penalty
jacobian_gram_scale_kernel    (row groups, column groups,      left, inner, outer                            scaled
                              splits)
jacobian_gram_reduce_kernel   (row groups, column groups,      left, inner, outer, product                   dots, grad_inner, grad_left
                              splits)
============================  ===============================  ============================================  ===========================

In the first three kernels ``groups`` cut the dimension that stays and ``splits`` the one that is summed, see _launch.Matrix.

hidden and grad_hidden are (batch, units); weight and grad_weight (units, inputs), each in its dtype; norms (units,) float32; penalty has
the shape and dtype of the result. A pointer is None where its tensor is absent or not requested. ``rows`` and ``columns`` are the sizes of
the matrix that a kernel reads, and ``stride`` is the number of elements from one of its rows to the next.

For B samples, H units and D inputs of ``size`` bytes, each direction is one pass over hidden and one over the weight, and writes nothing
of their sizes but their gradients: size (B H + H D) bytes forward, twice as many backward. At B = 512, D = 3072, H = 1024 those are 15 and
29 MB of float32, read by 512 programs (hidden) and 1024 programs (weight), which fill 132 multiprocessors. At B = 128, D = 784, H = 256
they are 0.9 and 1.9 MB, read by 32 and 256 programs of one block each, which all run at the same time, so that the two launches dominate.
"""

import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._index import NONE, SAMPLE, zero_outside
from fastvae.kernels._jacobian import block_indices, block_mask, derivatives, grad_output_of, load_block, scaled_by
from fastvae.kernels._reduce import is_last, store_row_sums, store_slot_sums, store_slots, sum_programs, sum_slots
from fastvae.ops import jacobian as ops
from fastvae.ops._gram_chunks import gram_in_chunks
from fastvae.ops._results import REDUCTIONS, reduction_scale


@triton.jit(do_not_specialize=["rows"])
def jacobian_units_kernel(
    hidden, grad_output, norms, grad_hidden, unit_sums, rows, columns, stride, grad_stride, alpha, factor,
    ACTIVATION: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program handles COLUMNS units over one split of the samples: grad_hidden elementwise, and partial sums of
    grad_output * phi'(h)^2. Grid: (groups, splits).

    ``unit_sums`` are float32 (splits, units). ``grad_output`` is (batch, units), (batch,) or a scalar, by REDUCTION, or None; it multiplies
    both results, ``factor`` multiplies grad_hidden.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    column = block_indices(tl.program_id(0), COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    if grad_hidden is not None:
        scalar = None if REDUCTION == NONE or REDUCTION == SAMPLE else grad_output  # noqa: SIM109 (Triton has no `in`)
        norm = tl.load(norms + column, mask=column < columns, other=0.0) * (2.0 * scaled_by(factor, scalar))
    for first in range(tl.cast(split, tl.int64) * ROWS, rows, splits * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = block_mask(row, rows, column, columns)
        gradients = grad_output_of(grad_output, row, column, grad_stride, rows, mask, REDUCTION)
        slope, change = derivatives(load_block(hidden, row, column, stride, mask), alpha, ACTIVATION)
        if grad_hidden is not None:
            gradient = gradients * norm[None, :] * slope * change
            tl.store(grad_hidden + row[:, None] * columns + column[None, :], gradient, mask=mask)
        if unit_sums is not None:
            total += zero_outside(gradients * (slope * slope), mask)
    if unit_sums is not None:
        tl.store(unit_sums + tl.cast(split, tl.int64) * columns + column, tl.sum(total, axis=0), mask=column < columns)


@triton.jit(do_not_specialize=["rows", "parts"])
def jacobian_weight_kernel(
    weight, unit_sums, grad_output, norms, penalty, grad_weight, slots, penalty_parts, ticket,
    rows, columns, stride, parts, scale, factor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Each program handles ROWS units over one split of the inputs: their squared norms, their part of the penalty, and grad_weight.
    Grid: (groups, splits).

    ``unit_sums`` are the partial sums of jacobian_units_kernel, float32 (parts, units); ``grad_output`` is a scalar or None. With SPLIT,
    which means several splits, their partial norms go to ``slots``, float32 (splits, units), and the last program adds them. Every program
    writes the sum of norm * unit sum over its units to ``penalty_parts``, float32 (groups, splits), whose sum times ``scale`` is the
    penalty. ``factor`` multiplies grad_weight.
    """
    split, splits = tl.program_id(1), tl.num_programs(1)
    row = block_indices(tl.program_id(0), ROWS)
    PARTS: tl.constexpr = COLUMNS if COLUMNS < 128 else 128
    if unit_sums is not None:
        unit_total = sum_slots(unit_sums, row, row < rows, parts, rows, PARTS, ROWS)
    if grad_weight is not None:
        factors = unit_total * (2.0 * scaled_by(factor, grad_output))
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(split, tl.int64) * COLUMNS, columns, splits * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = block_mask(row, rows, column, columns)
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
            if SPLIT:
                store_slots(slots + split.to(tl.int64) * rows + row, norm, row < rows)
            else:
                tl.store(norms + row, norm, mask=row < rows)
            part = penalty_parts + tl.program_id(0).to(tl.int64) * splits + split
            store_slots(part, tl.sum(zero_outside(norm * unit_total, row < rows)), None)
            if is_last(ticket, programs):
                if SPLIT:
                    store_slot_sums(norms, slots, rows, splits)
                tl.store(penalty, sum_programs(penalty_parts, programs) * scale)


@triton.jit(do_not_specialize=["rows"])
def jacobian_penalty_kernel(
    hidden, norms, penalty, slots, ticket, rows, columns, stride, alpha,
    ACTIVATION: tl.constexpr, REDUCTION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Each program computes the penalty of ROWS samples over one split of the units, elementwise or summed for each sample.
    Grid: (groups, splits).

    With SPLIT there are several splits, whose partial sums go to ``slots``, float32 (splits, batch).
    """
    row = block_indices(tl.program_id(0), ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(tl.program_id(1), tl.int64) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = block_mask(row, rows, column, columns)
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
    """Each program writes scaled[b, r, k] = outer[b, r] * left[(b,) r, k] * inner[b, k] for one block of (rows, columns) of every splits-th
    sample. Grid: (row groups, column groups, splits).

    All are float32: ``left`` (rows, columns), or with BATCHED (batch, rows, columns) like ``scaled``; ``inner`` (batch, columns); ``outer``
    (batch, rows).
    """
    row, column = block_indices(tl.program_id(0), ROWS), block_indices(tl.program_id(1), COLUMNS)
    mask = block_mask(row, rows, column, columns)
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
    """Each program reads one block of (rows, columns) of ``product`` for every splits-th sample, once, and writes partial sums.
    Grid: (row groups, column groups, splits).

    * ``dots``, (column groups, batch, rows): sum over k of product * left * inner;
    * ``grad_inner``, (row groups, batch, columns), or None: sum over r of product * left * outer;
    * ``grad_left``: sum over the samples of product * inner * outer, (splits, rows, columns); with BATCHED that of each sample,
      (batch, rows, columns).

    ``product`` is (batch, rows, columns), the operands are those of jacobian_gram_scale_kernel; all are float32.
    """
    row, column = block_indices(tl.program_id(0), ROWS), block_indices(tl.program_id(1), COLUMNS)
    row_group, column_group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    mask = block_mask(row, rows, column, columns)
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
            column_sums = tl.sum(weighted * lefts, axis=0)
            tl.store(grad_inner + (row_group * batch + sample) * columns + column, column_sums, mask=column < columns)
            if BATCHED:
                tl.store(grad_left + start + position, weighted * inners, mask=mask)
            else:
                total += weighted * inners
    if grad_inner is not None and not BATCHED:
        tl.store(grad_left + tl.program_id(2).to(tl.int64) * rows * columns + position, total, mask=mask)


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    hidden, weight, activation, alpha, reduction, grad_scale, with_grad_hidden, with_grad_weight = arguments
    elementwise, by_row = reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"]
    results = penalty, norms, grad_hidden, grad_weight = arguments.allocate()
    empty = hidden.numel() == 0
    with _device.on(hidden.device):
        if empty or elementwise or by_row:
            _pass_over_weight(weight, norms=norms)
        if empty:
            penalty.zero_()
            grad_weight.zero_()
        elif elementwise or by_row:
            _launch_penalty(hidden, norms, penalty, activation, alpha, reduction)
        else:
            scale = reduction_scale(hidden.shape, reduction)
            numbers = activation, alpha, reduction, grad_scale * scale
            sums = _pass_over_hidden(hidden, None, norms, None, True, *numbers)
            requested = grad_weight if with_grad_weight else None
            _pass_over_weight(weight, sums, None, norms, penalty, requested, scale, grad_scale * scale)
            # A second pass, because grad_hidden needs the norms.
            if with_grad_hidden:
                _pass_over_hidden(hidden, None, norms, grad_hidden, False, *numbers)
    return results


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    grad_output, hidden, weight, squared_norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight = arguments
    results = grad_hidden, grad_weight = arguments.allocate()
    if hidden.numel() == 0:
        grad_weight.zero_()
        return results
    scale = reduction_scale(hidden.shape, reduction)
    with _device.on(hidden.device):
        requested = grad_hidden if with_grad_hidden else None
        sums = _pass_over_hidden(hidden, grad_output, squared_norms, requested, with_grad_weight, activation, alpha, reduction, scale)
        if with_grad_weight:
            scalar = grad_output if grad_output.ndim == 0 else None
            _pass_over_weight(weight, sums, scalar, grad_weight=grad_weight, factor=scale)
    return results


def _contiguous_rows(matrix):
    """``matrix`` with contiguous rows at any distance, copied only where its rows are not contiguous."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _pass_over_hidden(hidden, grad_output, norms, grad_hidden, with_sums, activation, alpha, reduction, factor):
    """Launches jacobian_units_kernel. Writes ``grad_hidden`` where it is not None; returns the partial sums of the units, (splits, units),
    or None without ``with_sums``."""
    (rows, columns), hidden = hidden.shape, _contiguous_rows(hidden)
    if reduction == REDUCTIONS["none"]:
        grad_output = _contiguous_rows(grad_output)
    grad_stride = grad_output.stride(0) if grad_output is not None and grad_output.ndim else 0
    config = _launch.column_sums(rows, columns, hidden.element_size(), _device.machine(hidden.device))
    sums = norms.new_empty((config.splits, columns)) if with_sums else None
    jacobian_units_kernel[config.groups, config.splits](
        hidden, grad_output, norms, grad_hidden, sums, rows, columns, hidden.stride(0), grad_stride, alpha, factor,
        ACTIVATION=activation, REDUCTION=reduction, ROWS=config.rows, COLUMNS=config.columns, **_launch.OPTIONS,
    )  # fmt: skip
    return sums


def _pass_over_weight(weight, sums=None, grad_output=None, norms=None, penalty=None, grad_weight=None, scale=1.0, factor=1.0):
    """Launches jacobian_weight_kernel, which writes whichever of ``norms``, ``penalty`` and ``grad_weight`` is not None."""
    (rows, columns), weight = weight.shape, _contiguous_rows(weight)
    if rows == 0:
        return
    # Without columns the norms are 0, so the kernel has to run all the same.
    config = _launch.row_sums(rows, max(columns, 1), weight.element_size(), _device.machine(weight.device))
    split = norms is not None and config.splits > 1
    slots = norms.new_empty((config.splits, rows)) if split else None
    penalty_parts = norms.new_empty((config.groups, config.splits)) if penalty is not None else None
    ticket = _device.ticket(weight.device) if split or penalty is not None else None
    jacobian_weight_kernel[config.groups, config.splits](
        weight, sums, grad_output, norms, penalty, grad_weight, slots, penalty_parts, ticket,
        rows, columns, weight.stride(0), 0 if sums is None else sums.shape[0], scale, factor,
        ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


def _launch_penalty(hidden, norms, penalty, activation, alpha, reduction):
    (rows, columns), hidden = hidden.shape, _contiguous_rows(hidden)
    config = _launch.row_sums(rows, columns, hidden.element_size(), _device.machine(hidden.device))
    split = config.splits > 1 and reduction == REDUCTIONS["sample"]
    slots, ticket = (norms.new_empty((config.splits, rows)), _device.ticket(norms.device)) if split else (None, None)
    jacobian_penalty_kernel[config.groups, config.splits](
        hidden, norms, penalty, slots, ticket, rows, columns, hidden.stride(0), alpha,
        ACTIVATION=activation, REDUCTION=reduction, ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


def _gram_options(left, outer, inner):
    """The sizes (batch, rows, columns), the partition, the grid and the options of both Gram kernels."""
    sizes = *outer.shape, inner.shape[1]
    config = _launch.matrices(*sizes, left.element_size(), _device.machine(left.device))
    options = {"BATCHED": left.ndim == 3, "ROWS": config.rows, "COLUMNS": config.columns, **_launch.OPTIONS}
    return sizes, config, (config.row_groups, config.column_groups, config.splits), options


@_device.implements(ops.gram_scale)
def _gram_scale(arguments: ops.GramScaleArguments) -> Tensor:
    left, inner, outer = arguments
    scaled = arguments.allocate()
    if scaled.numel():
        sizes, _, grid, options = _gram_options(left, outer, inner)
        with _device.on(left.device):
            jacobian_gram_scale_kernel[grid](*(t.contiguous() for t in (left, inner, outer)), scaled, *sizes, **options)
    return scaled


@_device.implements(ops.gram_reduce)
def _gram_reduce(arguments: ops.GramReduceArguments) -> ops.GramReduceResults:
    left, inner, outer, product, with_grad = arguments
    if product.numel() == 0:
        return ops.GramReduceResults(*(t.zero_() for t in arguments.allocate()))
    (batch, rows, columns), config, grid, options = _gram_options(left, outer, inner)
    dots = outer.new_empty((config.column_groups, batch, rows))
    grad_inner = grad_left = None
    if with_grad:
        grad_inner = inner.new_empty((config.row_groups, batch, columns))
        grad_left = left.new_empty((1, *left.shape) if left.ndim == 3 else (config.splits, *left.shape))
    with _device.on(left.device):
        tensors = (t.contiguous() for t in (left, inner, outer, product))
        jacobian_gram_reduce_kernel[grid](*tensors, dots, grad_inner, grad_left, batch, rows, columns, **options)
    summed = (left.new_empty((0,)) if parts is None else _sum_parts(parts) for parts in (dots, grad_inner, grad_left))
    return ops.GramReduceResults(*summed)


def _sum_parts(parts):
    """The sum over the first dimension, the partial sums of programs."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


_device.implements(ops.gram)(gram_in_chunks("triton"))
