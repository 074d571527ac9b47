"""The Gaussian likelihood, whose variance is fixed, learned, or given by the decoder."""

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae._types import Extent, Reduction
from fastvae.distributions._positive import PositiveLikelihood
from fastvae.ops._results import accumulation_dtype


class GaussianLikelihood(PositiveLikelihood):
    r"""A Gaussian for each element, :math:`N(m, \sigma^2)`, whose mean the decoder gives.

    .. math:: \log p(x | z) = -\tfrac12 \sum_i \log 2\pi + \log\sigma_i^2 + \frac{(x_i - m_i)^2}{\sigma_i^2}

    By :func:`fastvae.functional.gaussian_nll`. A learned variance sets the weight of the reconstruction against the KL by itself (Rybkin et
    al., *Simple and Effective VAE Training with Calibrated Decoders*, 2021). With ``"per_element"`` nothing keeps a variance from 0, where
    the density has no bound; let the decoder limit its log variances where the data can be fitted exactly.

    Args:
        variance: :math:`\sigma^2`: a number or a tensor that broadcasts to ``x`` by torch's rules, which are fixed; ``"global"``, one
            learned value; ``"per_channel"``, one learned value a channel; or ``"per_element"``: the decoder gives
            ``(batch, 2 * channels, ...)``, the means, then the log variances.
        channels: the channels of ``x``, for ``"per_channel"``.
        logvar: where the learned log variance of ``"global"`` and ``"per_channel"`` starts. The buffer or parameter of that name holds the
            log variance.

    Raises:
        ValueError: for an argument that does not fit, naming it.
    """

    log_name = "logvar"

    def __init__(self, variance: float | Tensor | Extent = 1.0, *, channels: int | None = None, logvar: float = 0.0):
        super().__init__("variance", variance, channels, logvar)

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        mean, logvar = self.parts(params)
        return FV.gaussian_nll(mean, x, logvar, reduction)

    def mean(self, params: Tensor) -> Tensor:
        return self.split(params)[0]

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        dtype = accumulation_dtype(params.dtype)
        mean, logvar = (part.detach().to(dtype) for part in self.parts(params))
        noise = torch.empty_like(mean).normal_(generator=generator)
        return torch.addcmul(mean, noise, torch.exp(0.5 * logvar)).to(params.dtype)
