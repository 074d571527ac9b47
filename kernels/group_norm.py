"""GroupNorm with its activation on a GPU, contiguous or with the channels last.

A group that fits on chip is read once a pass, by one program. Larger ones are read twice: programs sum pieces of all channels, so that 32
groups do not mean 32 programs, a small launch puts the sums together in a fixed order, and a second pass applies them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fastvae._ops import NORM_ACTIVATIONS, channels_are_last, empty_in_layout
from fastvae.kernels import _device, _launch

SILU = tl.constexpr(NORM_ACTIVATIONS["silu"])

# Elements of a group that one program holds: 16 registers a thread for the input, as many for the gradient.
ON_CHIP = 2048
# With the channels last, a group has to fill the 32 bytes that memory delivers at least.
SECTOR_BYTES = 32
# The sums of so many pieces are added at once.
PIECES = 256


@dataclass(frozen=True)
class Blocks:
    """Programs take (rows, columns) positions and channels at once; a sample's positions are cut into ``splits`` pieces."""

    rows: int
    columns: int
    tiles: int
    piece: int
    splits: int


def blocks(batch: int, channels: int, positions: int, last: bool, itemsize: int, machine: _launch.Machine) -> Blocks:
    elements = _launch.elements_per_thread(itemsize) * machine.threads
    if last:
        columns = min(triton.next_power_of_2(channels), 128)
        rows = min(triton.next_power_of_2(positions), elements // columns)
    else:
        rows = min(triton.next_power_of_2(positions), elements)
        columns = min(triton.next_power_of_2(channels), elements // rows)
    tiles = triton.cdiv(channels, columns)
    splits = max(1, min(triton.cdiv(positions, rows), triton.cdiv(2 * machine.programs, batch * tiles)))
    piece = triton.cdiv(triton.cdiv(positions, splits), rows) * rows
    return Blocks(rows, columns, tiles, piece, triton.cdiv(positions, piece))


def fits_on_chip(width: int, positions: int, last: bool, itemsize: int) -> bool:
    """Whether one program takes a group, of ``width`` channels."""
    wide_enough = not last or positions == 1 or width * itemsize >= SECTOR_BYTES
    return wide_enough and triton.next_power_of_2(width) * triton.next_power_of_2(positions) <= ON_CHIP


@triton.jit
def place(position, channel, positions, channels, LAST: tl.constexpr):
    """Where in a sample the elements at (position, channel) lie."""
    if LAST:
        return position[:, None] * channels + channel[None, :]
    else:
        return channel[None, :] * positions + position[:, None]


@triton.jit
def load(pointers, mask):
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def activate(u, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        return u / (1.0 + tl.exp(-u))
    else:
        return u


@triton.jit
def gradient_of_affine(u, grad, ACTIVATION: tl.constexpr):
    """The gradient at u of the activation's incoming one."""
    if ACTIVATION == SILU:
        decay = tl.exp(-u)
        sigmoid = 1.0 / (1.0 + decay)
        # 1 - sigmoid, without a difference; where e^-u is infinite, it is 1.
        complement = tl.where(u < -80.0, 1.0, decay * sigmoid)
        return grad * sigmoid * tl.fma(u, complement, 1.0)
    else:
        return grad


@triton.jit
def load_parameter(pointer, channel, mask, DEFAULT: tl.constexpr):
    if pointer is None:
        return tl.full(channel.shape, DEFAULT, tl.float32)
    else:
        return tl.load(pointer + channel, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def in_two(mean):
    """A float64 as the sum of two float32."""
    high = mean.to(tl.float32)
    return high, (mean - high.to(tl.float64)).to(tl.float32)


@triton.jit
def this_piece(positions, piece, tiles, splits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program: the sample, the number of the piece, its first channel, its first position and the one behind its last."""
    program = tl.program_id(0)
    sample, split = (program // tiles // splits).to(tl.int64), (program // tiles % splits).to(tl.int64)
    first = tl.multiple_of(split * piece, ROWS)
    return sample, split, (program % tiles).to(tl.int64) * COLUMNS, first, tl.minimum(first + piece, positions)


@triton.jit
def this_group(groups):
    """The number of this program, its sample and its group."""
    program = tl.program_id(0)
    return program.to(tl.int64), (program // groups).to(tl.int64), (program % groups).to(tl.int64)


@triton.jit
def rows_from(start, sample, channel, end_channel, channels, positions, LAST: tl.constexpr, ROWS: tl.constexpr):
    """Where the elements of ``channel`` from position ``start`` on lie, and which there are, of the channels before ``end_channel``.

    Only the last rows of a sample are fewer than ROWS. That ``positions`` may be a multiple of 16 is known when this is compiled.
    """
    position = tl.cast(start, tl.int64) + tl.arange(0, ROWS)
    mask = (position < positions)[:, None] & (channel < end_channel)[None, :]
    return sample * channels * positions + place(position, channel, positions, channels, LAST), mask


@triton.jit
def load_affine(statistics, parameters, group, channel, mask):
    """What normalises channels of the groups: u = (x - centre) * scale + offset."""
    centre, rest = in_two(tl.load(statistics[0] + group, mask=mask, other=0.0))
    scale = tl.load(statistics[1] + group, mask=mask, other=0.0).to(tl.float32) * load_parameter(parameters[0], channel, mask, 1.0)
    return centre, scale, load_parameter(parameters[1], channel, mask, 0.0) - rest * scale


@triton.jit
def load_gradients(input, grad_output, at, mask, affine, ACTIVATION: tl.constexpr):
    """What the elements differ from their centre, and the gradient of u."""
    centre, scale, offset = affine
    difference = load(input + at, mask) - centre[None, :]
    return difference, gradient_of_affine(difference * scale[None, :] + offset[None, :], load(grad_output + at, mask), ACTIVATION)


@triton.jit(do_not_specialize=["piece", "tiles", "splits"])
def group_norm_moments_kernel(
    input, slots, channels, positions, piece, tiles, splits,
    LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each channel in each piece: a shift, the sum of what the elements differ from it, and their squared deviations from their mean.

    The shift is the mean of the piece's first rows, so that the squares do not cancel. Grid: (tiles * splits * batch,).
    """
    sample, split, first_channel, first, end = this_piece(positions, piece, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    at, mask = rows_from(first, sample, channel, channels, channels, positions, LAST, ROWS)
    values = load(input + at, mask)
    shift = tl.sum(values, axis=0) / tl.minimum(end - first, ROWS).to(tl.float32)
    total, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        at, mask = rows_from(start, sample, channel, channels, channels, positions, LAST, ROWS)
        difference = tl.where(mask, load(input + at, mask) - shift[None, :], 0.0)
        total += difference
        squares = tl.fma(difference, difference, squares)
    total_of_rows = tl.sum(total, axis=0)
    deviations = tl.sum(squares, axis=0) - total_of_rows * (total_of_rows / (end - first).to(tl.float32))
    slot = ((sample * splits + split) * channels + channel) * 3
    tl.store(slots + slot, shift, mask=channel < channels)
    tl.store(slots + slot + 1, total_of_rows, mask=channel < channels)
    tl.store(slots + slot + 2, tl.where(deviations < 0.0, 0.0, deviations), mask=channel < channels)


@triton.jit
def load_moments(slots, index, mask, first, channels, positions, piece, splits, width):
    """(elements, mean, squared deviations) of the pieces' channels ``index`` of a group, in float64."""
    split = index // width
    slot = slots + (first + split.to(tl.int64) * channels + index % width) * 3
    elements = tl.minimum(positions - split.to(tl.int64) * piece, piece).to(tl.float64)
    shift, total = tl.load(slot, mask=mask, other=0.0).to(tl.float64), tl.load(slot + 1, mask=mask, other=0.0).to(tl.float64)
    mean = shift + total / elements
    return tl.where(mask, elements, 0.0), tl.where(mask, mean, 0.0), tl.load(slot + 2, mask=mask, other=0.0).to(tl.float64)


@triton.jit(do_not_specialize=["piece", "splits"])
def group_norm_combine_moments_kernel(
    slots, mean, rstd, channels, positions, piece, splits, groups, width, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Mean and 1 / standard deviation of each group from those of its pieces. Grid: (batch * groups,)."""
    program, sample, group = this_group(groups)
    first = sample * splits * channels + group * width
    count, size = splits * width, tl.cast(positions, tl.float64) * width
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        elements, means, _ = load_moments(slots, index, index < count, first, channels, positions, piece, splits, width)
        total += elements * means
    group_mean = tl.sum(total, axis=0) / size
    for start in range(0, count, BLOCK):
        index = start + tl.arange(0, BLOCK)
        elements, means, deviations = load_moments(slots, index, index < count, first, channels, positions, piece, splits, width)
        squares += deviations + elements * (means - group_mean) * (means - group_mean)
    tl.store(mean + program, group_mean)
    tl.store(rstd + program, 1.0 / tl.sqrt(tl.sum(squares, axis=0) / size + eps))


@triton.jit(do_not_specialize=["piece", "tiles", "splits"])
def group_norm_forward_kernel(
    input, output, mean, rstd, weight, bias, channels, positions, piece, tiles, splits, groups, width,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The output from the statistics. Grid: (tiles * splits * batch,)."""
    sample, _, first_channel, first, end = this_piece(positions, piece, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    group = sample * groups + channel.to(tl.int32) // width
    centre, scale, offset = load_affine((mean, rstd), (weight, bias), group, channel, channel < channels)
    for start in range(first, end, ROWS):
        at, mask = rows_from(start, sample, channel, channels, channels, positions, LAST, ROWS)
        u = (load(input + at, mask) - centre[None, :]) * scale[None, :] + offset[None, :]
        tl.store(output + at, activate(u, ACTIVATION), mask=mask)


@triton.jit
def group_norm_forward_group_kernel(
    input, output, mean, rstd, weight, bias, channels, positions, groups, eps,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics and output of a group that fits on chip. Grid: (batch * groups,)."""
    program, sample, group = this_group(groups)
    channel, end_channel = group * WIDTH + tl.arange(0, COLUMNS), (group + 1) * WIDTH
    at, mask = rows_from(0, sample, channel, end_channel, channels, positions, LAST, ROWS)
    values = load(input + at, mask)
    size = tl.cast(positions, tl.float32) * WIDTH
    centre = tl.sum(values) / size
    difference = tl.where(mask, values - centre, 0.0)
    # What rounding lost of the mean.
    rest = tl.sum(difference) / size
    deviation = tl.where(mask, difference - rest, 0.0)
    group_rstd = 1.0 / tl.sqrt(tl.sum(deviation * deviation) / size + eps)
    tl.store(mean + program, centre.to(tl.float64) + rest.to(tl.float64))
    tl.store(rstd + program, group_rstd.to(tl.float64))
    w, b = load_parameter(weight, channel, channel < end_channel, 1.0), load_parameter(bias, channel, channel < end_channel, 0.0)
    u = deviation * (group_rstd * w)[None, :] + b[None, :]
    tl.store(output + at, activate(u, ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["piece", "tiles", "splits"])
def group_norm_gradient_sums_kernel(
    grad_output, input, slots, mean, rstd, weight, bias, channels, positions, piece, tiles, splits, groups, width,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of each channel in each piece the sums of du and of du * (x - centre). Grid: (tiles * splits * batch,)."""
    sample, split, first_channel, first, end = this_piece(positions, piece, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    group = sample * groups + channel.to(tl.int32) // width
    affine = load_affine((mean, rstd), (weight, bias), group, channel, channel < channels)
    plain, weighted = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, end, ROWS):
        at, mask = rows_from(start, sample, channel, channels, channels, positions, LAST, ROWS)
        difference, du = load_gradients(input, grad_output, at, mask, affine, ACTIVATION)
        du = tl.where(mask, du, 0.0)
        plain += du
        weighted = tl.fma(du, difference, weighted)
    slot = ((sample * splits + split) * channels + channel) * 2
    tl.store(slots + slot, tl.sum(plain, axis=0), mask=channel < channels)
    tl.store(slots + slot + 1, tl.sum(weighted, axis=0), mask=channel < channels)


@triton.jit(do_not_specialize=["splits"])
def group_norm_combine_gradients_kernel(
    slots, mean, rstd, weight, through, sums, channels, positions, splits, groups, width, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What comes through the statistics of each group (slope and constant), and for each channel of a sample, where ``sums`` is not None,
    those of du times the normalised input and of du. Grid: (batch * groups,)."""
    program, sample, group = this_group(groups)
    column = tl.arange(0, COLUMNS)
    channel, mask = group * width + column, column < width
    plain, weighted = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.float64)
    for split in range(splits):
        slot = slots + ((sample * splits + split) * channels + channel) * 2
        plain += tl.load(slot, mask=mask, other=0.0).to(tl.float64)
        weighted += tl.load(slot + 1, mask=mask, other=0.0).to(tl.float64)
    group_rstd = tl.load(rstd + program)
    _, rest = in_two(tl.load(mean + program))
    normal = group_rstd * (weighted - rest.to(tl.float64) * plain)
    if sums is not None:
        of_sample = (sample * channels + channel) * 2
        tl.store(sums + of_sample, normal, mask=mask)
        tl.store(sums + of_sample + 1, plain, mask=mask)
    w = load_parameter(weight, channel, mask, 1.0).to(tl.float64)
    size = tl.cast(positions, tl.float64) * width
    slope = -group_rstd * group_rstd * tl.sum(w * normal, axis=0) / size
    constant = -group_rstd * tl.sum(w * plain, axis=0) / size - rest.to(tl.float64) * slope
    tl.store(through + program * 2, slope.to(tl.float32))
    tl.store(through + program * 2 + 1, constant.to(tl.float32))


@triton.jit(do_not_specialize=["batch"])
def group_norm_parameter_gradients_kernel(sums, grad_weight, grad_bias, batch, channels, COLUMNS: tl.constexpr):
    """The gradients of weight and bias, summed over the batch, where they are not None. Grid: (channels / COLUMNS,)."""
    channel = tl.cast(tl.program_id(0), tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = channel < channels
    normal, plain = tl.zeros([COLUMNS], tl.float64), tl.zeros([COLUMNS], tl.float64)
    for sample in range(batch):
        of_sample = sums + (tl.cast(sample, tl.int64) * channels + channel) * 2
        normal += tl.load(of_sample, mask=mask, other=0.0)
        plain += tl.load(of_sample + 1, mask=mask, other=0.0)
    if grad_weight is not None:
        tl.store(grad_weight + channel, normal.to(tl.float32), mask=mask)
    if grad_bias is not None:
        tl.store(grad_bias + channel, plain.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["piece", "tiles", "splits"])
def group_norm_backward_kernel(
    grad_output, input, grad_input, mean, rstd, weight, bias, through, channels, positions, piece, tiles, splits, groups, width,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the input. Grid: (tiles * splits * batch,)."""
    sample, _, first_channel, first, end = this_piece(positions, piece, tiles, splits, ROWS, COLUMNS)
    channel = first_channel + tl.arange(0, COLUMNS)
    group = sample * groups + channel.to(tl.int32) // width
    affine = load_affine((mean, rstd), (weight, bias), group, channel, channel < channels)
    slope = tl.load(through + group * 2, mask=channel < channels, other=0.0)
    constant = tl.load(through + group * 2 + 1, mask=channel < channels, other=0.0)
    for start in range(first, end, ROWS):
        at, mask = rows_from(start, sample, channel, channels, channels, positions, LAST, ROWS)
        difference, du = load_gradients(input, grad_output, at, mask, affine, ACTIVATION)
        gradient = du * affine[1][None, :] + (difference * slope[None, :] + constant[None, :])
        tl.store(grad_input + at, gradient, mask=mask)


@triton.jit
def group_norm_backward_group_kernel(
    grad_output, input, grad_input, mean, rstd, weight, bias, sums, channels, positions, groups,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the input and, where ``sums`` is not None, the sums of a group that fits on chip. Grid: (batch * groups,)."""
    program, sample, group = this_group(groups)
    channel, end_channel = group * WIDTH + tl.arange(0, COLUMNS), (group + 1) * WIDTH
    at, mask = rows_from(0, sample, channel, end_channel, channels, positions, LAST, ROWS)
    centre, rest = in_two(tl.load(mean + program))
    group_rstd = tl.load(rstd + program).to(tl.float32)
    normal = tl.where(mask, ((load(input + at, mask) - centre) - rest) * group_rstd, 0.0)
    w, b = load_parameter(weight, channel, channel < end_channel, 1.0), load_parameter(bias, channel, channel < end_channel, 0.0)
    du = gradient_of_affine(normal * w[None, :] + b[None, :], load(grad_output + at, mask), ACTIVATION)
    du = tl.where(mask, du, 0.0)
    plain, weighted = tl.sum(du, axis=0), tl.sum(du * normal, axis=0)
    if sums is not None:
        of_sample = (sample * channels + channel) * 2
        tl.store(sums + of_sample, weighted.to(tl.float64), mask=channel < end_channel)
        tl.store(sums + of_sample + 1, plain.to(tl.float64), mask=channel < end_channel)
    size = tl.cast(positions, tl.float32) * WIDTH
    common, projection = tl.sum(w * plain) / size, tl.sum(w * weighted) / size
    gradient = group_rstd * (du * w[None, :] - common - normal * projection)
    tl.store(grad_input + at, gradient, mask=mask)


@dataclass(frozen=True)
class _Problem:
    """A call's tensors as the kernels take them."""

    input: torch.Tensor
    groups: int
    last: bool

    @classmethod
    def of(cls, input, groups):
        last = channels_are_last(input)
        return cls(input if last else input.contiguous(), groups, last)

    @property
    def batch(self) -> int:
        return self.input.shape[0]

    @property
    def channels(self) -> int:
        return self.input.shape[1]

    @property
    def width(self) -> int:
        return self.channels // self.groups

    @property
    def positions(self) -> int:
        return self.input.shape[2:].numel()

    @property
    def on_chip(self) -> bool:
        return fits_on_chip(self.width, self.positions, self.last, self.input.element_size())

    def alike(self, tensor):
        """``tensor`` in the layout of the input."""
        fits = tensor.movedim(1, -1).is_contiguous() if self.last else tensor.is_contiguous()
        return tensor if fits else empty_in_layout(self.input).copy_(tensor)

    def group_block(self) -> dict:
        """The options of the kernels that hold a group."""
        rows, columns = triton.next_power_of_2(self.positions), triton.next_power_of_2(self.width)
        return {"LAST": self.last, "ROWS": rows, "COLUMNS": columns, "WIDTH": self.width, **_launch.OPTIONS}

    def blocks(self):
        machine = _device.machine(self.input.device)
        config = blocks(self.batch, self.channels, self.positions, self.last, self.input.element_size(), machine)
        grid = (config.tiles * config.splits * self.batch,)
        return config, grid, {"LAST": self.last, "ROWS": config.rows, "COLUMNS": config.columns, **_launch.OPTIONS}


@_device.implements("group_norm_forward")
def _forward(input, num_groups, weight, bias, eps, activation):
    problem = _Problem.of(input, num_groups)
    output = empty_in_layout(input)
    mean, rstd = (input.new_empty((problem.batch, num_groups), dtype=torch.float64) for _ in range(2))
    if input.numel() == 0:
        return output, mean.zero_(), rstd.fill_(0.0 if eps == 0 else eps**-0.5)
    parameters = tuple(t if t is None else t.contiguous() for t in (weight, bias))
    sizes = problem.channels, problem.positions
    with _device.on(input.device):
        if problem.on_chip:
            group_norm_forward_group_kernel[(problem.batch * num_groups,)](
                problem.input, output, mean, rstd, *parameters, *sizes, num_groups, eps,
                ACTIVATION=activation, **problem.group_block(),
            )  # fmt: skip
            return output, mean, rstd
        config, grid, options = problem.blocks()
        slots = input.new_empty((problem.batch * config.splits * problem.channels * 3,), dtype=torch.float32)
        group_norm_moments_kernel[grid](problem.input, slots, *sizes, config.piece, config.tiles, config.splits, **options)
        group_norm_combine_moments_kernel[(problem.batch * num_groups,)](
            slots, mean, rstd, *sizes, config.piece, config.splits, num_groups, problem.width, eps, BLOCK=PIECES, **_launch.OPTIONS
        )
        group_norm_forward_kernel[grid](
            problem.input, output, mean, rstd, *parameters, *sizes, config.piece, config.tiles, config.splits, num_groups, problem.width,
            ACTIVATION=activation, **options,
        )  # fmt: skip
    return output, mean, rstd


@_device.implements("group_norm_backward")
def _backward(grad_output, input, mean, rstd, weight, bias, num_groups, activation):
    problem = _Problem.of(input, num_groups)
    grad_input = empty_in_layout(input)
    grad_weight, grad_bias = (input.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    if input.numel() == 0:
        return grad_input, grad_weight.zero_(), grad_bias.zero_()
    grad_output = problem.alike(grad_output)
    parameters = tuple(t if t is None else t.contiguous() for t in (weight, bias))
    learns = weight is not None or bias is not None
    sums = input.new_empty((problem.batch * problem.channels * 2,), dtype=torch.float64) if learns else None
    sizes = problem.channels, problem.positions
    with _device.on(input.device):
        if problem.on_chip:
            group_norm_backward_group_kernel[(problem.batch * num_groups,)](
                grad_output, problem.input, grad_input, mean, rstd, *parameters, sums, *sizes, num_groups,
                ACTIVATION=activation, **problem.group_block(),
            )  # fmt: skip
        else:
            _backward_in_pieces(problem, grad_output, grad_input, mean, rstd, parameters, sums, activation)
        if learns:
            columns = 128
            group_norm_parameter_gradients_kernel[(triton.cdiv(problem.channels, columns),)](
                sums, None if weight is None else grad_weight, None if bias is None else grad_bias, problem.batch, problem.channels,
                COLUMNS=columns, **_launch.OPTIONS,
            )  # fmt: skip
    return grad_input, grad_weight, grad_bias


def _backward_in_pieces(problem, grad_output, grad_input, mean, rstd, parameters, sums, activation):
    config, grid, options = problem.blocks()
    sizes = problem.channels, problem.positions
    layout = config.piece, config.tiles, config.splits, problem.groups, problem.width
    slots = grad_input.new_empty((problem.batch * config.splits * problem.channels * 2,), dtype=torch.float32)
    through = grad_input.new_empty((problem.batch * problem.groups * 2,), dtype=torch.float32)
    group_norm_gradient_sums_kernel[grid](
        grad_output, problem.input, slots, mean, rstd, *parameters, *sizes, *layout, ACTIVATION=activation, **options
    )
    group_norm_combine_gradients_kernel[(problem.batch * problem.groups,)](
        slots, mean, rstd, parameters[0], through, sums, *sizes, config.splits, problem.groups, problem.width,
        COLUMNS=triton.next_power_of_2(problem.width), **_launch.OPTIONS,
    )  # fmt: skip
    group_norm_backward_kernel[grid](
        grad_output, problem.input, grad_input, mean, rstd, *parameters, through, *sizes, *layout, ACTIVATION=activation, **options
    )
