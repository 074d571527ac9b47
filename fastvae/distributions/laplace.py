"""The Laplace likelihood, whose scale is fixed, learned, or given by the decoder."""

import math

import torch
from torch import Tensor

from fastvae._types import Extent
from fastvae.distributions._positive import PositiveLikelihood
from fastvae.distributions.likelihood import as_values, loss_dtype
from fastvae.ops._results import accumulation_dtype


class LaplaceLikelihood(PositiveLikelihood):
    r"""A Laplace distribution for each element, whose mean :math:`m` the decoder gives: absolute errors, which outliers move less.

    .. math:: \log p(x | z) = -\sum_i \log 2 + \log b_i + \frac{|x_i - m_i|}{b_i}

    Args:
        scale: :math:`b`: a number or a tensor that broadcasts to ``x`` by torch's rules, which are fixed; ``"global"``, one learned value;
            ``"per_channel"``, one learned value a channel; or ``"per_element"``: the decoder gives ``(batch, 2 * channels, ...)``, the
            means, then the log scales.
        channels: the channels of ``x``, for ``"per_channel"``.
        log_scale: where the learned log scale of ``"global"`` and ``"per_channel"`` starts. The buffer or parameter of that name holds the
            log scale.

    Raises:
        ValueError: for an argument that does not fit, naming it.
    """

    log_name = "log_scale"

    def __init__(self, scale: float | Tensor | Extent = 1.0, *, channels: int | None = None, log_scale: float = 0.0):
        super().__init__("scale", scale, channels, log_scale)

    def elements(self, params: Tensor, x: Tensor) -> Tensor:
        dtype = loss_dtype(params, x)
        mean, log_scale = (part.to(dtype) for part in self.parts(params))
        return (as_values(x, dtype) - mean).abs() * torch.exp(-log_scale) + (log_scale + math.log(2))

    def mean(self, params: Tensor) -> Tensor:
        return self.split(params)[0]

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dtype = accumulation_dtype(params.dtype)
        mean, log_scale = (part.detach().to(dtype) for part in self.parts(params))
        # The difference of two exponential variates is a Laplace variate; an inverse distribution function would meet log(0).
        first, second = (torch.empty_like(mean).exponential_(generator=generator) for _ in range(2))
        return torch.addcmul(mean, first - second, torch.exp(log_scale)).to(params.dtype)
