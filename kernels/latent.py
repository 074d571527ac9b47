"""Sampling and the Gaussian KL on a GPU.

========================  ===================  ===============================================  =====================================
kernel                    grid                 reads                                            writes
========================  ===================  ===============================================  =====================================
latent_forward_kernel     (samples, programs)  mu, logvar, prior, seed or eps                   z, noise, kl elementwise or its sum
latent_rows_kernel        (groups, splits)     mu, logvar, prior, active                        kl of each sample of the batch
latent_columns_kernel     (groups, splits)     mu, logvar, prior                                active, the sum of kl with free bits
latent_backward_kernel    (programs,)          the same as forward, grad_z, grad_kl, active     the gradients
========================  ===================  ===============================================  =====================================

An element's number decides its noise, so the forward and the backward kernel handle whole noise tiles, see :mod:`fastvae.kernels._latent`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import _device, _launch
from fastvae.kernels._index import common_gradient, divide, first_chunk, incoming_gradient, inside, zero_outside
from fastvae.kernels._latent import (
    add_sample,
    clamp,
    gradient_through_clamp,
    kl_block,
    kl_prior,
    kl_prior_gradient,
    kl_standard,
    load_noise,
    load_sample,
    load_stream,
    load_streams,
    place_streams,
    sample_start,
    stream_noise,
    stream_offsets,
    variance_ratio,
)
from fastvae.kernels._layout import matrix_rows, shared_rows
from fastvae.kernels._philox import LANES, STREAMS, TILE
from fastvae.kernels._reduce import is_last, store_row_sums, store_slots, sum_programs, sum_slots
from fastvae.ops import latent as ops
from fastvae.ops._results import REDUCTIONS, reduction_scale


@triton.jit
def forward_tiles(
    operands, inner, strides, limits, noise_source, outputs, kl, start, n, sample, MASKED: tl.constexpr, TOTAL: tl.constexpr,
    ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Handles a block of one sample: writes z, the noise and, without TOTAL, the KL. With TOTAL it returns the sum of the KL for each
    lane."""
    mu, logvar, prior_mu, prior_logvar = operands
    key, eps = noise_source
    z, noise = outputs
    first = sample_start(sample, n, ALIGNED)
    places = place_streams(start, inner, TILES)
    mus = load_streams(mu, places, strides[0], start, n, MASKED, TILES)
    logvars = load_streams(logvar, places, strides[1], start, n, MASKED, TILES)
    if z is not None:
        loaded = load_noise(key, eps, first, start, n, mus[0], MASKED, ALIGNED, TILES)
    total = tl.zeros([TILES, LANES], tl.float32)
    for j in tl.static_range(STREAMS):
        offset = stream_offsets(j, TILES)
        mask = inside(offset, n - start, MASKED)
        mu_j, logvar_j = mus[j].to(tl.float32), clamp(logvars[j], limits)
        ratio = variance_ratio(logvar_j)
        if z is not None:
            noise_j = stream_noise(loaded, key, j, ALIGNED)
            tl.store(z + first + start + offset, tl.fma(ratio[0], noise_j, mu_j), mask=mask)
            if noise is not None:
                tl.store(noise + first + start + offset, noise_j, mask=mask)
        if kl is not None:
            if prior_mu is None:
                elements = kl_standard(mu_j, ratio[2])
            else:
                prior_mu_j = load_stream(prior_mu, places[j], strides[2], start, n, j, MASKED, TILES).to(tl.float32)
                prior_logvar_j = clamp(load_stream(prior_logvar, places[j], strides[3], start, n, j, MASKED, TILES), limits)
                elements = kl_prior(mu_j, logvar_j, prior_mu_j, prior_logvar_j)
            if TOTAL:
                total += zero_outside(elements, mask)
            elif sample == 0:
                tl.store(kl + start + offset, elements, mask=mask)
    return total


@triton.jit(do_not_specialize=["n"])
def latent_forward_kernel(
    mu, logvar, prior_mu, prior_logvar, eps, seed, z, noise, kl, slots, ticket,
    n, inner, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, clamp_min, clamp_max, scale,
    TOTAL: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Samples z and computes the KL, which all samples share. Outputs that are None are not requested. Grid: (samples, programs).

    Pointers: mu, logvar, prior_mu, prior_logvar (n,), with rows of ``inner`` elements that are ``..._stride`` apart, or contiguous where
    those are None; eps and z (samples, n) of the dtype of mu; seed, an int64 scalar; noise (samples, n) float32; kl (n,) or with TOTAL a
    float32 scalar; slots (programs,) float32.
    """
    BLOCK: tl.constexpr = TILES * TILE
    sample, program, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    operands, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    limits, outputs = (clamp_min, clamp_max), (z, noise)
    noise_source = (seed, eps) if seed is None else (tl.load(seed), eps)
    full = n // BLOCK
    total, last_total = tl.zeros([TILES, LANES], tl.float32), tl.zeros([1, LANES], tl.float32)
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        total += forward_tiles(operands, inner, strides, limits, noise_source, outputs, kl, start, n, sample, False, TOTAL, ALIGNED, TILES)
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, TILE), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * TILE
        last_total += forward_tiles(operands, inner, strides, limits, noise_source, outputs, kl, start, n, sample, True, TOTAL, ALIGNED, 1)
    if TOTAL:  # noqa: SIM102 (known when the kernel is compiled, unlike the sample)
        if sample == 0:
            store_slots(slots + program, tl.sum(total) + tl.sum(last_total), None)
            if is_last(ticket, programs):
                tl.store(kl, sum_programs(slots, programs) * scale)


@triton.jit(do_not_specialize=["rows"])
def latent_rows_kernel(
    mu, logvar, prior_mu, prior_logvar, active, kl, slots, ticket,
    rows, columns, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, clamp_min, clamp_max, free_bits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Sums the KL of each row of a matrix (rows, columns), a sample of the batch. Where ``active`` is not None, the KL of a column that is
    not active is ``free_bits``. Grid: (groups of rows, splits of the columns).

    Pointers: mu, logvar, prior_mu, prior_logvar (rows, columns), rows ``..._stride`` apart; active (columns,) bool; kl (rows,) float32;
    slots (splits, rows) float32.
    """
    operands, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    row = tl.cast(tl.program_id(0), tl.int64) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(tl.cast(tl.program_id(1), tl.int64) * COLUMNS, columns, tl.num_programs(1) * COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        elements = kl_block(operands, strides, (clamp_min, clamp_max), row[:, None], column[None, :], mask)
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
    """Decides whether the mean KL of each column of a matrix (rows, columns) is above ``free_bits``. Where ``kl`` is not None, it also sums
    the KL, which is ``free_bits`` for each element of the other columns. Grid: (groups of columns, splits of the rows).

    Pointers: mu, logvar, prior_mu, prior_logvar (rows, columns), rows ``..._stride`` apart; active (columns,) bool; kl, a float32 scalar;
    slots (splits, columns) float32.
    """
    # The first column of the program is in the pointers, so that the others are counted in 32 bits, which takes fewer registers.
    start = tl.cast(tl.program_id(0), tl.int64) * COLUMNS
    mu += start
    logvar += start
    if prior_mu is not None:
        prior_mu += start
        prior_logvar += start
    operands, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    split, splits = tl.cast(tl.program_id(1), tl.int64), tl.num_programs(1)
    column = tl.arange(0, COLUMNS)
    present = column < columns - start
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(split * ROWS, rows, splits * ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & present[None, :]
        total += kl_block(operands, strides, (clamp_min, clamp_max), row[:, None], column[None, :], mask)
    store_slots(slots + split * columns + start + column, tl.sum(total, axis=0), present)
    if is_last(ticket, tl.num_programs(0) * splits):
        total_kl = tl.zeros([COLUMNS], tl.float32)
        for first_column in range(0, columns, COLUMNS):
            every_column = first_column + tl.arange(0, COLUMNS)
            inside = every_column < columns
            column_kl = sum_slots(slots, every_column, inside, splits, columns, ROWS, COLUMNS)
            # The comparison is false for NaN, which free bits must not hide.
            above = (column_kl / rows <= free_bits) == 0
            tl.store(active + every_column, above, mask=inside)
            total_kl += tl.where(inside, tl.where(above, column_kl, free_bits * rows), 0.0)
        if kl is not None:
            tl.store(kl, tl.sum(total_kl) * scale)


@triton.jit
def where_active(weight, active, start, offset, mask, per_sample, BOUND: tl.constexpr):
    """``weight``, or 0 for elements whose KL free bits replace."""
    if active is None:
        return weight
    else:
        _, _, column = divide(start, offset, per_sample, BOUND)
        return tl.where(tl.load(active + column, mask=mask) != 0, weight, 0.0)


@triton.jit
def backward_tiles(
    operands, inner, strides, limits, noise_source, grad_z, grad_kl, common, active, grads, start, n, samples, per_sample,
    MASKED: tl.constexpr, REDUCTION: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Writes the gradients of a block. With ``samples``, the part that flows through z is summed over them, in their order."""
    mu, logvar, prior_mu, prior_logvar = operands
    grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar = grads
    key = noise_source[0]
    places = place_streams(start, inner, TILES)
    logvars = load_streams(logvar, places, strides[1], start, n, MASKED, TILES)
    if grad_z is not None:
        if samples is None:
            gradients, loaded = load_sample(grad_z, noise_source, 0, start, n, MASKED, ALIGNED, TILES)
        else:
            zero = tl.zeros([TILES, LANES], tl.float32)
            sums = (zero, zero, zero, zero, zero, zero, zero, zero)
            for sample in range(0, samples):
                gradients, loaded = load_sample(grad_z, noise_source, sample, start, n, MASKED, ALIGNED, TILES)
                sums = add_sample(sums, gradients, loaded, key, ALIGNED)
    for j in tl.static_range(STREAMS):
        offset = stream_offsets(j, TILES)
        mask = inside(offset, n - start, MASKED)
        logvar_j = logvars[j].to(tl.float32)
        clamped = clamp(logvar_j, limits)
        ratio = variance_ratio(clamped)
        grad_mu_j, grad_logvar_j = tl.zeros([TILES, LANES], tl.float32), tl.zeros([TILES, LANES], tl.float32)
        if grad_z is not None:
            if samples is None:
                grad_mu_j = gradients[j].to(tl.float32)
                grad_logvar_j = 0.5 * ratio[0] * (grad_mu_j * stream_noise(loaded, key, j, ALIGNED))
            else:
                grad_mu_j, grad_logvar_j = sums[j], 0.5 * ratio[0] * sums[4 + j]
        if grad_kl is not None:
            weight = incoming_gradient(grad_kl, start, offset, mask, per_sample, common, REDUCTION, TILES * TILE)
            weight = where_active(weight, active, start, offset, mask, per_sample, TILES * TILE)
            mu_j = load_stream(mu, places[j], strides[0], start, n, j, MASKED, TILES).to(tl.float32)
            if prior_mu is None:
                grad_mu_j = tl.fma(weight, mu_j, grad_mu_j)
                grad_logvar_j = tl.fma(0.5 * weight, ratio[1], grad_logvar_j)
            else:
                prior_mu_j = load_stream(prior_mu, places[j], strides[2], start, n, j, MASKED, TILES).to(tl.float32)
                prior_logvar_j = load_stream(prior_logvar, places[j], strides[3], start, n, j, MASKED, TILES).to(tl.float32)
                gradient = kl_prior_gradient(mu_j, clamped, prior_mu_j, clamp(prior_logvar_j, limits))
                grad_mu_j = tl.fma(weight, gradient[0], grad_mu_j)
                grad_logvar_j = tl.fma(weight, gradient[1], grad_logvar_j)
                tl.store(grad_prior_mu + start + offset, weight * gradient[2], mask=mask)
                tl.store(
                    grad_prior_logvar + start + offset, gradient_through_clamp(weight * gradient[3], prior_logvar_j, limits), mask=mask
                )
        tl.store(grad_mu + start + offset, grad_mu_j, mask=mask)
        tl.store(grad_logvar + start + offset, gradient_through_clamp(grad_logvar_j, logvar_j, limits), mask=mask)


@triton.jit(do_not_specialize=["n", "samples"])
def latent_backward_kernel(
    grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, eps, seed, active,
    grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar,
    n, samples, inner, mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride, per_sample, clamp_min, clamp_max, scale,
    REDUCTION: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Computes the gradients from grad_z and grad_kl, either of which may be None. ``samples`` is None where there is one sample without a
    dimension of its own. Grid: (programs,).

    Pointers: grad_z and eps (samples, n); grad_kl, one value for each element, each sample of the batch of ``per_sample`` elements, or for
    all, by REDUCTION; mu, logvar, prior_mu, prior_logvar as in forward; seed, an int64 scalar; active (per_sample,) bool; the gradients
    (n,).
    """
    BLOCK: tl.constexpr = TILES * TILE
    program, programs = tl.program_id(0), tl.num_programs(0)
    operands, strides = (mu, logvar, prior_mu, prior_logvar), (mu_stride, logvar_stride, prior_mu_stride, prior_logvar_stride)
    limits, grads = (clamp_min, clamp_max), (grad_mu, grad_logvar, grad_prior_mu, grad_prior_logvar)
    noise_source = (seed, eps) if seed is None else (tl.load(seed), eps)
    common = common_gradient(grad_kl, scale, REDUCTION)
    full = n // BLOCK
    for index in range(program, full, programs):
        start = tl.cast(index, tl.int64) * BLOCK
        backward_tiles(
            operands, inner, strides, limits, noise_source, grad_z, grad_kl, common, active, grads, start, n, samples, per_sample,
            False, REDUCTION, ALIGNED, TILES,
        )  # fmt: skip
    for chunk in range(first_chunk(full, program, programs), tl.cdiv(n - full * BLOCK, TILE), programs):
        start = tl.cast(full, tl.int64) * BLOCK + tl.cast(chunk, tl.int64) * TILE
        backward_tiles(
            operands, inner, strides, limits, noise_source, grad_z, grad_kl, common, active, grads, start, n, samples, per_sample,
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
