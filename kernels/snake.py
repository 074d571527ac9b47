"""Snake on a GPU, contiguous or channels-last: one pass over each tensor, and a small launch that adds partial sums in a fixed order.

================================  ==========================  =======================================  ========================
kernel                            grid                        reads                                    writes
================================  ==========================  =======================================  ========================
snake_forward_kernel              (tiles * splits * batch,)   input, frequency, gain                   output
snake_backward_kernel             (tiles * splits * batch,)   grad_output, input, frequency, gain      grad_input, partial_sums
snake_parameter_gradients_kernel  (channels / COLUMNS,)       partial_sums, gain                       grad_frequency, grad_gain
================================  ==========================  =======================================  ========================

input, output, grad_output and grad_input are (batch, channels, positions) in the layout of the call, all of one dtype; frequency, gain and
their gradients are (channels,). partial_sums is a scratch buffer, (batch, splits, channels, 2) float32: the sums of the gradients of
frequency and gain over a split, where that of the frequency lacks the factor 2 gain.
"""

import torch
import triton
import triton.language as tl

from fastvae.kernels import _device, _launch
from fastvae.kernels._group_norm import GroupNormBlocks, blocks
from fastvae.kernels._math import sine_pair
from fastvae.kernels._norm import NormCall, block_offsets, dense, load, program_split
from fastvae.ops import snake as ops

# Splits and channels that a program of snake_parameter_gradients_kernel loads at a time. 32 channels are 256 adjacent bytes.
SPLITS, CHANNELS = 16, 32


@triton.jit
def load_channels(frequency, gain, channel, channels):
    """Both parameters of the channels, in a row each."""
    mask = channel < channels
    return load(frequency + channel, mask)[None, :], load(gain + channel, mask)[None, :]


@triton.jit(do_not_specialize=["split_positions", "tiles", "splits"])
def snake_forward_kernel(
    input, output, frequency, gain, channels, positions, split_positions, tiles, splits,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program handles a tile of channels over a split of the positions. Grid: (tiles * splits * batch,)."""
    sample, _, first_channel, first, end = program_split(positions, split_positions, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    a, b = load_channels(frequency, gain, channel, channels)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        x = load(input + offsets, mask)
        square, _product = sine_pair(a * x)
        tl.store(output + offsets, tl.fma(b, square, x), mask=mask)


@triton.jit
def sum_rows(terms, CHANNELS_LAST: tl.constexpr):
    """The terms of a block as they are added to those of other blocks."""
    if CHANNELS_LAST:
        return terms
    else:
        return tl.sum(terms, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["split_positions", "tiles", "splits"])
def snake_backward_kernel(
    grad_output, input, grad_input, partial_sums, frequency, gain, channels, positions, split_positions, tiles, splits,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program differentiates a tile of channels over a split of the positions. Grid: (tiles * splits * batch,)."""
    sample, split, first_channel, first, end = program_split(positions, split_positions, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    a, b = load_channels(frequency, gain, channel, channels)
    # Adjacent threads hold positions of a channel in contiguous memory, so that the sum over them leaves registers free.
    SUM_ROWS: tl.constexpr = ROWS if CHANNELS_LAST else 1
    of_frequency, of_gain = tl.zeros([SUM_ROWS, COLUMNS], tl.float32), tl.zeros([SUM_ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        x, g = load(input + offsets, mask), load(grad_output + offsets, mask)
        square, product = sine_pair(a * x)
        # Elements that do not exist are 0; a parameter that is NaN would make them NaN.
        of_frequency += sum_rows(tl.where(mask, g * x * product, 0.0), CHANNELS_LAST)
        of_gain += sum_rows(tl.where(mask, g * square, 0.0), CHANNELS_LAST)
        tl.store(grad_input + offsets, g * tl.fma(2.0 * a * b, product, 1.0), mask=mask)
    slot = ((sample * splits + split) * channels + channel) * 2
    tl.store(partial_sums + slot, tl.sum(of_frequency, axis=0), mask=channel < channels)
    tl.store(partial_sums + slot + 1, tl.sum(of_gain, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["count"])
def snake_parameter_gradients_kernel(
    partial_sums, gain, grad_frequency, grad_gain, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Each program adds the ``count`` partial sums of COLUMNS channels, in float64. Grid: (channels / COLUMNS,)."""
    channel = tl.cast(tl.program_id(0), tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    of_frequency, of_gain = tl.zeros([ROWS, COLUMNS], tl.float64), tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, count, ROWS):
        index = first + tl.arange(0, ROWS)
        exists = (index < count)[:, None] & mask[None, :]
        slot = partial_sums + (index.to(tl.int64)[:, None] * channels + channel[None, :]) * 2
        of_frequency += tl.load(slot, mask=exists, other=0.0).to(tl.float64)
        of_gain += tl.load(slot + 1, mask=exists, other=0.0).to(tl.float64)
    factor = 2.0 * load(gain + channel, mask).to(tl.float64)
    tl.store(grad_frequency + channel, (factor * tl.sum(of_frequency, axis=0)).to(tl.float32), mask=mask)
    tl.store(grad_gain + channel, tl.sum(of_gain, axis=0).to(tl.float32), mask=mask)


def _call_of(input: torch.Tensor) -> NormCall:
    input, channels_last = dense(input)
    # The channels of a single position are last in either layout.
    return NormCall(input, channels_last or input.shape[2:].numel() == 1)


def _partition(call: NormCall) -> tuple[GroupNormBlocks, tuple[int], dict]:
    """The blocks of a call, its grid, and the options of its kernels."""
    config = blocks(call.batch, call.channels, call.positions, call.channels_last, call.input.element_size(), call.machine)
    options = _launch.OPTIONS | {"CHANNELS_LAST": call.channels_last, "ROWS": config.rows, "COLUMNS": config.columns}
    return config, (config.tiles * config.splits * call.batch,), options


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> torch.Tensor:
    output = arguments.allocate()
    if arguments.input.numel() == 0:
        return output
    call = _call_of(arguments.input)
    config, grid, options = _partition(call)
    parameters = arguments.frequency.contiguous(), arguments.gain.contiguous()
    with _device.on(call.input.device):
        snake_forward_kernel[grid](
            call.input, output, *parameters, call.channels, call.positions, config.split_positions, config.tiles, config.splits, **options
        )
    return output


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    results = grad_input, grad_frequency, grad_gain = arguments.allocate()
    if arguments.input.numel() == 0:
        grad_frequency.zero_()
        grad_gain.zero_()
        return results
    call = _call_of(arguments.input)
    config, grid, options = _partition(call)
    frequency, gain = arguments.frequency.contiguous(), arguments.gain.contiguous()
    count = call.batch * config.splits
    partial_sums = call.input.new_empty((count * call.channels * 2,), dtype=torch.float32)
    with _device.on(call.input.device):
        snake_backward_kernel[grid](
            call.in_same_layout(arguments.grad_output), call.input, grad_input, partial_sums, frequency, gain,
            call.channels, call.positions, config.split_positions, config.tiles, config.splits, **options,
        )  # fmt: skip
        snake_parameter_gradients_kernel[(triton.cdiv(call.channels, CHANNELS),)](
            partial_sums, gain, grad_frequency, grad_gain, count, call.channels, ROWS=SPLITS, COLUMNS=CHANNELS, **_launch.OPTIONS
        )
    return results
