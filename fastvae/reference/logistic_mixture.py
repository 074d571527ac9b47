"""Mixtures of discretized logistics in plain PyTorch: the definition and the oracle of the tests."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._types import Reduction
from fastvae.ops import logistic_mixture as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import accumulation_dtype, reduction_number
from fastvae.ops.logistic_mixture import MIN_LOG_SCALE
from fastvae.reference._reduce import expand_gradient, reduce_elements

_LOG_WIDTH = math.log(2.0 / 255.0)


class Parameters(NamedTuple):
    """The parts of ``input``, whose dimension 1 they divide in this order."""

    logits: Tensor  # (batch, num_mixtures, ...)
    means: Tensor  # (batch, channels, num_mixtures, ...)
    log_scales: Tensor  # (batch, channels, num_mixtures, ...)
    coefficients: Tensor  # (batch, channels * (channels - 1) / 2, num_mixtures, ...); before tanh


def split_parameters(input: Tensor, num_mixtures: int, channels: int) -> Parameters:
    """The parts of ``input``; the logit of a single component is 0."""
    pairs = channels * (channels - 1) // 2
    logits = num_mixtures if num_mixtures > 1 else 0
    sizes = [logits, channels * num_mixtures, channels * num_mixtures, pairs * num_mixtures]
    parts = [part.unflatten(1, (-1, num_mixtures)) for part in input.split(sizes, 1)[1:]]
    return Parameters(input[:, :logits] if logits else torch.zeros_like(input[:, :1]), *parts)


def levels(target: Tensor, dtype: torch.dtype) -> Tensor:
    """The level of each value, a whole number in [0, 255]."""
    return target.to(dtype) if target.dtype == torch.uint8 else (target.to(dtype) * 255.0).round().clamp(0.0, 255.0)


def component_means(parameters: Parameters, values: Tensor) -> Tensor:
    """The mean of each channel of each component, given the values in [-1, 1] of the channels before it."""
    means = list(parameters.means.unbind(1))
    coefficients = iter(torch.tanh(parameters.coefficients).unbind(1))
    for channel in range(len(means)):
        for before in range(channel):
            means[channel] = means[channel] + next(coefficients) * values[:, before, None]
    return torch.stack(means, 1)


def _log_one_minus_exp(x: Tensor) -> Tensor:
    """log((1 - exp(-x)) / x) for x >= 0, and its limit 0 at x = 0."""
    small = x < 1e-3
    safe = torch.where(small, 1.0, x)
    series = -x / 2.0 + x * x / 24.0
    return torch.where(small, series, torch.log(-torch.expm1(-safe) / safe))


def log_probabilities(level: Tensor, means: Tensor, log_scales: Tensor) -> Tensor:
    """The log of the probability that a logistic gives to the bin of ``level``.

    The bin is [a, b] in units of the scale from the mean; its probability is
    sigmoid(b) - sigmoid(a) = sigmoid(b) sigmoid(-a) (1 - e^(a - b)).
    """
    log_scales = log_scales.clamp(min=MIN_LOG_SCALE)
    inverse = torch.exp(-log_scales)
    center = (2.0 * level - 255.0) / 255.0 - means
    upper, lower = (center + 1.0 / 255.0) * inverse, (center - 1.0 / 255.0) * inverse
    log_width = _LOG_WIDTH - log_scales + _log_one_minus_exp(2.0 / 255.0 * inverse)
    inner = F.logsigmoid(upper) + F.logsigmoid(-lower) + log_width
    return torch.where(level == 0, F.logsigmoid(upper), torch.where(level == 255, F.logsigmoid(-lower), inner))


def loss_elements(input: Tensor, target: Tensor, num_mixtures: int) -> Tensor:
    """The loss of each position, in the dtype of ``input``."""
    level = levels(target, input.dtype)
    parameters = split_parameters(input, num_mixtures, target.shape[1])
    means = component_means(parameters, (2.0 * level - 255.0) / 255.0)
    by_component = log_probabilities(level.unsqueeze(2), means, parameters.log_scales).sum(1)
    return -torch.logsumexp(torch.log_softmax(parameters.logits, 1) + by_component, 1)


def loss(input: Tensor, target: Tensor, num_mixtures: int, reduction: int) -> Tensor:
    """The operator's loss, differentiable any number of times in either mode."""
    return reduce_elements(loss_elements(input.to(accumulation_dtype(input.dtype)), target, num_mixtures), reduction, input.dtype)


def logistic_mixture_nll(
    input: Tensor, target: Tensor, num_mixtures: int = 10, reduction: Reduction = "batchmean", *, grad_scale: float = 1.0
) -> Tensor:
    """:func:`fastvae.functional.logistic_mixture_nll`, differentiable any number of times.

    ``grad_scale`` changes nothing: no gradient is written in the forward pass.
    """
    return loss(input, target, num_mixtures, reduction_number(reduction))


@in_plain_torch(ops.LogisticMixture)
def _in_plain_torch(arguments: ops.ForwardArguments) -> tuple[Tensor]:
    input, target, num_mixtures, reduction, _, _ = arguments
    return (loss(input, target, num_mixtures, reduction),)


def _log_probability_gradients(level: Tensor, means: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor]:
    """d log probability / d (mean, log scale) of :func:`log_probabilities`."""
    inverse = torch.exp(-log_scales.clamp(min=MIN_LOG_SCALE))
    center = (2.0 * level - 255.0) / 255.0 - means
    upper, lower, width = (center + 1.0 / 255.0) * inverse, (center - 1.0 / 255.0) * inverse, 2.0 / 255.0 * inverse
    by_upper = torch.where(level == 255, 0.0, torch.sigmoid(-upper))
    by_lower = torch.where(level == 0, 0.0, -torch.sigmoid(lower))
    by_width = torch.where(width < 1e-12, 1.0, width / torch.expm1(width))
    by_scale = -upper * by_upper - lower * by_lower - torch.where((level == 0) | (level == 255), 0.0, by_width)
    return -inverse * (by_upper + by_lower), torch.where(log_scales < MIN_LOG_SCALE, 0.0, by_scale)


def loss_gradient(input: Tensor, target: Tensor, num_mixtures: int) -> Tensor:
    """d loss / d input of each position, in the dtype of ``input``."""
    level = levels(target, input.dtype)
    parameters, values = split_parameters(input, num_mixtures, target.shape[1]), (2.0 * level - 255.0) / 255.0
    means, level = component_means(parameters, values), level.unsqueeze(2)
    by_component = log_probabilities(level, means, parameters.log_scales).sum(1)
    share = torch.softmax(parameters.logits + by_component, 1)
    by_mean, by_log_scale = (-share.unsqueeze(1) * t for t in _log_probability_gradients(level, means, parameters.log_scales))
    derivatives = (1.0 - torch.tanh(parameters.coefficients) ** 2).unbind(1)
    pairs = [(channel, before) for channel in range(target.shape[1]) for before in range(channel)]
    of_pairs = [d * by_mean[:, c] * values[:, b, None] for d, (c, b) in zip(derivatives, pairs, strict=True)]
    by_logit = [torch.softmax(parameters.logits, 1) - share] if num_mixtures > 1 else []
    return torch.cat([*by_logit, by_mean.flatten(1, 2), by_log_scale.flatten(1, 2), *of_pairs], 1)


def _gradient(grad_output: Tensor, input: Tensor, target: Tensor, num_mixtures: int, reduction: int) -> Tensor:
    grad_elements = expand_gradient(grad_output, ops.one_plane(input).shape, reduction)
    gradient = loss_gradient(input.to(accumulation_dtype(input.dtype)), target, num_mixtures)
    return (gradient * grad_elements.unsqueeze(1)).to(input.dtype).contiguous()


@ops.forward.implement("reference")
def _logistic_mixture_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, target, num_mixtures, reduction, grad_scale, with_grad = arguments
    result = loss(input, target, num_mixtures, reduction)
    if not with_grad:
        return ops.ForwardResults(result, input.new_empty((0,)))
    scale = torch.full((), grad_scale, dtype=accumulation_dtype(input.dtype), device=input.device)
    return ops.ForwardResults(result, _gradient(scale, input, target, num_mixtures, reduction))


@ops.backward.implement("reference")
def _logistic_mixture_backward(arguments: ops.BackwardArguments) -> Tensor:
    return _gradient(*arguments)


@ops.backward_.implement("reference")
def _logistic_mixture_backward_(arguments: ops.BackwardInPlaceArguments) -> None:
    a = arguments
    a.grad_input.copy_(_gradient(a.grad_output, a.input, a.target, a.num_mixtures, a.reduction))
