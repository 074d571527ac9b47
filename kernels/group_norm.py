"""GroupNorm with its activation on a GPU, contiguous or channels-last.

A group that fits on chip is read once a pass, by one program. Larger groups are read twice: programs write partial sums of each channel in
each split of the positions, so that 32 groups do not mean 32 programs; a small launch combines them in a fixed order; a second pass applies
the result.

=====================================  ==========================  ============================================  =======================
kernel                                 grid                        reads                                         writes
=====================================  ==========================  ============================================  =======================
group_norm_forward_group_kernel        (batch * groups,)           input, weight, bias                           output, mean, rstd
group_norm_moments_kernel              (tiles * splits * batch,)   input                                         partial_moments
group_norm_combine_moments_kernel      (batch * groups,)           partial_moments                               mean, rstd
group_norm_forward_kernel              (tiles * splits * batch,)   input, mean, rstd, weight, bias               output
group_norm_backward_group_kernel       (batch * groups,)           grad_output, input, mean, rstd, weight, bias  grad_input, sample_sums
group_norm_gradient_sums_kernel        (tiles * splits * batch,)   grad_output, input, mean, rstd, weight, bias  partial_sums
group_norm_combine_gradients_kernel    (batch * groups,)           partial_sums, mean, rstd, weight              statistics_gradient,
                                                                                                                 sample_sums
group_norm_backward_kernel             (tiles * splits * batch,)   grad_output, input, mean, rstd, weight, bias  grad_input
                                                                   statistics_gradient
group_norm_parameter_gradients_kernel  (channels / COLUMNS,)       sample_sums                                   grad_weight, grad_bias
=====================================  ==========================  ============================================  =======================

input, output, grad_output and grad_input are (batch, channels, positions) in the layout of the call, all of one dtype; weight, bias and
their gradients are (channels,), or None. mean and rstd (1 / standard deviation) are (batch, groups) float64. ``width`` is the number of
channels of a group. The scratch buffers:

* partial_moments, (batch, splits, channels, 3) float32: a shift, the sum of x - shift, the sum of squared deviations from the mean;
* partial_sums, (batch, splits, channels, 2) float32: the sums of du and of du * (x - centre);
* statistics_gradient, (batch, groups, 2) float32: the slope and intercept of the part of grad_input that flows through mean and rstd,
  (x - centre) * slope + intercept;
* sample_sums, (batch, channels, 2) float64: the sums of du * xhat and of du, which summed over the batch are grad_weight and grad_bias;
  None where neither is requested.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastvae.kernels import _device, _launch
from fastvae.kernels._group_norm import (
    FORWARD_LIMITS,
    GroupLimits,
    backward_limits,
    blocks,
    load_affine,
    load_gradients,
    load_moments,
    program_group,
    two_floats,
    whole_group,
)
from fastvae.kernels._norm import (
    NormCall,
    activate,
    block_offsets,
    contiguous,
    dense,
    differentiate,
    load,
    load_parameter,
    program_split,
)
from fastvae.ops import group_norm as ops

# Partial sums that a program of a combining kernel loads at a time: two for each of 128 threads.
PARTIALS = 256
# Samples and channels that a program of group_norm_parameter_gradients_kernel loads at a time. 32 channels are 512 adjacent bytes.
SAMPLES, CHANNELS = 16, 32


@triton.jit(do_not_specialize=["split_positions", "tiles", "splits"])
def group_norm_moments_kernel(
    input, partial_moments, channels, positions, split_positions, tiles, splits,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes the partial moments of a tile of channels over a split of the positions. Grid: (tiles * splits * batch,).

    Deviations are taken from a shift, the mean of the first ROWS positions, because sums of x and x * x would cancel where the mean is
    large beside the standard deviation.
    """
    sample, split, first_channel, first, end = program_split(positions, split_positions, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    offsets, mask = block_offsets(first, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
    values = load(input + offsets, mask)
    shift = tl.sum(values, axis=0) / tl.minimum(end - first, ROWS).to(tl.float32)
    total, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        difference = tl.where(mask, load(input + offsets, mask) - shift[None, :], 0.0)
        total += difference
        squares = tl.fma(difference, difference, squares)
    channel_total = tl.sum(total, axis=0)
    squared_deviations = tl.sum(squares, axis=0) - channel_total * (channel_total / (end - first).to(tl.float32))
    slot = ((sample * splits + split) * channels + channel) * 3
    tl.store(partial_moments + slot, shift, mask=channel < channels)
    tl.store(partial_moments + slot + 1, channel_total, mask=channel < channels)
    # Rounding can make the difference negative. The comparison keeps NaN.
    tl.store(partial_moments + slot + 2, tl.where(squared_deviations < 0.0, 0.0, squared_deviations), mask=channel < channels)


@triton.jit(do_not_specialize=["split_positions", "splits"])
def group_norm_combine_moments_kernel(
    partial_moments, mean, rstd, channels, positions, split_positions, splits, groups, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Each program combines the partial moments of one group, first into the mean, then with it into rstd. Grid: (batch * groups,)."""
    program, sample, group = program_group(groups)
    first = sample * splits * channels + group * width
    count, size = splits * width, tl.cast(positions, tl.float64) * width
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        elements, means, _ = load_moments(partial_moments, index, index < count, first, channels, positions, split_positions, splits, width)
        total += elements * means
    group_mean = tl.sum(total, axis=0) / size
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        elements, means, deviations = load_moments(
            partial_moments, index, index < count, first, channels, positions, split_positions, splits, width
        )
        squares += deviations + elements * (means - group_mean) * (means - group_mean)
    tl.store(mean + program, group_mean)
    tl.store(rstd + program, 1.0 / tl.sqrt(tl.sum(squares, axis=0) / size + eps))


@triton.jit(do_not_specialize=["split_positions", "tiles", "splits"])
def group_norm_forward_kernel(
    input, output, mean, rstd, weight, bias, channels, positions, split_positions, tiles, splits, groups, width,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program normalises a tile of channels over a split of the positions. Grid: (tiles * splits * batch,)."""
    sample, _, first_channel, first, end = program_split(positions, split_positions, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    group = sample * groups + channel.to(tl.int32) // width
    centre, scale, offset = load_affine((mean, rstd), (weight, bias), group, channel, channel < channels)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        u = (load(input + offsets, mask) - centre[None, :]) * scale[None, :] + offset[None, :]
        tl.store(output + offsets, activate(u, ACTIVATION), mask=mask)


@triton.jit
def group_norm_forward_group_kernel(
    input, output, mean, rstd, weight, bias, channels, positions, groups, eps,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program computes the moments and the output of one group, which it keeps on chip. Grid: (batch * groups,)."""
    program, sample, group = program_group(groups)
    channel, end_channel = group * WIDTH + tl.arange(0, COLUMNS), (group + 1) * WIDTH
    offsets, mask = block_offsets(0, sample, channel, end_channel, channels, positions, CHANNELS_LAST, ROWS)
    values = load(input + offsets, mask)
    size = tl.cast(positions, tl.float32) * WIDTH
    centre = tl.sum(values) / size
    difference = tl.where(mask, values - centre, 0.0)
    # `centre` is the mean with the rounding error of a float32 sum; the mean of the differences corrects that.
    rest = tl.sum(difference) / size
    deviation = tl.where(mask, difference - rest, 0.0)
    group_rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation) / size + eps)
    tl.store(mean + program, centre.to(tl.float64) + rest.to(tl.float64))
    tl.store(rstd + program, group_rstd.to(tl.float64))
    w, b = load_parameter(weight, channel, channel < end_channel, 1.0), load_parameter(bias, channel, channel < end_channel, 0.0)
    u = deviation * (group_rstd * w)[None, :] + b[None, :]
    tl.store(output + offsets, activate(u, ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["split_positions", "tiles", "splits"])
def group_norm_gradient_sums_kernel(
    grad_output, input, partial_sums, mean, rstd, weight, bias, channels, positions, split_positions, tiles, splits, groups, width,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program sums du and du * (x - centre) of a tile of channels over a split. Grid: (tiles * splits * batch,)."""
    sample, split, first_channel, first, end = program_split(positions, split_positions, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    group = sample * groups + channel.to(tl.int32) // width
    affine = load_affine((mean, rstd), (weight, bias), group, channel, channel < channels)
    sum_du, sum_du_x = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        difference, du = load_gradients(input, grad_output, offsets, mask, affine, ACTIVATION)
        du = tl.where(mask, du, 0.0)
        sum_du += du
        sum_du_x = tl.fma(du, difference, sum_du_x)
    slot = ((sample * splits + split) * channels + channel) * 2
    tl.store(partial_sums + slot, tl.sum(sum_du, axis=0), mask=channel < channels)
    tl.store(partial_sums + slot + 1, tl.sum(sum_du_x, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["splits"])
def group_norm_combine_gradients_kernel(
    partial_sums, mean, rstd, weight, statistics_gradient, sample_sums, channels, positions, splits, groups, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program adds the partial sums of one group, and computes its slope and intercept. Grid: (batch * groups,)."""
    program, sample, group = program_group(groups)
    column = tl.arange(0, COLUMNS)
    channel, mask = group * width + column, column < width
    split_du, split_du_x = tl.zeros([ROWS, COLUMNS], tl.float64), tl.zeros([ROWS, COLUMNS], tl.float64)
    for start in range(0, splits, ROWS):
        split = start + tl.arange(0, ROWS)
        slot = partial_sums + ((sample * splits + split)[:, None] * channels + channel[None, :]) * 2
        exists = (split < splits)[:, None] & mask[None, :]
        split_du += tl.load(slot, mask=exists, other=0.0).to(tl.float64)
        split_du_x += tl.load(slot + 1, mask=exists, other=0.0).to(tl.float64)
    sum_du, sum_du_x = tl.sum(split_du, axis=0), tl.sum(split_du_x, axis=0)
    group_rstd = tl.load(rstd + program)
    _, rest = two_floats(tl.load(mean + program))
    sum_du_xhat = group_rstd * (sum_du_x - rest.to(tl.float64) * sum_du)
    if sample_sums is not None:
        sample_slot = (sample * channels + channel) * 2
        tl.store(sample_sums + sample_slot, sum_du_xhat, mask=mask)
        tl.store(sample_sums + sample_slot + 1, sum_du, mask=mask)
    w = load_parameter(weight, channel, mask, 1.0).to(tl.float64)
    size = tl.cast(positions, tl.float64) * width
    slope = -group_rstd * group_rstd * tl.sum(w * sum_du_xhat, axis=0) / size
    intercept = -group_rstd * tl.sum(w * sum_du, axis=0) / size - rest.to(tl.float64) * slope
    tl.store(statistics_gradient + program * 2, slope.to(tl.float32))
    tl.store(statistics_gradient + program * 2 + 1, intercept.to(tl.float32))


@triton.jit(do_not_specialize=["batch"])
def group_norm_parameter_gradients_kernel(sample_sums, grad_weight, grad_bias, batch, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program sums COLUMNS channels over the batch; grad_weight and grad_bias may be None. Grid: (channels / COLUMNS,)."""
    channel = tl.cast(tl.program_id(0), tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    sums_du_xhat, sums_du = tl.zeros([ROWS, COLUMNS], tl.float64), tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, batch, ROWS):
        sample = first + tl.arange(0, ROWS)
        sample_slot = sample_sums + (sample.to(tl.int64)[:, None] * channels + channel[None, :]) * 2
        exists = (sample < batch)[:, None] & mask[None, :]
        sums_du_xhat += tl.load(sample_slot, mask=exists, other=0.0)
        sums_du += tl.load(sample_slot + 1, mask=exists, other=0.0)
    sum_du_xhat, sum_du = tl.sum(sums_du_xhat, axis=0), tl.sum(sums_du, axis=0)
    if grad_weight is not None:
        tl.store(grad_weight + channel, sum_du_xhat.to(tl.float32), mask=mask)
    if grad_bias is not None:
        tl.store(grad_bias + channel, sum_du.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["split_positions", "tiles", "splits"])
def group_norm_backward_kernel(
    grad_output, input, grad_input, mean, rstd, weight, bias, statistics_gradient,
    channels, positions, split_positions, tiles, splits, groups, width,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Each program computes grad_input of a tile of channels over a split. Grid: (tiles * splits * batch,)."""
    sample, _, first_channel, first, end = program_split(positions, split_positions, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    group = sample * groups + channel.to(tl.int32) // width
    affine = load_affine((mean, rstd), (weight, bias), group, channel, channel < channels)
    slope = tl.load(statistics_gradient + group * 2, mask=channel < channels, other=0.0)
    intercept = tl.load(statistics_gradient + group * 2 + 1, mask=channel < channels, other=0.0)
    for start in range(first, end, ROWS):
        offsets, mask = block_offsets(start, sample, channel, channels, channels, positions, CHANNELS_LAST, ROWS)
        difference, du = load_gradients(input, grad_output, offsets, mask, affine, ACTIVATION)
        gradient = du * affine[1][None, :] + (difference * slope[None, :] + intercept[None, :])
        tl.store(grad_input + offsets, gradient, mask=mask)


@triton.jit
def group_norm_backward_group_kernel(
    grad_output, input, grad_input, mean, rstd, weight, bias, sample_sums, channels, positions, groups,
    ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Each program computes grad_input and the sums of one group, which it keeps on chip. Grid: (batch * groups,)."""
    program, sample, group = program_group(groups)
    channel, end_channel = group * WIDTH + tl.arange(0, COLUMNS), (group + 1) * WIDTH
    offsets, mask = block_offsets(0, sample, channel, end_channel, channels, positions, CHANNELS_LAST, ROWS)
    centre, rest = two_floats(tl.load(mean + program))
    group_rstd = tl.load(rstd + program).to(tl.float32)
    xhat = tl.where(mask, ((load(input + offsets, mask) - centre) - rest) * group_rstd, 0.0)
    w, b = load_parameter(weight, channel, channel < end_channel, 1.0), load_parameter(bias, channel, channel < end_channel, 0.0)
    du = differentiate(xhat * w[None, :] + b[None, :], load(grad_output + offsets, mask), ACTIVATION)
    du = tl.where(mask, du, 0.0)
    sum_du, sum_du_xhat = tl.sum(du, axis=0), tl.sum(du * xhat, axis=0)
    if sample_sums is not None:
        sample_slot = (sample * channels + channel) * 2
        tl.store(sample_sums + sample_slot, sum_du_xhat.to(tl.float64), mask=channel < end_channel)
        tl.store(sample_sums + sample_slot + 1, sum_du.to(tl.float64), mask=channel < end_channel)
    size = tl.cast(positions, tl.float32) * WIDTH
    mean_wdu, mean_wdu_xhat = tl.sum(w * sum_du) / size, tl.sum(w * sum_du_xhat) / size
    gradient = group_rstd * (du * w[None, :] - mean_wdu - xhat * mean_wdu_xhat)
    tl.store(grad_input + offsets, gradient, mask=mask)


@dataclass(frozen=True)
class _GroupNormCall(NormCall):
    """The input of a call with the options of its kernels."""

    groups: int

    @classmethod
    def of(cls, input, groups):
        return cls(*dense(input), groups)

    @property
    def width(self) -> int:
        return self.channels // self.groups

    def group_options(self, limits: GroupLimits) -> dict | None:
        """The options of a kernel that keeps a group on chip; None where that is not possible."""
        config = whole_group(self.width, self.positions, self.channels_last, self.input.element_size(), limits, self.machine)
        if config is None:
            return None
        sizes = {"ROWS": config.rows, "COLUMNS": config.columns, "WIDTH": self.width}
        return _launch.OPTIONS | {"num_warps": config.warps, "CHANNELS_LAST": self.channels_last, **sizes}

    def blocks(self):
        """The partition, the grid and the options of the kernels that read groups in splits."""
        config = blocks(self.batch, self.channels, self.positions, self.channels_last, self.input.element_size(), self.machine)
        grid = (config.tiles * config.splits * self.batch,)
        return config, grid, {"CHANNELS_LAST": self.channels_last, "ROWS": config.rows, "COLUMNS": config.columns, **_launch.OPTIONS}


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, num_groups, *_, eps, _ = arguments
    _, mean, rstd = results = arguments.allocate()
    if input.numel() == 0:
        mean.zero_()
        rstd.fill_(0.0 if eps == 0 else eps**-0.5)
        return results
    call = _GroupNormCall.of(input, num_groups)
    sizes = call.channels, call.positions
    with _device.on(input.device):
        if _forward_on_chip(call, arguments, results):
            return results
        config, grid, options = call.blocks()
        partial_moments = input.new_empty((call.batch * config.splits * call.channels * 3,), dtype=torch.float32)
        group_norm_moments_kernel[grid](call.input, partial_moments, *sizes, *_partition(config), **options)
        group_norm_combine_moments_kernel[(call.batch * num_groups,)](
            partial_moments, mean, rstd, *sizes, config.split_positions, config.splits, num_groups, call.width, eps,
            BLOCK=PARTIALS, **_launch.OPTIONS,
        )  # fmt: skip
        _forward_in_splits(call, arguments, results)
    return results


@_device.implements(ops.recompute)
def _recompute(arguments: ops.RecomputeArguments) -> torch.Tensor:
    output = arguments.allocate()
    _write_output(arguments, output)
    return output


def _write_output(arguments: ops.RecomputeArguments, output: torch.Tensor) -> None:
    """Writes the output of the forward pass, which is dense in the layout of the input, by its kernel, so that the result is the same to
    the last bit: the one that keeps a group on chip, which computes the statistics again, or the one that reads them."""
    if output.numel() == 0:
        return
    forward = arguments.forward
    results = ops.ForwardResults(output, torch.empty_like(arguments.mean), torch.empty_like(arguments.rstd))
    call = _GroupNormCall.of(arguments.input, arguments.num_groups)
    with _device.on(arguments.input.device):
        if not _forward_on_chip(call, forward, results):
            _forward_in_splits(call, forward, results._replace(mean=arguments.mean, rstd=arguments.rstd))


def _partition(config) -> tuple[int, int, int]:
    return config.split_positions, config.tiles, config.splits


def _forward_on_chip(call: _GroupNormCall, arguments: ops.ForwardArguments, results: ops.ForwardResults) -> bool:
    """Computes the results by the kernel that keeps a group on chip; False where that is not possible."""
    group_options = call.group_options(FORWARD_LIMITS)
    if group_options is None:
        return False
    group_norm_forward_group_kernel[(call.batch * call.groups,)](
        call.input, *results, *contiguous(arguments.weight, arguments.bias), call.channels, call.positions, call.groups, arguments.eps,
        ACTIVATION=arguments.activation, **group_options,
    )  # fmt: skip
    return True


def _forward_in_splits(call: _GroupNormCall, arguments: ops.ForwardArguments, results: ops.ForwardResults) -> None:
    """Computes the output from mean and rstd."""
    config, grid, options = call.blocks()
    group_norm_forward_kernel[grid](
        call.input, *results, *contiguous(arguments.weight, arguments.bias), call.channels, call.positions, *_partition(config),
        call.groups, call.width, ACTIVATION=arguments.activation, **options,
    )  # fmt: skip


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    grad_output, input, mean, rstd, weight, bias, num_groups, activation = arguments
    results = grad_input, grad_weight, grad_bias = arguments.allocate()
    if input.numel() == 0:
        grad_weight.zero_()
        grad_bias.zero_()
        return results
    call = _GroupNormCall.of(input, num_groups)
    grad_output = call.in_same_layout(grad_output)
    parameters = contiguous(weight, bias)
    has_parameters = weight is not None or bias is not None
    sample_sums = input.new_empty((call.batch * call.channels * 2,), dtype=torch.float64) if has_parameters else None
    sizes = call.channels, call.positions
    with _device.on(input.device):
        group_options = call.group_options(backward_limits(call.channels_last, input.element_size()))
        if group_options is not None:
            group_norm_backward_group_kernel[(call.batch * num_groups,)](
                grad_output, call.input, grad_input, mean, rstd, *parameters, sample_sums, *sizes, num_groups,
                ACTIVATION=activation, **group_options,
            )  # fmt: skip
        else:
            _backward_in_splits(call, grad_output, grad_input, mean, rstd, parameters, sample_sums, activation)
        if has_parameters:
            group_norm_parameter_gradients_kernel[(triton.cdiv(call.channels, CHANNELS),)](
                sample_sums, None if weight is None else grad_weight, None if bias is None else grad_bias, call.batch, call.channels,
                ROWS=SAMPLES, COLUMNS=CHANNELS, **_launch.OPTIONS,
            )  # fmt: skip
    return results


@_device.implements(ops.restoring_backward)
def _restoring_backward(arguments: ops.RestoringBackwardArguments) -> ops.BackwardResults:
    results, grad_output = _backward(arguments.backward), arguments.grad_output
    if grad_output.stride() == results.grad_input.stride():
        _write_output(arguments.recompute, grad_output)
    else:
        grad_output.copy_(_recompute(arguments.recompute))
    return results


def _backward_in_splits(call, grad_output, grad_input, mean, rstd, parameters, sample_sums, activation):
    """Launches the three kernels for groups that do not fit on chip."""
    config, grid, options = call.blocks()
    sizes = call.channels, call.positions
    partition = config.split_positions, config.tiles, config.splits, call.groups, call.width
    partial_sums = grad_input.new_empty((call.batch * config.splits * call.channels * 2,), dtype=torch.float32)
    statistics_gradient = grad_input.new_empty((call.batch * call.groups * 2,), dtype=torch.float32)
    group_norm_gradient_sums_kernel[grid](
        grad_output, call.input, partial_sums, mean, rstd, *parameters, *sizes, *partition, ACTIVATION=activation, **options
    )
    columns = triton.next_power_of_2(call.width)
    group_norm_combine_gradients_kernel[(call.batch * call.groups,)](
        partial_sums, mean, rstd, parameters[0], statistics_gradient, sample_sums, *sizes, config.splits, call.groups, call.width,
        ROWS=max(PARTIALS // columns, 1), COLUMNS=columns, **_launch.OPTIONS,
    )  # fmt: skip
    group_norm_backward_kernel[grid](
        grad_output, call.input, grad_input, mean, rstd, *parameters, statistics_gradient, *sizes, *partition,
        ACTIVATION=activation, **options,
    )  # fmt: skip
