"""The Gaussian likelihood."""

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae._types import Reduction
from fastvae.distributions.likelihood import Likelihood


class GaussianLikelihood(Likelihood):
    r"""A normal distribution of unit variance for each element, whose mean the decoder gives."""

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        return FV.gaussian_nll(params, x, 0.0, reduction)

    def mean(self, params: Tensor) -> Tensor:
        return params

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return params.detach() + torch.randn(params.shape, generator=generator, dtype=params.dtype, device=params.device)
