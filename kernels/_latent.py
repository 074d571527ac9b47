"""Device functions of the latent kernels: the formulas of sampling and of the Gaussian KL, and loads of noise tiles.

A block consists of TILES noise tiles of 512 elements. Its elements are handled in four streams of shape (TILES, 128), because the noise of
a tile is drawn in four streams of 128 lanes that share their Philox counters, see docs/randomness.md. ``n`` is the number of elements of
mu, and ``start`` the first element of the block. MASKED says that the block may end beyond ``n``: full blocks are read without masks, which
keeps accesses at 16 bytes whatever the size. ALIGNED says that every sample of noise begins with a noise tile.
"""

import triton
import triton.language as tl

from fastvae.kernels._index import at, inside, locate
from fastvae.kernels._math import exponential
from fastvae.kernels._philox import LANES, TILE, draw_words, normal, zero_laid_out_like


@triton.jit
def clamp(logvar, limits):
    """A log variance in float32, clamped to ``limits`` = (clamp_min, clamp_max); NaN stays NaN."""
    return tl.clamp(logvar.to(tl.float32), limits[0], limits[1], propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def variance_ratio(difference):
    """(root, excess, divergence) = (exp(d / 2), exp(d) - 1, exp(d) - 1 - d) for the ratio exp(d) of two variances, where ``difference`` d
    is that of their logarithms. The last two do not cancel near d = 0, see csrc/common/latent_formulas.h."""
    root, excess, divergence = exponential(0.5 * difference)
    square = excess * excess
    return root, tl.fma(2.0, excess, square), tl.fma(2.0, divergence, square)


@triton.jit
def kl_standard(mu, divergence):
    """KL(N(mu, exp(logvar)) || N(0, 1)), where ``divergence`` is that of ``variance_ratio(logvar)``."""
    return 0.5 * tl.fma(mu, mu, divergence)


@triton.jit
def kl_prior(mu, logvar, prior_mu, prior_logvar):
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar)))."""
    delta, ratio = mu - prior_mu, variance_ratio(logvar - prior_logvar)
    return 0.5 * tl.fma(delta * delta, tl.exp(-prior_logvar), ratio[2])


@triton.jit
def kl_prior_gradient(mu, logvar, prior_mu, prior_logvar):
    """The gradients of :func:`kl_prior` with respect to its four arguments."""
    delta, ratio = mu - prior_mu, variance_ratio(logvar - prior_logvar)
    scaled = delta * tl.exp(-prior_logvar)
    return scaled, 0.5 * ratio[1], -scaled, -0.5 * tl.fma(delta, scaled, ratio[1])


@triton.jit
def gradient_through_clamp(gradient, logvar, limits):
    """The gradient of a log variance through :func:`clamp`: 0 outside the limits."""
    return tl.where((logvar < limits[0]) | (logvar > limits[1]), 0.0, gradient)


@triton.jit
def stream_offsets(j, TILES: tl.constexpr):
    """The offsets of the elements of stream ``j`` from the start of a block."""
    return tl.arange(0, TILES)[:, None] * TILE + (tl.arange(0, LANES)[None, :] + j * LANES)


@triton.jit
def place_stream(start, inner, j, TILES: tl.constexpr):
    """The rows and columns of the elements of stream ``j``, see :func:`locate`."""
    return locate(start, stream_offsets(j, TILES), inner, TILES * TILE)


@triton.jit
def place_streams(start, inner, TILES: tl.constexpr):
    """The rows and columns of the elements of all four streams."""
    return (
        place_stream(start, inner, 0, TILES),
        place_stream(start, inner, 1, TILES),
        place_stream(start, inner, 2, TILES),
        place_stream(start, inner, 3, TILES),
    )


@triton.jit
def load_stream(pointer, place, stride, start, n, j, MASKED: tl.constexpr, TILES: tl.constexpr):
    """Loads the elements of stream ``j``."""
    return tl.load(at(pointer, place[0], place[1], place[2], stride), mask=inside(stream_offsets(j, TILES), n - start, MASKED))


@triton.jit
def load_streams(pointer, places, stride, start, n, MASKED: tl.constexpr, TILES: tl.constexpr):
    """Loads the elements of all four streams. The loads are issued before the noise is drawn, which hides their latency."""
    return (
        load_stream(pointer, places[0], stride, start, n, 0, MASKED, TILES),
        load_stream(pointer, places[1], stride, start, n, 1, MASKED, TILES),
        load_stream(pointer, places[2], stride, start, n, 2, MASKED, TILES),
        load_stream(pointer, places[3], stride, start, n, 3, MASKED, TILES),
    )


@triton.jit
def sample_start(sample, n, ALIGNED: tl.constexpr):
    """The number of the first element of a sample in z, eps and the noise, (samples, n). With ALIGNED the compiler is told that it is a
    multiple of 512."""
    start = tl.cast(sample, tl.int64) * n
    if ALIGNED:
        return tl.multiple_of(start, TILE)
    else:
        return start


@triton.jit
def load_noise(key, eps, sample_start, start, n, like, MASKED: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    """The random words of the tiles or, where ``key`` is None, the caller's noise. :func:`stream_noise` turns them into the noise of a
    stream."""
    if key is None:
        return load_streams(eps + sample_start, place_streams(start, None, TILES), None, start, n, MASKED, TILES)
    else:
        return draw_words(key, sample_start + start, zero_laid_out_like(like), ALIGNED, TILES)


@triton.jit
def stream_noise(loaded, key, j: tl.constexpr, ALIGNED: tl.constexpr):
    """The noise of stream ``j`` from what :func:`load_noise` loaded."""
    if key is None:
        return loaded[j].to(tl.float32)
    else:
        return normal(loaded, j, ALIGNED)


@triton.jit
def kl_block(operands, strides, limits, row, column, mask):
    """The KL of the elements at ``row`` (int64) and ``column``, and 0 outside the mask."""
    mu, logvar, prior_mu, prior_logvar = operands
    mus = tl.load(mu + row * strides[0] + column, mask=mask).to(tl.float32)
    logvars = clamp(tl.load(logvar + row * strides[1] + column, mask=mask), limits)
    if prior_mu is None:
        return tl.where(mask, kl_standard(mus, variance_ratio(logvars)[2]), 0.0)
    else:
        prior_mus = tl.load(prior_mu + row * strides[2] + column, mask=mask).to(tl.float32)
        prior_logvars = clamp(tl.load(prior_logvar + row * strides[3] + column, mask=mask), limits)
        return tl.where(mask, kl_prior(mus, logvars, prior_mus, prior_logvars), 0.0)


@triton.jit
def load_sample(grad_z, noise_source, sample, start, n, MASKED: tl.constexpr, ALIGNED: tl.constexpr, TILES: tl.constexpr):
    """grad_z of a block of one sample, and what :func:`load_noise` loads."""
    first = sample_start(sample, n, ALIGNED)
    gradients = load_streams(grad_z + first, place_streams(start, None, TILES), None, start, n, MASKED, TILES)
    key, eps = noise_source
    return gradients, load_noise(key, eps, first, start, n, gradients[0], MASKED, ALIGNED, TILES)


@triton.jit
def add_sample(sums, gradients, loaded, key, ALIGNED: tl.constexpr):
    """Adds grad_z of one sample to the first four sums, one for each stream, and grad_z * noise to the last four."""
    g0, g1, g2, g3 = gradients[0].to(tl.float32), gradients[1].to(tl.float32), gradients[2].to(tl.float32), gradients[3].to(tl.float32)
    return (
        sums[0] + g0,
        sums[1] + g1,
        sums[2] + g2,
        sums[3] + g3,
        tl.fma(g0, stream_noise(loaded, key, 0, ALIGNED), sums[4]),
        tl.fma(g1, stream_noise(loaded, key, 1, ALIGNED), sums[5]),
        tl.fma(g2, stream_noise(loaded, key, 2, ALIGNED), sums[6]),
        tl.fma(g3, stream_noise(loaded, key, 3, ALIGNED), sums[7]),
    )
