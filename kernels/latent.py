"""Sampling and the Gaussian KL on a GPU.

An element's number decides its noise, so programs take whole tiles of 512 elements, the unit in which the noise is numbered: four streams
of 128 lanes that share their counters. Full tiles are read without masks, which keeps accesses at 16 bytes whatever the size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._index import at, common_gradient, divide, first_chunk, incoming_gradient, inside, locate, zero_outside
from fastvae.kernels._layout import matrix_rows, shared_rows
from fastvae.kernels._math import exponential
from fastvae.kernels._philox import LANES, STREAMS, TILE, draw_words, normal, zero_laid_out_like
from fastvae.kernels._reduce import is_last, store_row_sums, sum_programs, sum_slots
from fastvae.ops import latent as ops
from fastvae.ops._results import REDUCTIONS, reduction_scale


@triton.jit
def clamp(logvar, limits):
    return tl.clamp(logvar.to(tl.float32), limits[0], limits[1], propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def variance_ratio(difference):
    """The ratio of two variances from the difference d of their logarithms: its root, exp(d) - 1, and exp(d) - 1 - d, without the
    cancellation of the differences near d = 0 (see csrc/common/latent.h)."""
    root, excess, divergence = exponential(0.5 * difference)
    square = excess * excess
    return root, tl.fma(2.0, excess, square), tl.fma(2.0, divergence, square)


@triton.jit
def kl_standard(mu, divergence):
    """KL(N(mu, exp(logvar)) || N(0, 1)) from the :func:`variance_ratio` of logvar."""
    return 0.5 * tl.fma(mu, mu, divergence)


@triton.jit
def kl_prior(mu, logvar, prior_mu, prior_logvar):
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))."""
    delta, ratio = mu - prior_mu, variance_ratio(logvar - prior_logvar)
    return 0.5 * tl.fma(delta * delta, tl.exp(-prior_logvar), ratio[2])


@triton.jit
def kl_prior_gradient(mu, logvar, prior_mu, prior_logvar):
    """d KL / d (mu, logvar, prior_mu, prior_logvar)."""
    delta, ratio = mu - prior_mu, variance_ratio(logvar - prior_logvar)
    scaled = delta * tl.exp(-prior_logvar)
    return scaled, 0.5 * ratio[1], -scaled, -0.5 * tl.fma(delta, scaled, ratio[1])


@triton.jit
def gradient_inside(gradient, logvar, limits):
    """Outside its limits a log variance has no gradient."""
    return tl.where((logvar < limits[0]) | (logvar > limits[1]), 0.0, gradient)


@triton.jit
def stream_offsets(j, TILES: tl.constexpr):
    """The elements of stream ``j`` in a block of tiles."""
    return tl.arange(0, TILES)[:, None] * TILE + (tl.arange(0, LANES)[None, :] + j * LANES)


@triton.jit
def place_stream(start, inner, j, TILES: tl.constexpr):
    return locate(start, stream_offsets(j, TILES), inner, TILES * TILE)


@triton.jit
def place_streams(start, inner, TILES: tl.constexpr):
    """Where the four streams' elements of the tiles from ``start`` lie, see :func:`locate`."""
    return (
        place_stream(start, inner, 0, TILES),
        place_stream(start, inner, 1, TILES),
        place_stream(start, inner, 2, TILES),
        place_stream(start, inner, 3, TILES),
    )


@triton.jit
def load_stream(pointer, place, stride, start, n, j, MASKED: tl.constexpr, TILES: tl.constexpr):
    return tl.load(at(pointer, place[0], place[1], place[2], stride), mask=inside(stream_offsets(j, TILES), n - start, MASKED))


@triton.jit
def load_streams(pointer, places, stride, start, n, MASKED: tl.constexpr, TILES: tl.constexpr):
    """All four streams at once, so that the loads are under way before the noise is drawn."""
    return (
        load_stream(pointer, places[0], stride, start, n, 0, MASKED, TILES),
        load_stream(pointer, places[1], stride, start, n, 1, MASKED, TILES),
        load_stream(pointer, places[2], stride, start, n, 2, MASKED, TILES),
        load_stream(pointer, places[3], stride, start, n, 3, MASKED, TILES),
    )


@triton.jit
def sample_starts(sample, n, ALIGNED: tl.constexpr):
    """The first element of a sample in z, eps and the noise: a multiple of 512, with ALIGNED."""
    start = tl.cast(sample, tl.int64) * n
    if ALIGNED:
        return tl.multiple_of(start, TILE)
    else:
        return start


@triton.jit
def noise_streams(key, eps, sample_start, start, n, like, MASKED: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    """What :func:`noise_stream` makes noise of: the words of the tiles, or, without a key, the noise that is given."""
    if key is None:
        return load_streams(eps + sample_start, place_streams(start, None, TILES), None, start, n, MASKED, TILES)
    else:
        return draw_words(key, sample_start + start, zero_laid_out_like(like), ALIGNED, TILES)


@triton.jit
def noise_stream(streams, key, j: tl.constexpr, ALIGNED: tl.constexpr):
    if key is None:
        return streams[j].to(tl.float32)
    else:
        return normal(streams, j, ALIGNED)


@triton.jit
def forward_tiles(
    posterior, inner, strides, limits, source, outputs, kl, start, n, sample, MASKED: tl.constexpr, TOTAL: tl.constexpr,
    ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """The tiles from element ``start`` of one sample: writes z, the noise and, elementwise, the KL, or returns the KL's sum by lane."""
    mu, logvar, prior_mu, prior_logvar = posterior
    key, eps = source
    z, kept = outputs
    sample_start = sample_starts(sample, n, ALIGNED)
    places = place_streams(start, inner, TILES)
    xs = load_streams(mu, places, strides[0], start, n, MASKED, TILES)
    ys = load_streams(logvar, places, strides[1], start, n, MASKED, TILES)
    if z is not None:
        streams = noise_streams(key, eps, sample_start, start, n, xs[0], MASKED, ALIGNED, TILES)
    total = tl.zeros([TILES, LANES], tl.float32)
    for j in tl.static_range(STREAMS):
        offset = stream_offsets(j, TILES)
        mask = inside(offset, n - start, MASKED)
        x, y = xs[j].to(tl.float32), clamp(ys[j], limits)
        ratio = variance_ratio(y)
        if z is not None:
            noise = noise_stream(streams, key, j, ALIGNED)
            tl.store(z + sample_start + start + offset, tl.fma(ratio[0], noise, x), mask=mask)
            if kept is not None:
                tl.store(kept + sample_start + start + offset, noise, mask=mask)
        if kl is not None:
            if prior_mu is None:
                elements = kl_standard(x, ratio[2])
            else:
                p = load_stream(prior_mu, places[j], strides[2], start, n, j, MASKED, TILES).to(tl.float32)
                q = clamp(load_stream(prior_logvar, places[j], strides[3], start, n, j, MASKED, TILES), limits)
                elements = kl_prior(x, y, p, q)
            if TOTAL:
                total += zero_outside(elements, mask)
            elif sample == 0:
                tl.store(kl + start + offset, elements, mask=mask)
    return total


@triton.jit(do_not_specialize=["n"])
def latent_forward_kernel(
    mu, logvar, prior_mu, prior_logvar, eps, seed, z, kept, kl, slots, ticket,
    n, inner, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, clamp_min, clamp_max, scale,
    TOTAL: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``z``, the noise (``kept``) and ``kl`` where they are not None, the last elementwise or, with TOTAL, summed.

    Grid: (samples, programs).
    """
    BLOCK: tl.constexpr = TILES * TILE
    sample, program, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    posterior, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    limits, outputs = (clamp_min, clamp_max), (z, kept)
    source = (seed, eps) if seed is None else (tl.load(seed), eps)
    full = n // BLOCK
    total, last_total = tl.zeros([TILES, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        total += forward_tiles(posterior, inner, strides, limits, source, outputs, kl, start, n, sample, False, TOTAL, ALIGNED, TILES)
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, TILE), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * TILE
        last_total += forward_tiles(posterior, inner, strides, limits, source, outputs, kl, start, n, sample, True, TOTAL, ALIGNED, 1)
    if TOTAL:  # noqa: SIM102 (known when the kernel is compiled, unlike the sample)
        if sample == 0:
            tl.store(slots + program, tl.sum(total) + tl.sum(last_total))
            if is_last(ticket, programs):
                tl.store(kl, sum_programs(slots, programs) * scale)


@triton.jit
def kl_block(posterior, strides, limits, row, column, mask):
    """The KL of a block of a matrix, given its rows (int64) and columns; 0 outside."""
    mu, logvar, prior_mu, prior_logvar = posterior
    x = tl.load(mu + row * strides[0] + column, mask=mask).to(tl.float32)
    y = clamp(tl.load(logvar + row * strides[1] + column, mask=mask), limits)
    if prior_mu is None:
        return tl.where(mask, kl_standard(x, variance_ratio(y)[2]), 0.0)
    else:
        p = tl.load(prior_mu + row * strides[2] + column, mask=mask).to(tl.float32)
        q = clamp(tl.load(prior_logvar + row * strides[3] + column, mask=mask), limits)
        return tl.where(mask, kl_prior(x, y, p, q), 0.0)


@triton.jit(do_not_specialize=["rows"])
def latent_rows_kernel(
    mu, logvar, prior_mu, prior_logvar, active, kl, slots, ticket,
    rows, columns, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, clamp_min, clamp_max, free_bits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The KL of each row; a column that is not ``active``, where that is not None, counts ``free_bits``. Grid: (groups, splits)."""
    posterior, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(tl.program_id(1), tl.int64) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        elements = kl_block(posterior, strides, (clamp_min, clamp_max), row[:, None], column[None, :], mask)
        if active is not None:
            above = tl.load(active + column, mask=column < columns, other=0) != 0
            elements = tl.where(above[None, :] | (mask == 0), elements, free_bits)
        total += elements
    store_row_sums(tl.sum(total, axis=1), kl, slots, ticket, row, rows, SPLIT)


@triton.jit(do_not_specialize=["rows"])
def latent_columns_kernel(
    mu, logvar, prior_mu, prior_logvar, active, kl, slots, ticket,
    rows, columns, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, clamp_min, clamp_max, free_bits, scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Which columns have a mean KL above ``free_bits`` and, where ``kl`` is not None, the sum in which the others count ``free_bits`` an
    element. Grid: (groups, splits)."""
    posterior, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    split, splits = tl.cast(tl.program_id(1), tl.int64), tl.num_programs(1)
    column = tl.cast(tl.program_id(0), tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(split * ROWS, rows, splits * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        total += kl_block(posterior, strides, (clamp_min, clamp_max), row[:, None], column[None, :], mask)
    tl.store(slots + split * columns + column, tl.sum(total, axis=0), mask=column < columns)
    if is_last(ticket, tl.num_programs(0) * splits):
        total_kl = tl.zeros([COLUMNS], tl.float32)
        for first_column in range(0, columns, COLUMNS):
            every_column = first_column + tl.arange(0, COLUMNS)
            present = every_column < columns
            column_kl = sum_slots(slots, every_column, present, splits, columns, ROWS, COLUMNS)
            # A NaN counts as above: it stays.
            above = (column_kl / rows <= free_bits) == 0
            tl.store(active + every_column, above, mask=present)
            total_kl += tl.where(present, tl.where(above, column_kl, free_bits * rows), 0.0)
        if kl is not None:
            tl.store(kl, tl.sum(total_kl) * scale)


@triton.jit
def z_gradients(grad_z, source, sample, start, n, MASKED: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    """The gradient of z, and what :func:`noise_stream` makes noise of, for one sample."""
    sample_start = sample_starts(sample, n, ALIGNED)
    gradients = load_streams(grad_z + sample_start, place_streams(start, None, TILES), None, start, n, MASKED, TILES)
    key, eps = source
    return gradients, noise_streams(key, eps, sample_start, start, n, gradients[0], MASKED, ALIGNED, TILES)


@triton.jit
def add_sample(sums, gradients, streams, key, ALIGNED: tl.constexpr):
    """Adds one sample's gradients to the first four sums, and their products with the noise to the last four."""
    g0, g1, g2, g3 = gradients[0].to(tl.float32), gradients[1].to(tl.float32), gradients[2].to(tl.float32), gradients[3].to(tl.float32)
    return (
        sums[0] + g0,
        sums[1] + g1,
        sums[2] + g2,
        sums[3] + g3,
        tl.fma(g0, noise_stream(streams, key, 0, ALIGNED), sums[4]),
        tl.fma(g1, noise_stream(streams, key, 1, ALIGNED), sums[5]),
        tl.fma(g2, noise_stream(streams, key, 2, ALIGNED), sums[6]),
        tl.fma(g3, noise_stream(streams, key, 3, ALIGNED), sums[7]),
    )


@triton.jit
def where_active(weight, active, start, offset, mask, per_sample, BOUND: tl.constexpr):
    """``weight``, or 0 in the dimensions that free bits cover."""
    if active is None:
        return weight
    else:
        _, _, column = divide(start, offset, per_sample, BOUND)
        return tl.where(tl.load(active + column, mask=mask) != 0, weight, 0.0)


@triton.jit
def backward_tiles(
    posterior, inner, strides, limits, source, grad_z, grad_kl, common, active, grads, start, n, samples, per_sample,
    MASKED: tl.constexpr, REDUCTION: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    mu, logvar, prior_mu, prior_logvar = posterior
    grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar = grads
    key = source[0]
    places = place_streams(start, inner, TILES)
    ys = load_streams(logvar, places, strides[1], start, n, MASKED, TILES)
    if grad_z is not None:
        if samples is None:
            gradients, streams = z_gradients(grad_z, source, 0, start, n, MASKED, ALIGNED, TILES)
        else:
            zero = tl.zeros([TILES, LANES], tl.float32)
            sums = (zero, zero, zero, zero, zero, zero, zero, zero)
            for sample in range(0, samples):
                gradients, streams = z_gradients(grad_z, source, sample, start, n, MASKED, ALIGNED, TILES)
                sums = add_sample(sums, gradients, streams, key, ALIGNED)
    for j in tl.static_range(STREAMS):
        offset = stream_offsets(j, TILES)
        mask = inside(offset, n - start, MASKED)
        raw = ys[j].to(tl.float32)
        y = clamp(raw, limits)
        ratio = variance_ratio(y)
        to_mu, to_logvar = tl.zeros([TILES, LANES], tl.float32), tl.zeros([TILES, LANES], tl.float32)
        if grad_z is not None:
            if samples is None:
                to_mu = gradients[j].to(tl.float32)
                to_logvar = 0.5 * ratio[0] * (to_mu * noise_stream(streams, key, j, ALIGNED))
            else:
                to_mu, to_logvar = sums[j], 0.5 * ratio[0] * sums[4 + j]
        if grad_kl is not None:
            weight = incoming_gradient(grad_kl, start, offset, mask, per_sample, common, REDUCTION, TILES * TILE)
            weight = where_active(weight, active, start, offset, mask, per_sample, TILES * TILE)
            x = load_stream(mu, places[j], strides[0], start, n, j, MASKED, TILES).to(tl.float32)
            if prior_mu is None:
                to_mu = tl.fma(weight, x, to_mu)
                to_logvar = tl.fma(0.5 * weight, ratio[1], to_logvar)
            else:
                p = load_stream(prior_mu, places[j], strides[2], start, n, j, MASKED, TILES).to(tl.float32)
                raw_q = load_stream(prior_logvar, places[j], strides[3], start, n, j, MASKED, TILES).to(tl.float32)
                gradient = kl_prior_gradient(x, y, p, clamp(raw_q, limits))
                to_mu = tl.fma(weight, gradient[0], to_mu)
                to_logvar = tl.fma(weight, gradient[1], to_logvar)
                tl.store(grad_prior_mu + start + offset, weight * gradient[2], mask=mask)
                tl.store(grad_prior_logvar + start + offset, gradient_inside(weight * gradient[3], raw_q, limits), mask=mask)
        tl.store(grad_mu + start + offset, to_mu, mask=mask)
        tl.store(grad_logvar + start + offset, gradient_inside(to_logvar, raw, limits), mask=mask)


@triton.jit(do_not_specialize=["n", "samples"])
def latent_backward_kernel(
    grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, eps, seed, active,
    grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar,
    n, samples, inner, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, per_sample, clamp_min, clamp_max, scale,
    REDUCTION: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Gradients from that of z, summed over ``samples`` where that is not None, and from that of the KL. Grid: (programs,)."""
    BLOCK: tl.constexpr = TILES * TILE
    program, programs = tl.program_id(0), tl.num_programs(0)
    posterior, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    limits, grads = (clamp_min, clamp_max), (grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar)
    source = (seed, eps) if seed is None else (tl.load(seed), eps)
    common = common_gradient(grad_kl, scale, REDUCTION)
    full = n // BLOCK
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        backward_tiles(
            posterior, inner, strides, limits, source, grad_z, grad_kl, common, active, grads, start, n, samples, per_sample,
            False, REDUCTION, ALIGNED, TILES,
        )  # fmt: skip
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, TILE), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * TILE
        backward_tiles(
            posterior, inner, strides, limits, source, grad_z, grad_kl, common, active, grads, start, n, samples, per_sample,
            True, REDUCTION, ALIGNED, 1,
        )  # fmt: skip


@_device.implements(ops.forward)
def _forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    mu, with_kl, reduction, free_bits = arguments.mu, arguments.with_kl, arguments.reduction, arguments.free_bits
    z, kl, active, noise = arguments.allocate()
    if mu.numel() == 0:
        return ops.ForwardResults(z, kl.zero_(), active.fill_(True), noise)
    elementwise, by_row = reduction == REDUCTIONS["none"], reduction == REDUCTIONS["sample"]
    posterior, limits, scale = arguments.posterior, arguments.limits, reduction_scale(mu.shape, reduction)
    total = with_kl and not elementwise and not by_row
    total_by_column, total_by_tile = total and active.numel() > 0, total and active.numel() == 0
    kl_by_tile = kl if total_by_tile or (with_kl and elementwise) else None
    with _device.on(mu.device):
        if active.numel():
            _sum_columns(posterior, active, kl if total_by_column else None, free_bits, limits, scale)
        if arguments.draws or kl_by_tile is not None:
            outputs = z if arguments.draws else None, noise if arguments.keep_noise else None, kl_by_tile
            _sample(arguments, outputs, total_by_tile, scale)
        if with_kl and by_row:
            _sum_rows(posterior, active if active.numel() else None, kl, free_bits, limits)
    if elementwise and active.numel():
        kl = torch.where(active, kl, free_bits)
    return ops.ForwardResults(z, kl, active, noise)


def _sample(arguments, outputs, total, scale):
    mu, limits = arguments.mu, arguments.limits
    n, samples = mu.numel(), 1 if arguments.num_samples is None else arguments.num_samples
    config = _launch.tiles(n, samples, mu.element_size(), _device.machine(mu.device))
    slots, ticket = (mu.new_empty(config.programs, dtype=torch.float32), _device.ticket(mu.device)) if total else (None, None)
    posterior, inner, strides = shared_rows(arguments.posterior)
    latent_forward_kernel[samples, config.programs](
        *posterior, _contiguous(arguments.eps), arguments.seed, *outputs, slots, ticket, n, inner, *strides, *limits, scale,
        TOTAL=total, ALIGNED=_aligned(n, samples), TILES=config.tiles, **_launch.OPTIONS,
    )  # fmt: skip


def _aligned(n: int, samples: int) -> bool:
    """Whether every sample begins with a tile of the noise."""
    return samples == 1 or n % _launch.NOISE_TILE == 0


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _sum_rows(posterior, active, kl, free_bits, limits):
    posterior, strides, rows, columns = matrix_rows(posterior)
    config = _launch.row_sums(rows, columns, posterior[0].element_size(), _device.machine(kl.device))
    split = config.splits > 1
    slots, ticket = (kl.new_empty(config.splits * rows), _device.ticket(kl.device)) if split else (None, None)
    latent_rows_kernel[config.groups, config.splits](
        *posterior, active, kl, slots, ticket, rows, columns, *strides, *limits, free_bits,
        ROWS=config.rows, COLUMNS=config.columns, SPLIT=split, **_launch.OPTIONS,
    )  # fmt: skip


def _sum_columns(posterior, active, kl, free_bits, limits, scale):
    posterior, strides, rows, columns = matrix_rows(posterior)
    config = _launch.column_sums(rows, columns, posterior[0].element_size(), _device.machine(active.device))
    slots = active.new_empty(config.splits * columns, dtype=torch.float32)
    latent_columns_kernel[config.groups, config.splits](
        *posterior, active, kl, slots, _device.ticket(active.device), rows, columns, *strides, *limits, free_bits, scale,
        ROWS=config.rows, COLUMNS=config.columns, **_launch.OPTIONS,
    )  # fmt: skip


@_device.implements(ops.backward)
def _backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, eps, seed, active, num_samples, reduction, clamp_min, clamp_max = arguments
    grads = arguments.allocate()
    n, samples = mu.numel(), 1 if num_samples is None else num_samples
    if grad_kl is None:
        # Nothing comes in for the prior, and, where z has no gradient either, for anything.
        for gradient in grads[2 if grad_z is not None else 0 :]:
            gradient.zero_()
        prior_mu = prior_logvar = None
    if n == 0 or (grad_z is None and grad_kl is None):
        return grads
    if grad_z is None:
        eps = seed = None
    posterior, inner, strides = shared_rows((mu if grad_kl is not None else None, logvar, prior_mu, prior_logvar))
    config = _launch.tiles(n, 1, mu.element_size(), _device.machine(mu.device))
    with _device.on(mu.device):
        latent_backward_kernel[(config.programs,)](
            _contiguous(grad_z), _contiguous(grad_kl), *posterior, _contiguous(eps), seed,
            active if active.numel() else None, *grads[:2], *(grads[2:] if prior_mu is not None else (None, None)),
            n, num_samples, inner, *strides, n // mu.shape[0] if mu.ndim else 1, clamp_min, clamp_max,
            reduction_scale(mu.shape, reduction),
            REDUCTION=reduction, ALIGNED=_aligned(n, samples), TILES=config.tiles, **_launch.OPTIONS,
        )  # fmt: skip
    return grads
