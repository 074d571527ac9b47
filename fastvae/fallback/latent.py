"""Sampling and the Gaussian KL in plain PyTorch, block by block, with the noise that every backend draws."""

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fastvae.fallback import _device
from fastvae.fallback._blocks import Reduced, Rooms, block_elements, blocks, gradient_matrix, matrix_shape, take, written
from fastvae.fallback._register import implements
from fastvae.ops import latent as ops
from fastvae.ops._results import accumulation_dtype
from fastvae.reference._reduce import reduce_elements
from fastvae.reference.latent import LANES, TILE

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
# On so many counters NumPy's one thread takes no longer than torch's two.
_ONE_THREAD = 1 << 15


def normal(seed: Tensor, shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """The standard normals of :func:`fastvae.reference.latent.normal`."""
    count = math.prod(shape)
    tiles = -(-count // TILE)
    # (tile, pair of words, cosine or sine, lane)
    streams = torch.empty((tiles, 2, 2, LANES), dtype=torch.float32, device=seed.device)
    keys = _round_keys(seed)
    step = max(block_elements(seed.device) // TILE, 1)
    with Rooms(torch.int64) as states, Rooms(torch.int32) as ints, Rooms(torch.float32) as floats:
        for start in range(0, tiles, step):
            chunk = streams[start : start + step]
            state = states["words"].shaped((3, 2, chunk.shape[0] * LANES), chunk.device)
            _box_muller(*_words(start * LANES, state, keys), chunk, ints, floats)
    return streams.view(-1)[:count].view(shape).to(dtype)


def _round_keys(seed: Tensor) -> Tensor:
    """The two key words of each round, ``(rounds, 2, 1)``, in the order in which :func:`philox_words` holds its rows."""
    if _device.is_cpu(seed.device):
        # Python's integers compute the same, which saves a dozen launches.
        key = int(seed)
        words = [[(part + number * weyl) & _MASK for part, weyl in zip((key, key >> 32), _WEYL, strict=True)] for number in range(_ROUNDS)]
        keys = torch.tensor(words, dtype=torch.int64, device="cpu")
    else:
        steps = torch.arange(_ROUNDS, dtype=torch.int64, device=seed.device)
        parts = (((seed >> shift) + weyl * steps).bitwise_and_(_MASK) for shift, weyl in zip((0, 32), _WEYL, strict=True))
        keys = torch.stack(tuple(parts), dim=1)
    # Rounds 0, 2, 4, ... have word 2 in row 0, and word 2 takes the second key word.
    keys[::2] = keys[::2].flip(1)
    return keys.unsqueeze(2)


def _words(start: int, state: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 of the counters from ``start`` on: the words (0, 2) and the words (1, 3) as the rows of two int64 tensors; the upper
    halves of words 1 and 3 hold anything.

    Args:
        state: memory, (3, 2, counters), for the words that are multiplied, the words that are combined by exclusive or, and the products.
    """
    count = state.shape[2]
    state.zero_()
    multiplied, added, _ = rows = [pair.unbind() for pair in state.unbind()]
    torch.arange(start, start + count, out=multiplied[0])
    torch.bitwise_right_shift(multiplied[0], 32, out=added[0])
    multiplied[0].bitwise_and_(_MASK)
    # torch.tensor would copy from the host, which waits for an accelerator.
    multipliers = torch.full((3, 1), _MULTIPLIERS[0], dtype=torch.int64, device=keys.device)
    multipliers[1].fill_(_MULTIPLIERS[1])
    last = _ROUNDS % 2
    if _device.is_cpu(keys.device) and (torch.get_num_threads() == 1 or count <= _ONE_THREAD):
        # NumPy works on the same memory, and takes two thirds of the time of one thread of torch.
        arrays = state.numpy(), [[row.numpy() for row in pair] for pair in rows], multipliers.numpy(), keys.numpy()
        _rounds(*arrays, np.multiply, np.right_shift)
    else:
        _rounds(state, rows, multipliers, keys, torch.mul, torch.bitwise_right_shift)
    return state[0], state[1 + last]


def _rounds(state, rows, multipliers, keys, multiply, shift) -> None:
    """The rounds of Philox on tensors or arrays: ``state`` (3, 2, counters) and its rows.

    Words 0 and 2 are multiplied, so their upper halves have to be zero; words 1 and 3 are only combined by exclusive or with what is masked
    afterwards, so their upper halves keep what the 64-bit products leave there. A round exchanges the roles of the rows, not the rows.
    """
    (row_0, row_1), *others = rows
    columns = multipliers[:2], multipliers[1:]
    for number, key in enumerate(keys):
        added, product = number % 2, 1 - number % 2
        multiply(state[0], columns[number % 2], out=state[1 + product])
        shift(state[1 + product], 32, out=state[0])
        row_0 ^= others[added][1]
        row_1 ^= others[added][0]
        both = state[0]
        both ^= key
        both &= _MASK


def _box_muller(even: Tensor, odd: Tensor, out: Tensor, ints: Rooms, floats: Rooms) -> None:
    """Writes the normals of two pairs of words for each counter to ``out`` (tiles, 2, 2, lanes).

    The angle is reduced to half a turn in integers; the other half has the opposite sign, which goes into the radius.
    """
    radius = floats["radius"].like(even).copy_(even).mul_(2.0**-32).add_(2.0**-33).log_().mul_(-2.0).sqrt_()
    words = ints["words"].like(odd).copy_(odd)
    doubled = torch.bitwise_left_shift(words, 1, out=ints["doubled"].like(words))
    sign = words.bitwise_xor_(doubled).bitwise_and_(-(2**31))
    radius.view(torch.int32).bitwise_xor_(sign)
    angle = floats["angle"].like(doubled).copy_(doubled.bitwise_right_shift_(1)).mul_(2.0 * math.pi * 2.0**-32)
    pairs = (2, out.shape[0], LANES)
    radius, angle = radius.view(pairs), angle.view(pairs)
    by_pair = out.transpose(0, 1)
    torch.mul(radius, torch.cos(angle, out=floats["cosine"].like(angle)), out=by_pair[:, :, 0])
    torch.mul(radius, angle.sin_(), out=by_pair[:, :, 1])


def excess_exp(x: Tensor, rooms: Rooms) -> Tensor:
    """``exp(x) - 1 - x`` to some units in the last place, also where it cancels.

    With c the number nearest to x in an interval around 0 it is ``(exp(c) - 1 - c) + exp(c) (exp(x - c) - 1) - (x - c)``: the first term is
    the sum of a Taylor series, the others are exactly 0 inside the interval.
    """
    # The terms that the series leaves out are below its rounding error. At the ends of the interval the difference cancels at most 3 bits.
    last = 8 if x.dtype == torch.float32 else 16
    inside = torch.clamp(x, -0.5, 0.5, out=rooms["inside"].like(x))
    outside = torch.sub(x, inside, out=rooms["outside"].like(x))
    series = torch.addcmul(inside, inside, inside, value=1.0 / last, out=rooms["series"].like(x))
    for k in range(last - 1, 2, -1):
        torch.addcmul(inside, inside, series, value=1.0 / k, out=series)
    series.mul_(inside).mul_(0.5).sub_(outside)
    return series.addcmul_(outside.exp_().sub_(1.0), inside.exp_())


def _kl_elements(rooms: Rooms, mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))) of each element."""
    if prior_mu is None or prior_logvar is None:
        excess = excess_exp(logvar, rooms)
        return torch.addcmul(excess, mu, mu, out=excess).mul_(0.5)
    delta, precision, ratio = (rooms[name].like(mu) for name in ("delta", "precision", "ratio"))
    squares = torch.sub(mu, prior_mu, out=delta).square_().mul_(torch.neg(prior_logvar, out=precision).exp_())
    return squares.add_(excess_exp(torch.sub(logvar, prior_logvar, out=ratio), rooms)).mul_(0.5)


def _free_bits(elements: Tensor, like: Tensor, reduction: int, free_bits: float) -> tuple[Tensor, Tensor]:
    """The reduced KL, and which dimensions are above their free bits."""
    elements = elements.view(like.shape)
    active = ~(elements.mean(0) <= free_bits)  # a NaN stays
    return reduce_elements(torch.where(active, elements, free_bits), reduction, like.dtype), active


@implements(ops.forward)
def latent_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    mu, dtype, size = arguments.mu, accumulation_dtype(arguments.mu.dtype), matrix_shape(arguments.mu.shape)
    results, noise = arguments.allocate(), arguments.eps
    if arguments.seed is not None:
        noise = normal(arguments.seed, results.z.shape, dtype)
    samples = results.z.reshape(-1, *size) if arguments.draws and results.z.numel() else None
    noises = None if samples is None or noise is None else noise.reshape(samples.shape)
    with_free_bits = results.active.numel() > 0
    reduced = Reduced(mu, arguments.reduction) if arguments.with_kl and not with_free_bits else None
    elements = mu.new_empty(size, dtype=dtype) if with_free_bits else None
    matrices = [None if t is None else t.reshape(size) for t in arguments.posterior]
    with Rooms(dtype) as rooms:
        for block in blocks(*size, mu.device):
            wide_mu, wide_logvar, *prior = _widen(matrices, block, arguments.limits, rooms)
            if samples is not None and noises is not None:
                # In the rooms of the KL, which comes after.
                sigma = torch.mul(wide_logvar, 0.5, out=rooms["inside"].like(wide_logvar)).exp_()
                with written(_take_samples(samples, block), rooms["series"]) as drawn:
                    torch.addcmul(wide_mu, sigma, rooms["noise"].widened(_take_samples(noises, block)), out=drawn)
            if reduced is not None:
                reduced.add(block, _kl_elements(rooms, wide_mu, wide_logvar, *prior))
            elif elements is not None:
                take(elements, block).copy_(_kl_elements(rooms, wide_mu, wide_logvar, *prior))
    if reduced is not None:
        results = results._replace(kl=reduced.result())
    elif elements is not None:
        kl, active = _free_bits(elements, mu, arguments.reduction, arguments.free_bits)
        results = results._replace(kl=kl, active=active)
    return results._replace(noise=noise) if noise is not None and arguments.keep_noise else results


def _take_samples(samples: Tensor, block) -> Tensor:
    """The block of each sample; of the only one without a dimension of its own."""
    return take(samples[0], block) if samples.shape[0] == 1 else samples[:, block[0], block[1]]


def _widen(matrices, block, limits: tuple[float, float], rooms: Rooms) -> list[Any]:
    """A block of mu, logvar and the prior's, where there is one, in the dtype of the rooms, log variances clamped."""
    wide = [None if t is None else rooms["wide", i].widened(take(t, block)) for i, t in enumerate(matrices)]
    for i in (1, 3):
        logvar = wide[i]
        if logvar is not None and _may_exceed(logvar, limits):
            wide[i] = torch.clamp(logvar, *limits, out=rooms["wide", i].like(logvar))
    return wide


def _may_exceed(logvar: Tensor, limits: tuple[float, float]) -> bool:
    """Whether a log variance is outside its limits, or NaN. To look costs a CPU less than to clamp; another device would have to wait."""
    if limits == (-math.inf, math.inf):
        return False
    if not _device.is_cpu(logvar.device):
        return True
    smallest, largest = torch.aminmax(logvar)
    return not (limits[0] <= float(smallest) and float(largest) <= limits[1])


@implements(ops.backward)
def latent_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    mu, grad_z, limits = arguments.mu, arguments.grad_z, arguments.limits
    dtype, size = accumulation_dtype(mu.dtype), matrix_shape(mu.shape)
    matrices: list[Any] = [None if t is None else t.reshape(size) for t in arguments.posterior]
    results = arguments.allocate()
    incoming = noises = weights = None
    if grad_z is not None:
        noise = arguments.eps if arguments.eps is not None else normal(cast("Tensor", arguments.seed), grad_z.shape, dtype)
        incoming, noises = (t.reshape(arguments.num_samples or 1, *size) for t in (grad_z, noise))
    if arguments.grad_kl is not None:
        weights = _kl_weights(arguments.grad_kl, mu.shape, arguments.active, arguments.reduction, dtype)
    with Rooms(dtype) as rooms:
        for block in blocks(*size, mu.device):
            wide = _widen(matrices, block, limits, rooms)
            grads: list[Tensor | None] = [None] * 4
            if incoming is not None and noises is not None:
                grad, drawn = (rooms[name].widened(_take_samples(t, block)) for name, t in (("incoming", incoming), ("noise", noises)))
                grads[:2] = _sample_gradients(grad, drawn, wide[1], rooms)
            if weights is not None:
                _add_weighted(grads, _kl_gradients(rooms, *wide), take(weights, block), rooms)
            for i, (result, gradient) in enumerate(zip(results, grads, strict=True)):
                if result.numel():
                    _write(take(result.view(size), block), gradient, take(matrices[i], block), limits if i % 2 else None)
    return results


def _kl_weights(grad_kl: Tensor, shape: torch.Size, active: Tensor, reduction: int, dtype: torch.dtype) -> Tensor:
    """The gradient of the loss w.r.t. each element's KL, as a matrix that broadcasts to (samples, elements of a sample)."""
    weights = gradient_matrix(grad_kl, shape, reduction, dtype)
    return torch.where(active.reshape(1, -1), weights, 0.0) if active.numel() else weights


def _sample_gradients(grad: Tensor, noise: Tensor, logvar: Tensor, rooms: Rooms) -> list[Tensor]:
    """The gradients of mu and logvar through the samples; several are the first dimension."""
    with_noise = torch.mul(grad, noise, out=rooms["with noise"].like(grad))
    if grad.ndim == 3:
        grad, with_noise = grad.sum(0), with_noise.sum(0)
    return [grad, torch.mul(logvar, 0.5, out=rooms["gradient", 1].like(logvar)).exp_().mul_(with_noise).mul_(0.5)]


def _kl_gradients(rooms: Rooms, mu, logvar, prior_mu, prior_logvar):
    """d KL / d (mu, logvar[, prior_mu, prior_logvar]) of each element, and the factor that each of them lacks."""
    ratio = rooms["ratio"].like(mu)
    if prior_mu is None:
        return (mu, 1.0), (torch.expm1(logvar, out=ratio), 0.5)
    torch.sub(logvar, prior_logvar, out=ratio).expm1_()
    delta = torch.sub(mu, prior_mu, out=rooms["delta"].like(mu))
    scaled = torch.neg(prior_logvar, out=rooms["precision"].like(mu)).exp_().mul_(delta)
    return (scaled, 1.0), (ratio, 0.5), (scaled, -1.0), (delta.mul_(scaled).add_(ratio), -0.5)


def _add_weighted(grads: list[Tensor | None], gradients, weights: Tensor, rooms: Rooms) -> None:
    for i, (gradient, factor) in enumerate(gradients):
        before, memory = grads[i], rooms["gradient", i].like(gradient)
        if before is None:
            grads[i] = torch.mul(gradient, weights, out=memory)
            if factor != 1.0:
                memory.mul_(factor)
        else:
            grads[i] = torch.addcmul(before, gradient, weights, value=factor, out=memory)


def _write(output: Tensor, gradient: Tensor | None, source: Tensor, limits: tuple[float, float] | None) -> None:
    """Writes a gradient; 0 where there is none, and for a log variance outside its limits."""
    if gradient is None:
        output.zero_()
    elif limits is None or not _may_exceed(source, limits):
        output.copy_(gradient)
    else:
        # Comparisons, not the derivative of hardtanh, which may drop the gradient at a NaN.
        output.copy_(gradient.masked_fill_((source < limits[0]) | (source > limits[1]), 0.0))
