"""Mixtures of discretized logistics in plain PyTorch, block by block; the forward pass writes the gradient where it is asked for."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.fallback._blocks import Block, Reduced, Rooms, blocks, gradient_matrix, take, written
from fastvae.fallback._register import implements
from fastvae.ops import logistic_mixture as ops
from fastvae.ops._results import accumulation_dtype, empty_like, reduction_scale
from fastvae.ops.logistic_mixture import MIN_LOG_SCALE, one_plane
from fastvae.reference.logistic_mixture import Parameters, levels, split_parameters

_LOG_WIDTH = math.log(2.0 / 255.0)


class _Bins(NamedTuple):
    """The logarithms of the probabilities of bins, and their gradients, (samples, channels, components, positions)."""

    log_probability: Tensor
    by_mean: Tensor
    by_log_scale: Tensor


def _bins(values: Tensor, sides: Tensor, means: Tensor, log_scales: Tensor) -> _Bins:
    """The formulas of csrc/common/logistic_mixture_formulas.h; ``sides`` is -1 and 1 for the open bins of the lowest and highest level."""
    scales = log_scales.clamp(min=MIN_LOG_SCALE)
    inverse = torch.exp(-scales)
    # The least h has sinh(h) / h = 1 in every dtype.
    h = (inverse / 255.0).clamp_(min=1e-30)
    sinhc, cosh = torch.sinh(h).div_(h), torch.cosh(h)
    u = (values - means).mul_(inverse)
    v = torch.addcmul(h, sides, u, value=-1.0)
    is_open = sides != 0
    size = torch.where(is_open, v, u).abs_()
    e = torch.exp(-size)
    denominator = torch.where(is_open, 1.0, cosh.mul(2.0).add_(e)).mul_(e).add_(1.0)
    inner = torch.log(sinhc).sub_(scales).sub_(size).add_(_LOG_WIDTH)
    log_probability = torch.where(is_open, v.clamp(max=0.0), inner).sub_(torch.log(denominator))
    tail = torch.where(v < 0, 1.0, e).div_(denominator)
    slope = (1.0 - e).mul_(1.0 + e).div_(denominator)
    by_mean = torch.where(is_open, sides * tail, slope * u.sign()).mul_(inverse)
    curve = torch.square(h).mul_(2.0).mul_(sinhc).mul_(e).div_(denominator)
    by_log_scale = torch.where(is_open, tail.mul_(v).neg_(), curve.addcmul_(size, slope).sub_(cosh.div_(sinhc)))
    return _Bins(log_probability, by_mean, by_log_scale.masked_fill_(log_scales < MIN_LOG_SCALE, 0.0))


class _Mixture:
    """The loss and its gradient, block by block of samples and positions."""

    def __init__(self, input: Tensor, target: Tensor, num_mixtures: int):
        self.dtype, self.num_mixtures, self.device = accumulation_dtype(input.dtype), num_mixtures, input.device
        self.like, (self.batch, self.parameters) = one_plane(input), input.shape[:2]
        self.positions = math.prod(input.shape[2:])
        self.input, self.target = (t.reshape(*t.shape[:2], self.positions) for t in (input, target))

    def blocks(self):
        return blocks(self.batch, self.positions, self.device, self.parameters)

    def evaluate(self, block: Block, gradient: Tensor | None, scale: float | Tensor, rooms: Rooms) -> Tensor:
        """The losses of a block; ``scale`` times their gradient is written to ``gradient``, (batch, parameters, positions)."""
        rows, columns = block
        level = levels(self.target[rows, :, columns], self.dtype).unsqueeze(2)
        parameters = split_parameters(self.input[rows, :, columns].to(self.dtype), self.num_mixtures, self.target.shape[1])
        values = level.mul(2.0).sub_(255.0).div_(255.0)
        sides = (level == 255).to(self.dtype).sub_((level == 0).to(self.dtype))
        factors = torch.tanh(parameters.coefficients)
        means = parameters.means.clone()
        for pair, (channel, before) in enumerate(_pairs(self.target.shape[1])):
            means[:, channel].addcmul_(factors[:, pair], values[:, before])
        bins = _bins(values, sides, means, parameters.log_scales)
        by_component = bins.log_probability.sum(1).add_(parameters.logits)
        loss = torch.logsumexp(parameters.logits, 1).sub_(torch.logsumexp(by_component, 1))
        if gradient is not None:
            with written(gradient[rows, :, columns], rooms["gradient"]) as out:
                _write_gradients(split_parameters(out, self.num_mixtures, level.shape[1]), parameters, by_component, bins, factors, values)
                out.mul_(scale if isinstance(scale, float) else take(scale, block).unsqueeze(1))
        return loss


def _pairs(channels: int) -> list[tuple[int, int]]:
    """Each channel with each of the channels before it, in the order of the coefficients."""
    return [(channel, before) for channel in range(channels) for before in range(channel)]


def _write_gradients(out: Parameters, parameters: Parameters, by_component: Tensor, bins: _Bins, factors: Tensor, values: Tensor) -> None:
    """Writes the gradient of the loss with respect to each part of the parameters."""
    share = torch.softmax(by_component, 1)
    torch.sub(torch.softmax(parameters.logits, 1), share, out=out.logits)
    share = share.neg_().unsqueeze(1)
    torch.mul(bins.by_mean, share, out=out.means)
    torch.mul(bins.by_log_scale, share, out=out.log_scales)
    torch.square(factors, out=out.coefficients).neg_().add_(1.0)
    for pair, (channel, before) in enumerate(_pairs(values.shape[1])):
        out.coefficients[:, pair].mul_(values[:, before]).mul_(out.means[:, channel])


@implements(ops.forward)
def logistic_mixture_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    input, target, num_mixtures, reduction, grad_scale, with_grad = arguments
    mixture = _Mixture(input, target, num_mixtures)
    reduced = Reduced(mixture.like, reduction)
    gradient = empty_like(mixture.input) if with_grad else None
    scale = grad_scale * reduction_scale(mixture.like.shape, reduction)
    with Rooms(mixture.dtype) as rooms:
        for block in mixture.blocks():
            reduced.add(block, mixture.evaluate(block, gradient, scale, rooms))
    return ops.ForwardResults(reduced.result(), input.new_empty((0,)) if gradient is None else gradient.view(input.shape))


@implements(ops.backward)
def logistic_mixture_backward(arguments: ops.BackwardArguments) -> Tensor:
    return _gradient(*arguments)


def _gradient(grad_output: Tensor, input: Tensor, target: Tensor, num_mixtures: int, reduction: int) -> Tensor:
    mixture = _Mixture(input, target, num_mixtures)
    scale = gradient_matrix(grad_output, mixture.like.shape, reduction, mixture.dtype)
    gradient = empty_like(mixture.input)
    with Rooms(mixture.dtype) as rooms:
        for block in mixture.blocks():
            mixture.evaluate(block, gradient, scale, rooms)
    return gradient.view(input.shape)


@implements(ops.backward_)
def logistic_mixture_backward_(arguments: ops.BackwardInPlaceArguments) -> None:
    # Where grad_output is what was expected, the gradient is computed again all the same: nothing here may wait for the device.
    a = arguments
    a.grad_input.copy_(_gradient(a.grad_output, a.input, a.target, a.num_mixtures, a.reduction))
