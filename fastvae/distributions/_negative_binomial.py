"""The logarithm of negative binomial probabilities, without differences of large logarithms of the gamma function."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# From here on the five terms of Stirling's series below have an error under 3e-13: the first that is left out is 691 / 360360 / t^11.
_SERIES_FROM = 8.0


def log_prob(x: Tensor, log_mean: Tensor, log_dispersion: Tensor) -> Tensor:
    r"""log p(x) of counts with mean :math:`\mu` and dispersion :math:`\theta` (variance :math:`\mu + \mu^2 / \theta`), elementwise.

    .. math:: \log p(x) = \log\Gamma(x + \theta) - \log\Gamma(\theta) - \log x! + \theta \log\frac{\theta}{\mu + \theta}
        + x \log\frac{\mu}{\mu + \theta}

    At :math:`\theta = 10^8` the two logarithms of the gamma function are 1.7e9 each and their difference is often below 1. So each is
    written as :math:`\log\Gamma(t) = (t - \tfrac12) \log t - t + \tfrac12 \log 2\pi + \delta(t)`, and the large terms are collected in
    the deviance, whose logarithms are near 0 where the probability is not small (Loader, *Fast and Accurate Computation of Binomial
    Probabilities*, 2000):

    .. math:: \log p(x) = x \log\frac{m}{x} + \theta \log\frac{x + \theta}{\mu + \theta}
        - \tfrac12 \log\left(2\pi x \left(1 + \tfrac{x}{\theta}\right)\right) + \delta(x + \theta) - \delta(\theta) - \delta(x),
        \quad m = (x + \theta) \frac{\mu}{\mu + \theta}

    and :math:`\log p(0) = -\theta \log(1 + \mu / \theta)`. The result is NaN for a negative count.
    """
    mean, dispersion = log_mean.exp(), log_dispersion.exp()
    log_prob_zero = -dispersion * torch.log1p(mean / dispersion)
    # A count of 1 stands where the count is 0, so that the formula and its gradient are finite there too.
    count = torch.where(x == 0, 1.0, x)
    excess, total, scale = count - mean, count + dispersion, mean + dispersion
    negative_deviance = count * _log_ratio(-excess * (dispersion / scale), total * (mean / scale), count)
    negative_deviance = negative_deviance + dispersion * _log_ratio(excess, total, scale)
    remainders = _stirling_remainder(total) - _stirling_remainder(dispersion) - _stirling_remainder(count)
    log_prob_count = negative_deviance + remainders - 0.5 * (torch.log1p(count / dispersion) + torch.log(2 * math.pi * count))
    return torch.where(x == 0, log_prob_zero, log_prob_count)


def zero_inflated_log_prob(x: Tensor, log_mean: Tensor, zero_logits: Tensor, log_dispersion: Tensor) -> Tensor:
    r"""log p(x) where a count is 0 with probability :math:`\pi = s(\mathrm{zero\_logits})` whatever the negative binomial gives."""
    inner = log_prob(x, log_mean, log_dispersion)
    log_extra, log_kept = F.logsigmoid(zero_logits), F.logsigmoid(-zero_logits)
    # log(pi + (1 - pi) p(0)): the sum of logarithms loses the digits of a probability near 1, the one of the complement those near 0.
    inner_zero = torch.where(x == 0, inner, -1.0)
    summed = torch.logaddexp(log_extra, log_kept + inner_zero)
    is_small = summed < -0.5
    # The complement is replaced where it is not taken: it may be 1 there, and the gradient of log(1 - 1) is NaN.
    complement = torch.where(is_small, 0.5, -log_kept.exp() * torch.expm1(inner_zero))
    log_prob_zero = torch.where(is_small, summed, torch.log1p(-complement))
    return torch.where(x == 0, log_prob_zero, log_kept + inner)


def _log_ratio(difference: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """log(numerator / denominator) to full precision near a ratio of 1; ``difference`` is numerator - denominator without its rounding."""
    near = difference.abs() < 0.5 * denominator
    # One of the two terms is 0. Neither ever takes the logarithm of 0, whose gradient would be infinite.
    return torch.log1p(torch.where(near, difference / denominator, 0.0)) + torch.log(torch.where(near, 1.0, numerator / denominator))


def _stirling_remainder(t: Tensor) -> Tensor:
    r""":math:`\delta(t) = \log\Gamma(t) - (t - \tfrac12) \log t + t - \tfrac12 \log 2\pi` for t > 0."""
    # Each branch sees only arguments for which it is finite, so that neither makes the gradient NaN.
    low, inverse = t.clamp(max=_SERIES_FROM), 1.0 / t.clamp(min=_SERIES_FROM)
    direct = torch.lgamma(low) - (low - 0.5) * torch.log(low) + (low - 0.5 * math.log(2 * math.pi))
    square = inverse * inverse
    series = inverse * (1 / 12 + square * (-1 / 360 + square * (1 / 1260 + square * (-1 / 1680 + square / 1188))))
    return torch.where(t < _SERIES_FROM, direct, series)
