"""Mixtures of discretized logistics on a GPU. Where the reduction is to a scalar, one launch writes the loss and its gradient.

=======================  ==================  ==============================  ==================================
kernel                   grid                reads                           writes
=======================  ==================  ==============================  ==================================
logistic_mixture_kernel  (rows, splits)      input, target, grad_output      loss of each position or row,
                                                                             grad_input
=======================  ==================  ==============================  ==================================

input and its gradient are (batch, parameters, positions), target is (batch, channels, positions), both contiguous, each in its dtype; the
loss is (batch, positions), (batch,) or a scalar. A pointer is None where its tensor is absent or not requested. ``slots`` are float32
partial sums of the programs, and ``ticket`` is their ticket counter, see _reduce.py.
"""

import torch
import triton
import triton.language as tl

from fastvae.kernels import _device, _launch
from fastvae.kernels._index import common_gradient, divide, incoming_gradient, zero_outside
from fastvae.kernels._logistic_mixture import mixture_sums, store_gradients
from fastvae.kernels._reduce import store_row_sums
from fastvae.ops import logistic_mixture as ops
from fastvae.ops._results import REDUCTIONS, reduction_scale


@triton.jit(do_not_specialize=["rows", "columns", "positions"])
def logistic_mixture_kernel(
    input, target, grad_output, loss, grad_input, slots, ticket, rows, columns, positions, scale, grad_scale, expected,
    MIXTURES: tl.constexpr, CHANNELS: tl.constexpr, PARAMETERS: tl.constexpr, REDUCTION: tl.constexpr, TOTAL: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each program handles blocks of BLOCK positions of one row in turn. A row is ``columns`` adjacent positions of the batch: a sample's,
    or all. Grid: (rows, splits).

    ``loss`` is that of each position, or with TOTAL the sum of each row times ``scale``; SPLIT says that a row has several programs, whose
    partial sums go to ``slots``, (splits, rows). ``grad_input`` is the gradient times ``grad_scale`` and ``grad_output``, which is
    (batch, positions), (batch,), a scalar, by REDUCTION, or None.

    Where ``expected`` is not None, the gradient was written for a grad_output of that value, and nothing is written if it is that.
    """
    if expected is None:  # noqa: SIM114 (known when the kernel is compiled, unlike the gradient)
        handle_row(
            input, target, grad_output, loss, grad_input, slots, ticket, rows, columns, positions, scale, grad_scale,
            MIXTURES, CHANNELS, PARAMETERS, REDUCTION, TOTAL, SPLIT, BLOCK,
        )  # fmt: skip
    elif tl.load(grad_output).to(tl.float32) != expected:
        handle_row(
            input, target, grad_output, loss, grad_input, slots, ticket, rows, columns, positions, scale, grad_scale,
            MIXTURES, CHANNELS, PARAMETERS, REDUCTION, TOTAL, SPLIT, BLOCK,
        )  # fmt: skip


@triton.jit
def handle_row(
    input, target, grad_output, loss, grad_input, slots, ticket, rows, columns, positions, scale, grad_scale,
    MIXTURES: tl.constexpr, CHANNELS: tl.constexpr, PARAMETERS: tl.constexpr, REDUCTION: tl.constexpr, TOTAL: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the kernel does for the row of this program."""
    row, split = tl.program_id(0), tl.program_id(1)
    offset, stride = tl.arange(0, BLOCK), tl.cast(positions, tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    common = common_gradient(grad_output, grad_scale, REDUCTION)
    if grad_output is None:
        common = grad_scale
    for first in range(tl.cast(split, tl.int64) * BLOCK, columns, tl.num_programs(1) * BLOCK):
        start = tl.cast(row, tl.int64) * columns + first
        mask = offset < columns - first
        sample, added, position = divide(start, offset, positions, BLOCK)
        samples = sample + added
        of_input = samples * (PARAMETERS * stride) + position
        parameters, pixels = input + of_input, target + samples * (CHANNELS * stride) + position
        log_total, log_logits_total = mixture_sums(parameters, pixels, stride, mask, MIXTURES, CHANNELS)
        losses = log_logits_total - log_total
        if TOTAL:
            total += zero_outside(losses, mask)
        elif loss is not None:
            tl.store(loss + start + offset, losses, mask=mask)
        if grad_input is not None:
            factor = incoming_gradient(grad_output, start, offset, mask, positions, common, REDUCTION, BLOCK)
            store_gradients(
                grad_input + of_input, parameters, pixels, stride, mask, log_total, log_logits_total, factor, MIXTURES, CHANNELS
            )
    if TOTAL:
        store_row_sums(tl.sum(total[None, :], axis=1) * scale, loss, slots, ticket, row + tl.arange(0, 1), rows, SPLIT)


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    reduction, with_grad = arguments.reduction, arguments.with_grad
    loss, grad_input = arguments.allocate()
    shape = ops.one_plane(arguments.input).shape
    if shape.numel() == 0:
        return ops.ForwardResults(loss.zero_(), grad_input)
    scale = reduction_scale(shape, reduction)
    scales = scale, arguments.grad_scale * scale
    _launch_kernel(arguments, None, loss, grad_input if with_grad else None, scales)
    return ops.ForwardResults(loss, grad_input)


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> torch.Tensor:
    grad_input = arguments.allocate()
    _write_gradient(arguments, grad_input)
    return grad_input


@_device.implements(ops.backward_)
def _backward_(arguments: ops.BackwardInPlaceArguments) -> None:
    _write_gradient(arguments, arguments.grad_input, arguments.expected)


def _write_gradient(arguments, grad_input, expected=None):
    shape = ops.one_plane(arguments.input).shape
    if shape.numel() > 0:
        _launch_kernel(
            arguments, arguments.grad_output.contiguous(), None, grad_input, (1.0, reduction_scale(shape, arguments.reduction)), expected
        )


def _launch_kernel(arguments, grad_output, loss, grad_input, scales, expected=None):
    """Launches logistic_mixture_kernel."""
    input, target, reduction = arguments.input.contiguous(), arguments.target.contiguous(), arguments.reduction
    batch, positions = input.shape[0], input[0, 0].numel()
    total = loss is not None and reduction != REDUCTIONS["none"]
    rows = batch if total and reduction == REDUCTIONS["sample"] else 1
    columns = batch * positions // rows
    machine = _device.machine(input.device)
    config = _launch.positions(rows, columns, machine)
    split = total and config.splits > 1
    with _device.on(input.device):
        slots, ticket = None, None
        if split:
            slots, ticket = input.new_empty(rows * config.splits, dtype=torch.float32), _device.ticket(input.device)
        logistic_mixture_kernel[config.groups, config.splits](
            input, target, grad_output, loss, grad_input, slots, ticket, rows, columns, positions, *scales, expected,
            MIXTURES=arguments.num_mixtures, CHANNELS=target.shape[1], PARAMETERS=input.shape[1], REDUCTION=reduction, TOTAL=total,
            SPLIT=split, BLOCK=config.columns, **_launch.mixture_options(machine),
        )  # fmt: skip
