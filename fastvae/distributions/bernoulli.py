"""Bernoulli likelihoods, of logits and of probabilities."""

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae._types import Reduction
from fastvae.distributions.likelihood import Likelihood


class BernoulliLikelihood(Likelihood):
    r"""A Bernoulli distribution for each element, whose logit :math:`a` the decoder gives.

    .. math:: \log p(x | z) = \sum_i x_i \log s(a_i) + (1 - x_i) \log(1 - s(a_i)), \quad s(a) = \frac{1}{1 + e^{-a}}

    By :func:`fastvae.functional.binary_cross_entropy_with_logits`. The decoder gives ``(batch, channels, ...)`` logits. ``x`` is in [0, 1],
    floating or uint8 (value / 255). For grey values, neither 0 nor 1, the formula is used as it is, but no longer a density (Loaiza-Ganem
    and Cunningham, *The continuous Bernoulli*, 2019). :meth:`mean` gives probabilities, :meth:`sample` zeros and ones.
    """

    support = (0.0, 1.0)

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        return FV.binary_cross_entropy_with_logits(params, x, reduction=reduction)

    def mean(self, params: Tensor) -> Tensor:
        return params.sigmoid()

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self.mean(params.detach()), generator=generator)


class BernoulliProbsLikelihood(BernoulliLikelihood):
    r"""A Bernoulli distribution for each element, whose probability :math:`p` the decoder gives, from a sigmoid for example.

    .. math:: \log p(x | z) = \sum_i x_i \log p_i + (1 - x_i) \log(1 - p_i)

    By :func:`fastvae.functional.binary_cross_entropy`: each logarithm is clamped at -100. Prefer :class:`BernoulliLikelihood`, which does
    not saturate. The decoder gives ``(batch, channels, ...)`` probabilities in [0, 1]; ``x`` is as there.
    """

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        return FV.binary_cross_entropy(params, x, reduction=reduction)

    def mean(self, params: Tensor) -> Tensor:
        return params
