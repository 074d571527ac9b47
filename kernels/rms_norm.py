"""RMS normalisation of the channels with its activation on a GPU, contiguous or channels-last.

A program handles blocks of positions with all their channels. Where those fit on chip a tensor is read once a pass; where they do not, a
program reads the channels tile by tile, twice. Partial sums of the parameters' gradients are added by a small launch in a fixed order.

===================================  ==========================  ====================================  ==================================
kernel                               grid                        reads                                 writes
===================================  ==========================  ====================================  ==================================
rms_norm_forward_kernel              (splits * batch,)           input, weight, bias                   output, rrms
rms_norm_forward_tiles_kernel        (splits * batch,)           input twice, weight, bias             output, rrms
rms_norm_backward_kernel             (splits * batch,)           grad_output, input, rrms, weight,     grad_input, weight_sums, bias_sums
                                                                 bias
rms_norm_backward_tiles_kernel       (splits * batch,)           grad_output and input twice, rrms,    grad_input, weight_sums, bias_sums
                                                                 weight, bias
rms_norm_parameter_gradients_kernel  (channels / COLUMNS * rows  weight_sums or bias_sums              grad_weight or grad_bias
                                     of the parameter,)
===================================  ==========================  ====================================  ==================================

input, output, grad_output and grad_input are (batch, channels, positions) in the layout of the call, all of one dtype; rrms (1 / RMS) is
(batch, positions) float32. weight, bias and their gradients are (channels,) or (batch, channels), or None; ``weight_stride`` and
``bias_stride`` are the distance from sample to sample, 0 for (channels,). ``bound`` is eps, or in the mode "clamp" the largest rrms.

weight_sums and bias_sums are scratch buffers, (batch, splits, channels) float32: the sums of du * n and of du over the positions of a
split; None where the parameter is.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastvae.kernels import _device, _launch
from fastvae.kernels._norm import NormCall, activate, block_offsets, contiguous, dense, load, program_split
from fastvae.kernels._rms_norm import (
    BACKWARD_REGISTERS,
    MAX_REGISTERS,
    PositionBlocks,
    affine,
    backward_splits,
    gradient_through_rrms,
    load_normal_and_du,
    load_parameters,
    position_blocks,
    position_offsets,
    reciprocal_rms,
    register_limit,
    summed_rows,
)
from fastvae.ops import rms_norm as ops
from fastvae.ops.rms_norm import EPS_MODES

# Partial sums and channels that a program of rms_norm_parameter_gradients_kernel loads at a time: 16 numbers for each of 128 threads, since
# few programs run and each waits for its loads. 16 channels are 64 adjacent bytes.
SPLITS, CHANNELS = 128, 16


@triton.jit(do_not_specialize=["splits"])
def rms_norm_forward_kernel(
    input, output, rrms, weight, bias, bound, channels, positions, splits, weight_stride, bias_stride,
    EPS_MODE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program normalises ROWS positions, whose channels it keeps on chip. Grid: (splits * batch,)."""
    sample, _, first_channel, first, _ = program_split(positions, ROWS, 1, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    offsets, mask = block_offsets(first, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
    values = load(input + offsets, mask)
    block_rrms = reciprocal_rms(tl.sum(values * values, axis=1) / channels, bound, EPS_MODE)
    position, exists = position_offsets(first, sample, positions, ROWS)
    tl.store(rrms + position, block_rrms, mask=exists)
    parameters = load_parameters((weight, bias), (weight_stride, bias_stride), sample, channel, channel < channels)
    tl.store(output + offsets, activate(affine(values * block_rrms[:, None], parameters), ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def rms_norm_forward_tiles_kernel(
    input, output, rrms, weight, bias, bound, channels, positions, splits, weight_stride, bias_stride,
    EPS_MODE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program normalises ROWS positions, whose channels it reads in tiles: for rrms, then for the output. Grid: (splits * batch,)."""
    sample, _, first_channel, first, _ = program_split(positions, ROWS, 1, splits, ROWS, COLUMNS)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(0, channels, COLUMNS):
        channel = first_channel + tile + tl.arange(0, COLUMNS)
        offsets, mask = block_offsets(first, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        values = load(input + offsets, mask)
        squares = tl.fma(values, values, squares)
    block_rrms = reciprocal_rms(tl.sum(squares, axis=1) / channels, bound, EPS_MODE)
    position, exists = position_offsets(first, sample, positions, ROWS)
    tl.store(rrms + position, block_rrms, mask=exists)
    for tile in range(0, channels, COLUMNS):
        channel = first_channel + tile + tl.arange(0, COLUMNS)
        offsets, mask = block_offsets(first, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        parameters = load_parameters((weight, bias), (weight_stride, bias_stride), sample, channel, channel < channels)
        u = affine(load(input + offsets, mask) * block_rrms[:, None], parameters)
        tl.store(output + offsets, activate(u, ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["split_positions", "splits"])
def rms_norm_backward_kernel(
    grad_output, input, grad_input, rrms, weight, bias, weight_sums, bias_sums, bound,
    channels, positions, split_positions, splits, weight_stride, bias_stride,
    EPS_MODE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes grad_input and the partial sums of a split, block by block, each of which it keeps on chip.

    Grid: (splits * batch,).
    """
    sample, split, first_channel, first, end = program_split(positions, split_positions, 1, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    parameters = load_parameters((weight, bias), (weight_stride, bias_stride), sample, channel, channel < channels)
    SUM_ROWS: tl.constexpr = ROWS if CHANNELS_LAST else 1
    sum_du_n, sum_du = tl.zeros([SUM_ROWS, COLUMNS], tl.float32), tl.zeros([SUM_ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        position, exists = position_offsets(start, sample, positions, ROWS)
        block_rrms = load(rrms + position, exists)
        normal, du = load_normal_and_du(input, grad_output, offsets, mask, block_rrms, parameters, ACTIVATION)
        if weight_sums is not None:
            sum_du_n += summed_rows(du * normal, CHANNELS_LAST)
        if bias_sums is not None:
            sum_du += summed_rows(du, CHANNELS_LAST)
        wdu = du * parameters[0][None, :]
        projection = gradient_through_rrms(tl.sum(wdu * normal, axis=1), channels, block_rrms, bound, EPS_MODE)
        tl.store(grad_input + offsets, (wdu - normal * projection[:, None]) * block_rrms[:, None], mask=mask)
    slot = (sample * splits + split) * channels + channel
    if weight_sums is not None:
        tl.store(weight_sums + slot, tl.sum(sum_du_n, axis=0), mask=channel < channels)
    if bias_sums is not None:
        tl.store(bias_sums + slot, tl.sum(sum_du, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["split_positions", "splits"])
def rms_norm_backward_tiles_kernel(
    grad_output, input, grad_input, rrms, weight, bias, weight_sums, bias_sums, bound,
    channels, positions, split_positions, splits, weight_stride, bias_stride,
    EPS_MODE: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes grad_input and the partial sums of a split, which is one block, and reads its channels in tiles: for the
    gradient through rrms, then for the rest. Grid: (splits * batch,)."""
    sample, split, first_channel, first, _ = program_split(positions, split_positions, 1, splits, ROWS, COLUMNS)
    position, exists = position_offsets(first, sample, positions, ROWS)
    block_rrms = load(rrms + position, exists)
    sum_wdu_n = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(0, channels, COLUMNS):
        channel = first_channel + tile + tl.arange(0, COLUMNS)
        offsets, mask = block_offsets(first, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        parameters = load_parameters((weight, bias), (weight_stride, bias_stride), sample, channel, channel < channels)
        normal, du = load_normal_and_du(input, grad_output, offsets, mask, block_rrms, parameters, ACTIVATION)
        sum_wdu_n = tl.fma(du * parameters[0][None, :], normal, sum_wdu_n)
    projection = gradient_through_rrms(tl.sum(sum_wdu_n, axis=1), channels, block_rrms, bound, EPS_MODE)
    for tile in range(0, channels, COLUMNS):
        channel = first_channel + tile + tl.arange(0, COLUMNS)
        offsets, mask = block_offsets(first, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        parameters = load_parameters((weight, bias), (weight_stride, bias_stride), sample, channel, channel < channels)
        normal, du = load_normal_and_du(input, grad_output, offsets, mask, block_rrms, parameters, ACTIVATION)
        gradient = (du * parameters[0][None, :] - normal * projection[:, None]) * block_rrms[:, None]
        tl.store(grad_input + offsets, gradient, mask=mask)
        slot = (sample * splits + split) * channels + channel
        if weight_sums is not None:
            tl.store(weight_sums + slot, tl.sum(du * normal, axis=0), mask=channel < channels)
        if bias_sums is not None:
            tl.store(bias_sums + slot, tl.sum(du, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["count", "tiles"])
def rms_norm_parameter_gradients_kernel(sums, grad, count, channels, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program adds the ``count`` partial sums of COLUMNS channels in a row of the parameter, in float64. Grid: (tiles * rows,)."""
    program = tl.program_id(0)
    row, channel = (program // tiles).to(tl.int64), (program % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, count, ROWS):
        index = first + tl.arange(0, ROWS)
        exists = (index < count)[:, None] & (channel < channels)[None, :]
        slot = (row * count + index)[:, None] * channels + channel[None, :]
        total += tl.load(sums + slot, mask=exists, other=0.0).to(tl.float64)
    tl.store(grad + row * channels + channel, tl.sum(total, axis=0).to(tl.float32), mask=channel < channels)


@dataclass(frozen=True)
class _RMSNormCall(NormCall):
    """The operands that both passes have, with the options of their kernels.

    Where the channels are last and the samples share the parameters, the kernels see the positions of all samples as those of one, so that
    blocks are full where a sample has few positions.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    eps_mode: int
    activation: int

    @classmethod
    def of(cls, arguments: ops.ForwardArguments | ops.BackwardArguments):
        input, channels_last = dense(arguments.input)
        # The channels of a single position are last in either layout.
        channels_last = channels_last or input.shape[2:].numel() == 1
        parameters = contiguous(arguments.weight, arguments.bias)
        return cls(input, channels_last, *parameters, arguments.eps, arguments.eps_mode, arguments.activation)

    @property
    def joins_samples(self) -> bool:
        return self.channels_last and not any(self.parameter_strides)

    @property
    def batch(self) -> int:
        return 1 if self.joins_samples else super().batch

    @property
    def positions(self) -> int:
        return super().batch * super().positions if self.joins_samples else super().positions

    @property
    def parameter_strides(self) -> tuple[int, ...]:
        return tuple(0 if p is None or p.ndim == 1 else self.channels for p in (self.weight, self.bias))

    @property
    def bound(self) -> float:
        return self.eps if self.eps_mode == EPS_MODES["add"] else ops.limit_of_rrms(self.channels, self.eps)

    def blocks(self) -> PositionBlocks:
        return position_blocks(self.channels, self.positions, self.channels_last, self.input.element_size(), self.machine)

    def options(self, blocks: PositionBlocks) -> dict:
        numbers = {"EPS_MODE": self.eps_mode, "ACTIVATION": self.activation, "CHANNELS_LAST": self.channels_last}
        return _launch.OPTIONS | {"num_warps": blocks.warps, "ROWS": blocks.rows, "COLUMNS": blocks.columns, **numbers}


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    results = arguments.allocate()
    if arguments.input.numel() == 0:
        results.rrms.zero_()
        return results
    call = _RMSNormCall.of(arguments)
    blocks = call.blocks()
    splits, options = triton.cdiv(call.positions, blocks.rows), call.options(blocks)
    operands = call.input, *results, call.weight, call.bias, call.bound, call.channels, call.positions, splits, *call.parameter_strides
    with _device.on(call.input.device):
        if blocks.whole:
            rms_norm_forward_kernel[(splits * call.batch,)](*operands, **options)
        else:
            limit = register_limit(blocks, MAX_REGISTERS, call.machine)
            rms_norm_forward_tiles_kernel[(splits * call.batch,)](*operands, **options, **limit)
    return results


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    results = grad_input, grad_weight, grad_bias = arguments.allocate()
    if arguments.input.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
        return results
    call = _RMSNormCall.of(arguments)
    blocks, grad_output = call.blocks(), call.in_same_layout(arguments.grad_output)
    registers = BACKWARD_REGISTERS[call.input.element_size(), call.channels_last]
    split_positions, splits = backward_splits(call.batch, call.positions, blocks, registers, call.machine)
    grid, options = (splits * call.batch,), call.options(blocks) | register_limit(blocks, registers, call.machine)
    sums = [
        None if parameter is None else call.input.new_empty((call.batch, splits, call.channels), dtype=torch.float32)
        for parameter in (call.weight, call.bias)
    ]
    operands = (
        grad_output, call.input, grad_input, arguments.rrms, call.weight, call.bias, *sums, call.bound,
        call.channels, call.positions, split_positions, splits, *call.parameter_strides,
    )  # fmt: skip
    with _device.on(call.input.device):
        if blocks.whole:
            rms_norm_backward_kernel[grid](*operands, **options)
        else:
            rms_norm_backward_tiles_kernel[grid](*operands, **options)
        for partial_sums, grad in zip(sums, (grad_weight, grad_bias), strict=True):
            if partial_sums is not None:
                _add_partial_sums(partial_sums, grad)
    return results


def _add_partial_sums(sums: torch.Tensor, grad: torch.Tensor) -> None:
    """Launches the sum of ``sums``, (batch, splits, channels), into the gradient of a parameter."""
    channels = sums.shape[-1]
    rows, tiles = grad.numel() // channels, triton.cdiv(channels, CHANNELS)
    count = sums.numel() // grad.numel()
    rms_norm_parameter_gradients_kernel[(tiles * rows,)](
        sums, grad, count, channels, tiles, ROWS=min(SPLITS, triton.next_power_of_2(count)), COLUMNS=CHANNELS, **_launch.OPTIONS
    )
