"""Reconstruction losses on a GPU: one pass that reads input and target and writes, where one number will scale it, the gradient too."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae._ops import LIKELIHOODS, REDUCTIONS, reduced_shape
from fastvae.kernels import _device, _launch
from fastvae.kernels._index import common_gradient, divide, first_chunk, incoming_gradient, inside, only
from fastvae.kernels._layout import shared_operand
from fastvae.kernels._math import log1p_unit
from fastvae.kernels._reduce import is_last, store_row_sums, sum_programs
from fastvae.reference._reduce import reduction_scale

BCE_WITH_LOGITS, BCE = tl.constexpr(LIKELIHOODS["bce_with_logits"]), tl.constexpr(LIKELIHOODS["bce"])
MSE = tl.constexpr(LIKELIHOODS["mse"])


@triton.jit
def bce_with_logits(x, t):
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    sigmoid = tl.where(x < 0, e * r, r)
    hinge = tl.where(-x > 0, -x, 0.0)
    return tl.fma(1.0 - t, x, hinge + log1p_unit(e)), sigmoid - t, -x, 0.0


@triton.jit
def weighted_bce_with_logits(x, t, pos_weight):
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    # sigmoid(-x) and softplus(-x).
    complement = tl.where(x < 0, r, e * r)
    softplus = tl.where(-x > 0, -x, 0.0) + log1p_unit(e)
    excess = pos_weight - 1.0
    factor = 1.0 + excess * t
    return (1.0 - t) * x + factor * softplus, (1.0 - t) - factor * complement, excess * softplus - x, 0.0


@triton.jit
def floor_log(value):
    return tl.where(value < -100.0, -100.0, value)


@triton.jit
def bce(x, t):
    complement = 1.0 - x
    product = complement * x
    # torch's floor.
    floored = tl.where(product < 1e-12, 1e-12, product)
    # What rounding 1 - x lost comes back, to first order.
    lost = (1.0 - complement) - x
    log_one, log_zero = floor_log(tl.log(x)), floor_log(tl.log(complement) + lost)
    return -(t * log_one + (1.0 - t) * log_zero), (x - t) / floored, log_zero - log_one, 0.0


@triton.jit
def squared_error(x, t):
    difference = x - t
    return difference * difference, 2.0 * difference, -2.0 * difference, 0.0


@triton.jit
def gaussian(x, t, logvar):
    difference = x - t
    scaled = difference * tl.exp(-logvar)
    square = difference * scaled
    return 0.5 * (1.8378770664093453 + logvar + square), scaled, -scaled, 0.5 * (1.0 - square)


@triton.jit
def loss_terms(x, t, weight, pos_weight, logvar, LIKELIHOOD: tl.constexpr):
    """The loss of each element and its gradients with respect to input, target and logvar, of which the compiler drops the unused."""
    if LIKELIHOOD == BCE_WITH_LOGITS:
        terms = bce_with_logits(x, t) if pos_weight is None else weighted_bce_with_logits(x, t, pos_weight)
    elif LIKELIHOOD == BCE:
        terms = bce(x, t)
    elif LIKELIHOOD == MSE:
        terms = squared_error(x, t)
    else:
        terms = gaussian(x, t, logvar)
    if weight is None:
        return terms
    else:
        return terms[0] * weight, terms[1] * weight, terms[2] * weight, terms[3] * weight


@triton.jit
def load_target(pointers, mask):
    """In float32; an 8-bit image in [0, 1]."""
    values = tl.load(pointers, mask=mask)
    if values.dtype == tl.uint8:
        return values.to(tl.float32) * (1.0 / 255.0)
    else:
        return values.to(tl.float32)


@triton.jit
def load_shared(operand, start, offset, mask, BOUND: tl.constexpr):
    """A broadcast operand in float32, see :func:`fastvae.kernels._layout.shared_operand`; None without one."""
    pointer, inner, period = operand
    if pointer is not None:
        if inner is None:
            return tl.load(pointer + start + offset, mask=mask).to(tl.float32)
        elif period is None:
            return tl.load(pointer).to(tl.float32)
        else:
            first, added, _ = divide(start, offset, inner, BOUND)
            _, _, index = divide(first, added, period, BOUND)
            return tl.load(pointer + index, mask=mask).to(tl.float32)


@triton.jit
def load_terms(operands, start, offset, mask, LIKELIHOOD: tl.constexpr, BOUND: tl.constexpr):
    """:func:`loss_terms` of the elements ``start + offset``."""
    input, target, weight, pos_weight, logvar = operands
    x, t = tl.load(input + start + offset, mask=mask).to(tl.float32), load_target(target + start + offset, mask)
    w = load_shared(weight, start, offset, mask, BOUND)
    p = load_shared(pos_weight, start, offset, mask, BOUND)
    v = load_shared(logvar, start, offset, mask, BOUND)
    return loss_terms(x, t, w, p, v, LIKELIHOOD)


@triton.jit
def forward_block(
    operands, outputs, start, n, grad_scale,
    LIKELIHOOD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes what is written elementwise; returns the losses and the gradients of logvar that are to be summed."""
    loss, grad_input, grad_logvar = outputs
    offset = tl.arange(0, BLOCK)
    mask = inside(offset, n - start, MASKED)
    terms = load_terms(operands, start, offset, mask, LIKELIHOOD, BLOCK)
    if not TOTAL:
        tl.store(loss + start + offset, terms[0], mask=mask)
    if grad_input is not None:
        tl.store(grad_input + start + offset, terms[1] * grad_scale, mask=mask)
    if grad_logvar is not None and not TOTAL_LOGVAR:
        tl.store(grad_logvar + start + offset, terms[3] * grad_scale, mask=mask)
    return only(terms[0], mask), only(terms[3] + tl.zeros([BLOCK], tl.float32), mask)


@triton.jit(do_not_specialize=["n"])
def reconstruction_forward_kernel(
    input, target, weight, weight_inner, weight_period, pos_weight, pos_weight_inner, pos_weight_period,
    logvar, logvar_inner, logvar_period, loss, grad_input, grad_logvar, slots, ticket, n, scale, grad_scale,
    LIKELIHOOD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The loss, elementwise or, with TOTAL, summed, and, where they are not None, the gradients of that sum times ``grad_scale``: those of
    input and logvar, the latter summed where one logvar serves all elements. Grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    weights = (weight, weight_inner, weight_period), (pos_weight, pos_weight_inner, pos_weight_period)
    operands = (input, target, weights[0], weights[1], (logvar, logvar_inner, logvar_period))
    outputs = (loss, grad_input, grad_logvar)
    full = n // BLOCK
    total, total_logvar = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    last_total, last_total_logvar = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        losses, logvar_gradients = forward_block(operands, outputs, start, n, grad_scale, LIKELIHOOD, TOTAL, TOTAL_LOGVAR, False, BLOCK)
        total += losses
        total_logvar += logvar_gradients
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, CHUNK), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * CHUNK
        losses, logvar_gradients = forward_block(operands, outputs, start, n, grad_scale, LIKELIHOOD, TOTAL, TOTAL_LOGVAR, True, CHUNK)
        last_total += losses
        last_total_logvar += logvar_gradients
    if TOTAL:
        tl.store(slots + program, tl.sum(total) + tl.sum(last_total))
        if TOTAL_LOGVAR:
            tl.store(slots + programs + program, tl.sum(total_logvar) + tl.sum(last_total_logvar))
        if is_last(ticket, programs):
            tl.store(loss, sum_programs(slots, programs) * scale)
            if TOTAL_LOGVAR:
                tl.store(grad_logvar, sum_programs(slots + programs, programs) * grad_scale)


@triton.jit(do_not_specialize=["rows"])
def reconstruction_rows_kernel(
    input, target, weight, weight_inner, weight_period, pos_weight, pos_weight_inner, pos_weight_period,
    logvar, logvar_inner, logvar_period, loss, slots, ticket, rows, columns,
    LIKELIHOOD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The loss of each row. Grid: (groups, splits)."""
    weights = (weight, weight_inner, weight_period), (pos_weight, pos_weight_inner, pos_weight_period)
    operands = (input, target, weights[0], weights[1], (logvar, logvar_inner, logvar_period))
    first_row = tl.cast(tl.program_id(0), tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(tl.program_id(1), tl.int64) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        mask = (first_row + row < rows)[:, None] & (column < columns - first)[None, :]
        # With more than one row they are no longer than a block, so the offset stays below ROWS * COLUMNS.
        offset = row[:, None] * columns + column[None, :]
        total += only(load_terms(operands, first_row * columns + first, offset, mask, LIKELIHOOD, ROWS * COLUMNS)[0], mask)
    store_row_sums(tl.sum(total, axis=1), loss, slots, ticket, first_row + row, rows, SPLIT)


@triton.jit
def backward_block(
    operands, grad_output, common, outputs, start, n, per_sample,
    LIKELIHOOD: tl.constexpr, REDUCTION: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes what is written elementwise; returns the gradients of logvar that are to be summed."""
    grad_input, grad_target, grad_logvar = outputs
    offset = tl.arange(0, BLOCK)
    mask = inside(offset, n - start, MASKED)
    terms = load_terms(operands, start, offset, mask, LIKELIHOOD, BLOCK)
    incoming = incoming_gradient(grad_output, start, offset, mask, per_sample, common, REDUCTION, BLOCK)
    tl.store(grad_input + start + offset, terms[1] * incoming, mask=mask)
    if grad_target is not None:
        tl.store(grad_target + start + offset, terms[2] * incoming, mask=mask)
    if grad_logvar is not None and not TOTAL_LOGVAR:
        tl.store(grad_logvar + start + offset, terms[3] * incoming, mask=mask)
    return only(terms[3] * incoming + tl.zeros([BLOCK], tl.float32), mask)


@triton.jit(do_not_specialize=["n"])
def reconstruction_backward_kernel(
    grad_output, input, target, weight, weight_inner, weight_period, pos_weight, pos_weight_inner, pos_weight_period,
    logvar, logvar_inner, logvar_period, grad_input, grad_target, grad_logvar, slots, ticket, n, per_sample, scale, expected,
    LIKELIHOOD: tl.constexpr, REDUCTION: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradients of input, and of target and logvar where they are not None, the last summed where one logvar serves all elements.

    With ``expected`` they were written for an incoming gradient of that, and nothing is done where it is that. Grid: (programs,).
    """
    weights = (weight, weight_inner, weight_period), (pos_weight, pos_weight_inner, pos_weight_period)
    operands = (input, target, weights[0], weights[1], (logvar, logvar_inner, logvar_period))
    outputs = (grad_input, grad_target, grad_logvar)
    if expected is None:  # noqa: SIM114 (known when the kernel is compiled, unlike the gradient)
        backward_blocks(
            operands, grad_output, outputs, slots, ticket, n, per_sample, scale, LIKELIHOOD, REDUCTION, TOTAL_LOGVAR, BLOCK, CHUNK
        )
    elif tl.load(grad_output).to(tl.float32) != expected:
        backward_blocks(
            operands, grad_output, outputs, slots, ticket, n, per_sample, scale, LIKELIHOOD, REDUCTION, TOTAL_LOGVAR, BLOCK, CHUNK
        )


@triton.jit
def backward_blocks(
    operands, grad_output, outputs, slots, ticket, n, per_sample, scale,
    LIKELIHOOD: tl.constexpr, REDUCTION: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    common = common_gradient(grad_output, scale, REDUCTION)
    full = n // BLOCK
    total, last_total = tl.zeros([BLOCK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        total += backward_block(
            operands, grad_output, common, outputs, start, n, per_sample, LIKELIHOOD, REDUCTION, TOTAL_LOGVAR, False, BLOCK
        )
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, CHUNK), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * CHUNK
        last_total += backward_block(
            operands, grad_output, common, outputs, start, n, per_sample, LIKELIHOOD, REDUCTION, TOTAL_LOGVAR, True, CHUNK
        )
    if TOTAL_LOGVAR:
        tl.store(slots + program, tl.sum(total) + tl.sum(last_total))
        if is_last(ticket, programs):
            tl.store(outputs[2], sum_programs(slots, programs))


@triton.jit(do_not_specialize=["n"])
def reconstruction_rescale_kernel(grad, grad_output, n, expected, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """``grad *= grad_output / expected``; nothing where the two agree. Grid: (programs,)."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    incoming = tl.load(grad_output).to(tl.float32)
    if incoming != expected:
        factor = incoming / expected
        full = n // BLOCK
        for index in range(program, full, programs):
            rescale_block(grad, factor, tl.cast(index, tl.int64) * BLOCK, n, False, BLOCK)
        for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, CHUNK), programs):
            rescale_block(grad, factor, tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * CHUNK, n, True, CHUNK)


@triton.jit
def rescale_block(grad, factor, start, n, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    mask = inside(offset, n - start, MASKED)
    tl.store(grad + start + offset, tl.load(grad + start + offset, mask=mask).to(tl.float32) * factor, mask=mask)


@_device.implements("reconstruction_forward")
def _forward(input, target, weight, pos_weight, logvar, likelihood, reduction, grad_scale, with_grad):
    elementwise, by_row = reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"]
    loss = input.new_empty(reduced_shape(input.shape, reduction), dtype=input.dtype if elementwise else torch.float32)
    grad_input = input.new_empty(input.shape if with_grad else (0,))
    sums = _LogvarGradient(logvar if with_grad else None, input)
    n = input.numel()
    if n == 0:
        return loss.zero_(), grad_input, sums.finish()
    operands = _operands(input, target, weight, pos_weight, logvar)
    with _device.on(input.device):
        if by_row:
            _sum_rows(operands, loss, likelihood)
        else:
            config = _launch.stream(n, _narrowest(input, target), _device.machine(input.device))
            scale = reduction_scale(input.shape, reduction)
            slots, ticket = None, None
            if not elementwise:
                slots, ticket = input.new_empty(2 * config.programs, dtype=torch.float32), _device.ticket(input.device)
            reconstruction_forward_kernel[(config.programs,)](
                *operands, loss, grad_input if with_grad else None, sums.written, slots, ticket, n, scale, grad_scale * scale,
                LIKELIHOOD=likelihood, TOTAL=not elementwise, TOTAL_LOGVAR=sums.total,
                BLOCK=config.block, CHUNK=config.chunk, **_launch.OPTIONS,
            )  # fmt: skip
    return loss, grad_input, sums.finish()


def _operands(input, target, weight, pos_weight, logvar):
    """The tensors that every kernel takes first, broadcast ones with how they are indexed."""
    shared = (part for value in (weight, pos_weight, logvar) for part in shared_operand(value, input.shape))
    return input.contiguous(), target.contiguous(), *shared


def _narrowest(input, target) -> int:
    return min(input.element_size(), target.element_size())


def _sum_rows(operands, loss, likelihood):
    input = operands[0]
    rows = loss.numel()
    config = _launch.row_sums(rows, input.numel() // rows, _narrowest(*operands[:2]), _device.machine(input.device))
    split = config.splits > 1
    slots, ticket = (loss.new_empty(config.splits * rows), _device.ticket(loss.device)) if split else (None, None)
    reconstruction_rows_kernel[config.groups, config.splits](
        *operands, loss, slots, ticket, rows, input.numel() // rows,
        LIKELIHOOD=likelihood, ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


class _LogvarGradient:
    """The gradient of a log variance: what a kernel writes, and what becomes of it.

    Kernels write one a element, or the sum where all share one value. A few values that are shared (one a channel, say) are rare enough
    for two steps: the elements in float32, then torch's sum.
    """

    def __init__(self, logvar: Tensor | None, input: Tensor, gradient: Tensor | None = None):
        self.shape, self.absent = input.shape, logvar is None
        if gradient is None:
            gradient = input.new_empty((0,)) if logvar is None else logvar.new_empty(logvar.shape)
        self.gradient = gradient
        self.total = not self.absent and logvar.numel() == 1
        self.in_two_steps = not self.absent and logvar.numel() not in (1, input.numel())
        self.written = None if self.absent else self.gradient
        if self.in_two_steps:
            self.written = input.new_empty(input.shape, dtype=torch.float32)

    def finish(self, done: Tensor | None = None) -> Tensor:
        """The gradient; where ``done``, a 0-dim bool, it is as it was, and no kernel wrote anything."""
        if self.shape.numel() == 0:
            return self.gradient.zero_()
        if self.in_two_steps:
            total = self.written.sum_to_size(self.gradient.shape)
            self.gradient.copy_(total if done is None else torch.where(done, self.gradient, total))
        return self.gradient


@_device.implements("reconstruction_backward")
def _backward(grad_output, input, target, weight, pos_weight, logvar, likelihood, reduction, with_target):
    grad_input = input.new_empty(input.shape)
    grad_target = target.new_empty(target.shape if with_target else (0,))
    sums = _LogvarGradient(logvar, input)
    outputs = grad_input, grad_target if with_target else None, sums
    _write_gradients(outputs, grad_output, None, (input, target, weight, pos_weight, logvar), likelihood, reduction)
    return grad_input, grad_target, sums.finish()


@_device.implements("reconstruction_backward_")
def _backward_(grad_input, grad_logvar, grad_output, expected, input, target, weight, pos_weight, logvar, likelihood, reduction):
    sums = _LogvarGradient(logvar, input, grad_logvar)
    operands = input, target, weight, pos_weight, logvar
    _write_gradients((grad_input, None, sums), grad_output, expected, operands, likelihood, reduction)
    sums.finish(grad_output == expected)


def _write_gradients(outputs, grad_output, expected, operands, likelihood, reduction):
    grad_input, grad_target, sums = outputs
    input, target, *_ = operands
    n = input.numel()
    if n == 0:
        return
    config = _launch.stream(n, _narrowest(input, target), _device.machine(input.device))
    with _device.on(input.device):
        slots, ticket = None, None
        if sums.total:
            slots, ticket = input.new_empty(config.programs, dtype=torch.float32), _device.ticket(input.device)
        reconstruction_backward_kernel[(config.programs,)](
            grad_output.contiguous(), *_operands(*operands), grad_input, grad_target, sums.written, slots, ticket,
            n, n // input.shape[0] if input.ndim else 1, reduction_scale(input.shape, reduction), expected,
            LIKELIHOOD=likelihood, REDUCTION=reduction, TOTAL_LOGVAR=sums.total, BLOCK=config.block, CHUNK=config.chunk, **_launch.OPTIONS,
        )  # fmt: skip


@_device.implements("reconstruction_rescale_")
def _rescale_(grad, grad_output, expected):
    if grad.numel() == 0:
        return
    dense = grad.contiguous()
    config = _launch.stream(grad.numel(), grad.element_size(), _device.machine(grad.device))
    with _device.on(grad.device):
        reconstruction_rescale_kernel[(config.programs,)](
            dense, grad_output, grad.numel(), expected, BLOCK=config.block, CHUNK=config.chunk, **_launch.OPTIONS
        )
    if dense is not grad:
        grad.copy_(dense)
