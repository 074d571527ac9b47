"""Device functions of the logistic mixture kernels: the formulas of csrc/common/logistic_mixture_formulas.h, and loads of their operands.

``input`` and ``target`` are pointers to the first parameter and the first channel of a block of positions; ``stride`` is the number of
positions of a sample, which is the distance from one parameter, or channel, to the next.
"""

import triton
import triton.language as tl

from fastvae.ops.logistic_mixture import MIN_LOG_SCALE

MIN_SCALE = tl.constexpr(MIN_LOG_SCALE)
# log(2 / 255), the width of a bin.
LOG_WIDTH = tl.constexpr(-4.848116364598481)
# Below all numbers but -inf, from which it may be subtracted.
LOWEST = tl.constexpr(-3.4028234e38)


@triton.jit
def hyperbolic(h):
    """sinh(h) / h and cosh(h): minimax fits of the relative error as polynomials in h^2 <= 18.5."""
    y = h * h
    s = tl.fma(y, 2.132353044e-10, 2.377694130e-8)
    s = tl.fma(s, y, 2.770409992e-6)
    s = tl.fma(s, y, 1.983290422e-4)
    s = tl.fma(s, y, 8.333550766e-3)
    s = tl.fma(s, y, 1.666664630e-1)
    s = tl.fma(s, y, 1.0)
    c = tl.fma(y, 1.508451350e-11, 1.988404774e-9)
    c = tl.fma(c, y, 2.769264711e-7)
    c = tl.fma(c, y, 2.479180512e-5)
    c = tl.fma(c, y, 1.388925361e-3)
    c = tl.fma(c, y, 4.166660458e-2)
    c = tl.fma(c, y, 5.000000596e-1)
    return s, tl.fma(c, y, 1.0)


@triton.jit
def logistic_bin(value, side, mean, log_scale):
    """The probability of the bin of a pixel is exp(linear) * ratio. Returns both, and the gradients of its logarithm with respect to mean
    and log scale."""
    clamped, is_open = log_scale < MIN_SCALE, side != 0.0
    scale = tl.where(clamped, MIN_SCALE, log_scale)
    inverse = tl.exp(-scale)
    h = inverse * (1.0 / 255.0)
    sinhc, cosh = hyperbolic(h)
    u = (value - mean) * inverse
    v = h - side * u
    size = tl.abs(tl.where(is_open, v, u))
    e = tl.exp(-size)
    denominator = tl.where(is_open, 1.0 + e, (2.0 * cosh + e) * e + 1.0)
    reciprocal = 1.0 / denominator
    linear = tl.where(is_open, tl.where(v < 0, v, 0.0), LOG_WIDTH - scale - size)
    ratio = tl.where(is_open, reciprocal, reciprocal * sinhc)
    tail = tl.where(v < 0, 1.0, e) * reciprocal
    slope = (1.0 - e) * (1.0 + e) * reciprocal
    curve = 2.0 * h * h * sinhc * e * reciprocal
    by_mean = tl.where(is_open, side * tail, tl.where(u < 0, -slope, slope)) * inverse
    by_log_scale = tl.where(is_open, -v * tail, size * slope + curve - cosh / sinhc)
    return linear, ratio, by_mean, tl.where(clamped, 0.0, by_log_scale)


@triton.jit
def tanh(x):
    """tanh(x) and its derivative."""
    e = tl.exp(-2.0 * tl.abs(x))
    r = 1.0 / (1.0 + e)
    size = (1.0 - e) * r
    return tl.where(x < 0, -size, size), 4.0 * e * r * r


@triton.jit
def load_parameter(input, stride, row, mask):
    return tl.load(input + row * stride, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_pixel(target, stride, channel, mask):
    """The value in [-1, 1] of a channel, and its side: -1 for the lowest level, 1 for the highest, otherwise 0."""
    values = tl.load(target + channel * stride, mask=mask, other=0.0)
    if values.dtype == tl.uint8:
        level = values.to(tl.float32)
    else:
        scaled = values.to(tl.float32) * 255.0
        scaled = tl.where(scaled < 0.0, 0.0, scaled)
        # Adding 1.5 * 2^23 rounds to an integer.
        level = (tl.where(scaled > 255.0, 255.0, scaled) + 12582912.0) - 12582912.0
    return (2.0 * level - 255.0) / 255.0, tl.where(level == 0.0, -1.0, tl.where(level == 255.0, 1.0, 0.0))


@triton.jit
def mean_row(m, channel, MIXTURES: tl.constexpr):
    """Where the mean of a channel lies among the parameters; channel ``CHANNELS + c`` stands for the log scale of c, and
    ``2 * CHANNELS + p`` for the coefficient of pair p. A single component has no logit before them."""
    if MIXTURES > 1:
        return (1 + channel) * MIXTURES + m
    else:
        return channel


@triton.jit
def channel_bin(input, target, stride, mask, m, CHANNEL: tl.constexpr, MIXTURES: tl.constexpr, CHANNELS: tl.constexpr):
    """:func:`logistic_bin` of one channel of component ``m``."""
    mean = load_parameter(input, stride, mean_row(m, CHANNEL, MIXTURES), mask)
    for before in tl.static_range(CHANNEL):
        row = mean_row(m, 2 * CHANNELS + CHANNEL * (CHANNEL - 1) // 2 + before, MIXTURES)
        factor, _ = tanh(load_parameter(input, stride, row, mask))
        mean += factor * load_pixel(target, stride, before, mask)[0]
    value, side = load_pixel(target, stride, CHANNEL, mask)
    return logistic_bin(value, side, mean, load_parameter(input, stride, mean_row(m, CHANNELS + CHANNEL, MIXTURES), mask))


@triton.jit
def add_exponential(largest, total, exponent, factor):
    """The largest exponent so far, and the sum of factor * exp(exponent - largest) so far, with one more term."""
    raised = tl.where(exponent > largest, exponent, largest)
    return raised, total * tl.exp(largest - raised) + factor * tl.exp(exponent - raised)


@triton.jit
def component(input, target, stride, mask, m, MIXTURES: tl.constexpr, CHANNELS: tl.constexpr):
    """The logit of a component, and its probability before the softmax's denominator, exp(linear) * ratio."""
    logit = tl.zeros(mask.shape, tl.float32)
    if MIXTURES > 1:
        logit = load_parameter(input, stride, m, mask)
    linear, ratio = logit, tl.full(mask.shape, 1.0, tl.float32)
    for channel in tl.static_range(CHANNELS):
        bin_linear, bin_ratio, _, _ = channel_bin(input, target, stride, mask, m, channel, MIXTURES, CHANNELS)
        linear += bin_linear
        ratio *= bin_ratio
        # The product of eight ratios is a normal float.
        if channel % 8 == 7:
            linear += tl.log(ratio)
            ratio = tl.full(mask.shape, 1.0, tl.float32)
    return logit, linear, ratio


@triton.jit
def mixture_sums(input, target, stride, mask, MIXTURES: tl.constexpr, CHANNELS: tl.constexpr):
    """The logarithm of the sum of the probabilities of all components, before the softmax's denominator, and of that denominator."""
    lowest, zeros = tl.full(mask.shape, LOWEST, tl.float32), tl.zeros(mask.shape, tl.float32)
    largest, total, largest_logit, logits_total = lowest, zeros, lowest, zeros
    for m in range(MIXTURES):
        logit, linear, ratio = component(input, target, stride, mask, m, MIXTURES, CHANNELS)
        largest, total = add_exponential(largest, total, linear, ratio)
        largest_logit, logits_total = add_exponential(largest_logit, logits_total, logit, 1.0)
    return largest + tl.log(total), largest_logit + tl.log(logits_total)


@triton.jit
def store_gradients(
    grad_input, input, target, stride, mask, log_total, log_logits_total, factor, MIXTURES: tl.constexpr, CHANNELS: tl.constexpr
):
    """Stores ``factor`` times the gradient of the loss with respect to every parameter."""
    for m in range(MIXTURES):
        logit, linear, ratio = component(input, target, stride, mask, m, MIXTURES, CHANNELS)
        share = -factor * tl.exp(linear - log_total) * ratio
        if MIXTURES > 1:
            tl.store(grad_input + m * stride, factor * tl.exp(logit - log_logits_total) + share, mask=mask)
        for channel in tl.static_range(CHANNELS):
            _, _, by_mean, by_log_scale = channel_bin(input, target, stride, mask, m, channel, MIXTURES, CHANNELS)
            tl.store(grad_input + mean_row(m, channel, MIXTURES) * stride, share * by_mean, mask=mask)
            tl.store(grad_input + mean_row(m, CHANNELS + channel, MIXTURES) * stride, share * by_log_scale, mask=mask)
            for before in tl.static_range(channel):
                row = mean_row(m, 2 * CHANNELS + channel * (channel - 1) // 2 + before, MIXTURES)
                _, derivative = tanh(load_parameter(input, stride, row, mask))
                value, _ = load_pixel(target, stride, before, mask)
                tl.store(grad_input + row * stride, share * by_mean * derivative * value, mask=mask)
