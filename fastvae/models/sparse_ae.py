"""The sparse autoencoder (Ng, *Sparse autoencoder*, CS294A lecture notes, 2011)."""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from fastvae._types import ReconLoss, SparsePenalty, check_choice
from fastvae.functional._checks import check_nonnegative
from fastvae.models._reading import reading
from fastvae.models.autoencoder import AE
from fastvae.ops._results import accumulation_dtype


def _beyond_log1p(x: Tensor) -> Tensor:
    """``x - log(1 + x)``, never negative, for ``|x| <= 1 / 4``: with ``s = x / (2 + x)`` the logarithm is ``2 (s + s^3 / 3 + ...)``, and
    ``x - 2 s = s x``."""
    s = x / (2 + x)
    square = s * s
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11)))
    return s * (x - 2 * square * series)


class SparseAE(AE):
    r"""An autoencoder whose units are seldom active.

    ``penalty="kl"``: :math:`\sum_j KL(\rho \| \hat\rho_j)` between Bernoulli distributions, :math:`\hat\rho_j` the unit's mean over the
    batch, for codes in (0, 1), those of a sigmoid (Ng, *Sparse autoencoder*, CS294A lecture notes, 2011). ``penalty="l1"``:
    :math:`\sum_j |z_j|`, mean over samples.

    Args:
        encoder, decoder, recon_loss: see :class:`~fastvae.models.AE`.
        penalty: ``"kl"`` or ``"l1"``.
        weight: of the penalty.
        rho: the mean activation that ``"kl"`` asks for, in (0, 1).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        penalty: SparsePenalty = "kl",
        weight: float = 1.0,
        rho: float = 0.05,
        recon_loss: ReconLoss = "mse",
    ):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        check_choice("penalty", penalty, get_args(SparsePenalty))
        if not 0 < rho < 1:
            raise ValueError(f"rho: got {rho!r}, takes a number in (0, 1)")
        self.penalty = penalty
        self.weight = check_nonnegative("weight", weight)
        self.rho = float(rho)

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        z = self.encoder(x)
        wide = z.to(accumulation_dtype(z.dtype))
        penalty = wide.flatten(1).abs().sum(1).mean() if self.penalty == "l1" else self._divergence(wide.mean(0))
        return z, penalty, self.weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty={self.penalty!r}, weight={self.weight}, rho={self.rho}"

    def _divergence(self, rho_hat: Tensor) -> Tensor:
        # eps keeps the gradient of a unit that is never active finite. A mean outside (0, 1) gives NaN.
        rho, eps = self.rho, torch.finfo(rho_hat.dtype).tiny
        active = rho * (math.log(rho) - torch.log(rho_hat + eps))
        far = active + (1 - rho) * (math.log1p(-rho) - torch.log1p(-rho_hat + eps))
        # Near rho the two terms cancel but for their parts of second order, which are added up without the first.
        near = (rho_hat - rho).abs() < 0.25 * min(rho, 1 - rho)
        excess = torch.where(near, rho_hat - rho, 0.0)
        return torch.where(near, rho * _beyond_log1p(excess / rho) + (1 - rho) * _beyond_log1p(-excess / (1 - rho)), far).sum()

    @reading
    def mean_activation(self, x: Tensor) -> Tensor:
        """The mean of each unit of the code over a batch; of its absolute value with ``"l1"``."""
        z = self.encode(x)
        return (z.abs() if self.penalty == "l1" else z).mean(0)
