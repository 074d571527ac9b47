"""How evenly the codes of a codebook are used."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.distributions.prior import check_count

with extra("metrics"):
    from torchmetrics import Metric


class CodebookUsageResult(NamedTuple):
    """Float64, scalars or with several codebooks ``(heads,)``: the perplexity, the share of codes used, and the entropy in bits."""

    perplexity: Tensor
    usage: Tensor
    entropy: Tensor


class CodebookUsage(Metric):
    r"""The distribution p of the indices of a quantizer over all data.

    .. math:: H = -\sum_k p_k \log_2 p_k, \qquad \mathrm{perplexity} = 2^H

    The perplexity is ``num_codes`` where all codes are equally frequent and 1 where one is used alone. H is the estimate from counts, which
    is too low by about (codes used - 1) / (2 n ln 2) bits for n indices (Miller, *Note on the Bias of Information Estimates*, 1955).

    Args:
        num_codes: of each codebook.
        heads: codebooks, one for each place in the last dimension of the indices: the heads of a ``VectorQuantizer`` or the steps of a
            ``ResidualVectorQuantizer``. ``None`` for one codebook and indices without such a dimension.
        options: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    counts: Tensor

    def __init__(self, num_codes: int, heads: int | None = None, **options: Any):
        super().__init__(**options)
        self.num_codes = check_count("num_codes", num_codes)
        self.heads = None if heads is None else check_count("heads", heads)
        shape = (num_codes,) if heads is None else (heads, num_codes)
        self.add_state("counts", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Adds a batch.

        Args:
            indices: integers from 0 to ``num_codes - 1``, of any shape; with ``heads`` its last dimension is theirs. Those of masked
                positions and of steps left out, -1, are to be taken out first.

        Raises:
            TypeError: for another dtype.
            ValueError: for indices out of range, or another number of heads.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise TypeError(f"indices: got {indices.dtype}, takes integers")
        if self.heads is not None and (indices.ndim == 0 or indices.shape[-1] != self.heads):
            raise ValueError(f"indices: got shape {tuple(indices.shape)}, takes (..., heads) with {self.heads} heads")
        outside = (indices < 0) | (indices >= self.num_codes)
        if outside.any():
            raise ValueError(f"indices: got {indices[outside][0]}, takes integers from 0 to {self.num_codes - 1}")
        codebooks = 1 if self.heads is None else self.heads
        first = self.num_codes * torch.arange(codebooks, device=indices.device)
        places = indices.long().reshape(-1, codebooks) + first
        self.counts += torch.bincount(places.flatten(), minlength=self.counts.numel()).view_as(self.counts)

    def compute(self) -> CodebookUsageResult:
        if not self.counts.any():
            raise ValueError("indices: got none, codebook usage takes at least one")
        shares = self.counts.double() / self.counts.sum(-1, keepdim=True)
        nats = torch.special.entr(shares).sum(-1)
        return CodebookUsageResult(nats.exp(), (self.counts > 0).double().mean(-1), nats / math.log(2))
