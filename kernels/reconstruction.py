"""Reconstruction losses on a GPU. Where the reduction is to a scalar, the forward kernel writes the loss and its gradient in one pass over
input and target.

==============================  ==================  =====================================================  ===============================
kernel                          grid                reads                                                  writes
==============================  ==================  =====================================================  ===============================
reconstruction_forward_kernel   (programs,)         input, target, weight, pos_weight, logvar              loss, grad_input, grad_logvar
reconstruction_rows_kernel      (groups, splits)    input, target, weight, pos_weight, logvar              loss of each row
reconstruction_backward_kernel  (programs,)         the same, grad_output                                  grad_input, grad_target,
                                                                                                           grad_logvar
reconstruction_rescale_kernel   (programs,)         a gradient, grad_output                                the gradient, rescaled
==============================  ==================  =====================================================  ===============================

input, target and their gradients are (batch, ...), contiguous, of ``n`` elements, each in its dtype; a uint8 target stands for values in
[0, 1]. weight, pos_weight and logvar are broadcast operands: a pointer with ``inner`` and ``period``, see
:func:`fastvae.kernels._layout.shared_operand`. A pointer is None where its tensor is absent or not requested. ``slots`` are float32 partial
sums of the programs, and ``ticket`` is their ticket counter, see _reduce.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._index import common_gradient, first_chunk, incoming_gradient, inside, zero_outside
from fastvae.kernels._layout import shared_operand
from fastvae.kernels._reconstruction import load_terms
from fastvae.kernels._reduce import is_last, store_row_sums, store_slots, sum_programs
from fastvae.ops import reconstruction as ops
from fastvae.ops._results import REDUCTIONS, reduction_scale


@triton.jit
def forward_block(
    operands, outputs, start, n, grad_scale,
    LIKELIHOOD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the elementwise results of one block, and returns the losses and the gradients of logvar, which the kernel sums with TOTAL and
    TOTAL_LOGVAR."""
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
    return zero_outside(terms[0], mask), zero_outside(terms[3] + tl.zeros([BLOCK], tl.float32), mask)


@triton.jit(do_not_specialize=["n"])
def reconstruction_forward_kernel(
    input, target, weight, weight_inner, weight_period, pos_weight, pos_weight_inner, pos_weight_period,
    logvar, logvar_inner, logvar_period, loss, grad_input, grad_logvar, slots, ticket, n, scale, grad_scale,
    LIKELIHOOD: tl.constexpr, TOTAL: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each program handles blocks of BLOCK elements in turn, then chunks of CHUNK elements of the rest. Grid: (programs,).

    ``loss`` is elementwise, or with TOTAL the sum times ``scale``. ``grad_input`` and ``grad_logvar`` are the gradients of the sum times
    ``grad_scale``. With TOTAL_LOGVAR one log variance serves all elements, and its gradient is summed. ``slots`` are (2, programs).
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    weights = (weight, weight_inner, weight_period), (pos_weight, pos_weight_inner, pos_weight_period)
    operands = (input, target, weights[0], weights[1], (logvar, logvar_inner, logvar_period))
    outputs = (loss, grad_input, grad_logvar)
    full = n // BLOCK
    total, total_logvar = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    rest_total, rest_total_logvar = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        losses, logvar_gradients = forward_block(operands, outputs, start, n, grad_scale, LIKELIHOOD, TOTAL, TOTAL_LOGVAR, False, BLOCK)
        total += losses
        total_logvar += logvar_gradients
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, CHUNK), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * CHUNK
        losses, logvar_gradients = forward_block(operands, outputs, start, n, grad_scale, LIKELIHOOD, TOTAL, TOTAL_LOGVAR, True, CHUNK)
        rest_total += losses
        rest_total_logvar += logvar_gradients
    if TOTAL:
        store_slots(slots + program, tl.sum(total) + tl.sum(rest_total), None)
        if TOTAL_LOGVAR:
            store_slots(slots + programs + program, tl.sum(total_logvar) + tl.sum(rest_total_logvar), None)
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
    """Each program sums the losses of ROWS rows over one split of the columns; a row is a sample. Grid: (groups, splits).

    With SPLIT there are several splits, whose partial sums go to ``slots``, (splits, rows).
    """
    weights = (weight, weight_inner, weight_period), (pos_weight, pos_weight_inner, pos_weight_period)
    operands = (input, target, weights[0], weights[1], (logvar, logvar_inner, logvar_period))
    first_row = tl.cast(tl.program_id(0), tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(tl.program_id(1), tl.int64) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        mask = (first_row + row < rows)[:, None] & (column < columns - first)[None, :]
        # A block of several rows contains whole rows, so the offset stays below ROWS * COLUMNS.
        offset = row[:, None] * columns + column[None, :]
        total += zero_outside(load_terms(operands, first_row * columns + first, offset, mask, LIKELIHOOD, ROWS * COLUMNS)[0], mask)
    store_row_sums(tl.sum(total, axis=1), loss, slots, ticket, first_row + row, rows, SPLIT)


@triton.jit
def backward_block(
    operands, grad_output, common, outputs, start, n, per_sample,
    LIKELIHOOD: tl.constexpr, REDUCTION: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the elementwise results of one block, and returns the gradients of logvar, which the kernel sums with TOTAL_LOGVAR."""
    grad_input, grad_target, grad_logvar = outputs
    offset = tl.arange(0, BLOCK)
    mask = inside(offset, n - start, MASKED)
    terms = load_terms(operands, start, offset, mask, LIKELIHOOD, BLOCK)
    gradient = incoming_gradient(grad_output, start, offset, mask, per_sample, common, REDUCTION, BLOCK)
    tl.store(grad_input + start + offset, terms[1] * gradient, mask=mask)
    if grad_target is not None:
        tl.store(grad_target + start + offset, terms[2] * gradient, mask=mask)
    if grad_logvar is not None and not TOTAL_LOGVAR:
        tl.store(grad_logvar + start + offset, terms[3] * gradient, mask=mask)
    return zero_outside(terms[3] * gradient + tl.zeros([BLOCK], tl.float32), mask)


@triton.jit(do_not_specialize=["n"])
def reconstruction_backward_kernel(
    grad_output, input, target, weight, weight_inner, weight_period, pos_weight, pos_weight_inner, pos_weight_period,
    logvar, logvar_inner, logvar_period, grad_input, grad_target, grad_logvar, slots, ticket, n, per_sample, scale, expected,
    LIKELIHOOD: tl.constexpr, REDUCTION: tl.constexpr, TOTAL_LOGVAR: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Each program handles blocks of BLOCK elements in turn, then chunks of CHUNK elements of the rest. Grid: (programs,).

    ``grad_output`` is (batch, ...), (batch,) or a scalar, by REDUCTION; ``per_sample`` is the number of elements of a sample, and ``scale``
    the factor of the reduction. With TOTAL_LOGVAR one log variance serves all elements, and its gradient is summed. ``slots`` are
    (programs,).

    Where ``expected`` is not None, the gradients were written for a grad_output of that value, and nothing is written if it is that.
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
    """Writes the gradients of the blocks and chunks of this program."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    common = common_gradient(grad_output, scale, REDUCTION)
    full = n // BLOCK
    total, rest_total = tl.zeros([BLOCK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        total += backward_block(
            operands, grad_output, common, outputs, start, n, per_sample, LIKELIHOOD, REDUCTION, TOTAL_LOGVAR, False, BLOCK
        )
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, CHUNK), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * CHUNK
        rest_total += backward_block(
            operands, grad_output, common, outputs, start, n, per_sample, LIKELIHOOD, REDUCTION, TOTAL_LOGVAR, True, CHUNK
        )
    if TOTAL_LOGVAR:
        store_slots(slots + program, tl.sum(total) + tl.sum(rest_total), None)
        if is_last(ticket, programs):
            tl.store(outputs[2], sum_programs(slots, programs))


@triton.jit(do_not_specialize=["n"])
def reconstruction_rescale_kernel(grad, grad_output, n, expected, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Each program computes grad *= grad_output / expected for blocks of elements in turn. Grid: (programs,).

    ``grad_output`` is a scalar, and ``expected`` the value of it that ``grad`` was computed for. Nothing is written if the two are equal.
    The device decides that, so that the host need not wait for grad_output.
    """
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
    """Multiplies one block of the gradient by ``factor``."""
    offset = tl.arange(0, BLOCK)
    mask = inside(offset, n - start, MASKED)
    tl.store(grad + start + offset, tl.load(grad + start + offset, mask=mask).to(tl.float32) * factor, mask=mask)


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, target, likelihood, reduction = arguments.input, arguments.target, arguments.likelihood, arguments.reduction
    elementwise, by_row, with_grad = reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"], arguments.with_grad
    loss, grad_input, grad_logvar = arguments.allocate()
    logvar_gradient = _LogvarGradient(arguments.logvar if with_grad else None, input, grad_logvar)
    n = input.numel()
    if n == 0:
        return ops.ForwardResults(loss.zero_(), grad_input, logvar_gradient.finish())
    operands = _operands(*arguments.operands)
    with _device.on(input.device):
        if by_row:
            _sum_rows(operands, loss, likelihood)
        else:
            config = _launch.stream(n, _narrowest(input, target), _device.machine(input.device))
            scale = reduction_scale(input.shape, reduction)
            scales = scale, arguments.grad_scale * scale
            slots, ticket = None, None
            if not elementwise:
                slots, ticket = input.new_empty(2 * config.programs, dtype=torch.float32), _device.ticket(input.device)
            reconstruction_forward_kernel[(config.programs,)](
                *operands, loss, grad_input if with_grad else None, logvar_gradient.written, slots, ticket, n, *scales,
                LIKELIHOOD=likelihood, TOTAL=not elementwise, TOTAL_LOGVAR=logvar_gradient.total,
                BLOCK=config.block, CHUNK=config.chunk, **_launch.OPTIONS,
            )  # fmt: skip
    return ops.ForwardResults(loss, grad_input, logvar_gradient.finish())


def _operands(input, target, weight, pos_weight, logvar):
    """The first arguments of every loss kernel: input, target, and each broadcast operand with its ``inner`` and ``period``."""
    shared = (part for value in (weight, pos_weight, logvar) for part in shared_operand(value, input.shape))
    return input.contiguous(), target.contiguous(), *shared


def _narrowest(input, target) -> int:
    """The bytes of an element of the narrower of both."""
    return min(input.element_size(), target.element_size())


def _sum_rows(operands, loss, likelihood):
    """Launches reconstruction_rows_kernel."""
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
    """The gradient of the log variance, in up to two steps. The kernel writes ``written``: one value for each element, or the sum where one
    log variance serves all elements (``total``). Where some elements share a value, for example those of a channel, that is a float32
    tensor of one value for each element, which finish() sums with torch. That case is too rare for a kernel of its own.
    """

    def __init__(self, logvar: Tensor | None, input: Tensor, gradient: Tensor):
        self.shape, self.absent, self.gradient = input.shape, logvar is None, gradient
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


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    grad_input, grad_target, grad_logvar = arguments.allocate()
    logvar_gradient = _LogvarGradient(arguments.logvar, arguments.input, grad_logvar)
    _write_gradients(arguments, grad_input, grad_target if arguments.with_target else None, logvar_gradient, expected=None)
    return ops.BackwardResults(grad_input, grad_target, logvar_gradient.finish())


@_device.implements(ops.backward_)
def _backward_(arguments: ops.BackwardInPlaceArguments) -> None:
    logvar_gradient = _LogvarGradient(arguments.logvar, arguments.input, arguments.grad_logvar)
    _write_gradients(arguments, arguments.grad_input, None, logvar_gradient, arguments.expected)
    logvar_gradient.finish(arguments.grad_output == arguments.expected)


def _write_gradients(arguments, grad_input, grad_target, logvar_gradient, expected):
    """Launches reconstruction_backward_kernel."""
    input, target, operands = arguments.input, arguments.target, _operands(*arguments.operands)
    likelihood, reduction = arguments.likelihood, arguments.reduction
    n = input.numel()
    if n == 0:
        return
    config = _launch.stream(n, _narrowest(input, target), _device.machine(input.device))
    with _device.on(input.device):
        slots, ticket = None, None
        if logvar_gradient.total:
            slots, ticket = input.new_empty(config.programs, dtype=torch.float32), _device.ticket(input.device)
        reconstruction_backward_kernel[(config.programs,)](
            arguments.grad_output.contiguous(), *operands, grad_input, grad_target, logvar_gradient.written, slots, ticket,
            n, n // input.shape[0] if input.ndim else 1, reduction_scale(input.shape, reduction), expected,
            LIKELIHOOD=likelihood, REDUCTION=reduction, TOTAL_LOGVAR=logvar_gradient.total, BLOCK=config.block, CHUNK=config.chunk,
            **_launch.OPTIONS,
        )  # fmt: skip


@_device.implements(ops.rescale_)
def _rescale_(arguments: ops.RescaleArguments) -> None:
    grad, grad_output, expected = arguments
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
