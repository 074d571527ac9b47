"""A quantizer's codebook learns from a batch: by moving averages, by revival of unused codes, and by k-means at the start."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae import functional as FV
from fastvae.functional.codebook import codebook_ema_step_, codebook_sums
from fastvae.nn import _processes


class CodebookState(NamedTuple):
    """The tensors that learn, a layer's own or copies of them, and whether the other processes learn the same at this time.

    The codebook is (codes, dim) or (heads, codes, dim). The vectors of a batch, ``rows``, are (..., dim), or (heads, rows, dim) where each
    head has a codebook; their ``mask`` has that shape without the last dimension.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor | None
    started: Tensor
    cosine: bool
    shared: bool

    def copy(self) -> "CodebookState":
        codebook, ema_count, started = (tensor.detach().clone() for tensor in (self.codebook, self.ema_count, self.started))
        ema_sum = None if self.ema_sum is None else self.ema_sum.detach().clone()
        return self._replace(codebook=codebook, ema_count=ema_count, ema_sum=ema_sum, started=started)

    def add_processes(self, *tensors: Tensor) -> None:
        if self.shared:
            _processes.all_reduce(*tensors)

    def move(self, counts: Tensor, sums: Tensor, *, decay: float, eps: float) -> None:
        """Follows the vectors of a batch by moving averages; the moving counts alone where the codebook learns by gradient."""
        if self.ema_sum is None:
            self.ema_count.lerp_(counts.to(self.ema_count.dtype), 1.0 - decay)
            return
        # The averages have all that a 16-bit codebook rounds away.
        codes = self.codebook.to(self.ema_sum.dtype)
        codebook_ema_step_(codes, self.ema_count, self.ema_sum, counts, sums, decay=decay, eps=eps)
        codes = self.scaled(codes)
        if codes is not self.codebook:
            self.codebook.copy_(codes)

    def revive(self, rows: Tensor, mask: Tensor | None, *, below: float) -> None:
        """Replaces the codes that have fewer vectors than ``below``."""
        fresh = self._sample(rows, mask)
        dead = (self.ema_count < below) & torch.isfinite(fresh).all(-1)
        self.codebook.copy_(torch.where(dead[..., None], fresh, self.codebook))
        self.ema_count.masked_fill_(dead, below)
        if self.ema_sum is not None:
            self.ema_sum.copy_(torch.where(dead[..., None], fresh * below, self.ema_sum))

    def start(self, rows: Tensor, mask: Tensor | None, *, iters: int) -> None:
        """Runs k-means on the first batch that has finite vectors."""
        rows = self.scaled(rows)
        kept = finite_rows(rows) if mask is None else mask & finite_rows(rows)
        rows = torch.where(kept[..., None], rows, 0.0)
        fresh = self._sample(rows, kept)
        codes = torch.where(torch.isfinite(fresh).all(-1, keepdim=True), fresh, self.codebook)
        counts = torch.zeros_like(self.ema_count)
        for _ in range(iters):
            counts, sums = codebook_sums(rows, torch.where(kept, FV.vq_nearest(rows, codes), -1), codes)
            self.add_processes(counts, sums)
            means = self.scaled(sums / counts.clamp(min=1)[..., None])
            codes = torch.where(counts[..., None] > 0, means, codes)
        found = counts.sum() > 0
        self.codebook.copy_(torch.where(found, codes, self.codebook))
        self.ema_count.copy_(torch.where(found, counts, self.ema_count))
        if self.ema_sum is not None:
            self.ema_sum.copy_(torch.where(found, codes * counts[..., None], self.ema_sum))
        self.started.copy_(found)

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors as they are compared: of length 1 where directions are."""
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def _sample(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """One vector of the batch for each code, in the shape of the codebook; NaN where the batch has none.

        Vectors at equal distances in the batch, from a random place on, so that none is drawn twice unless they are fewer than the codes.
        """
        flat = rows if self.codebook.ndim == 3 else rows.reshape(1, -1, rows.shape[-1])
        if flat.shape[1] == 0:
            fresh = flat.new_full(self.codebook.shape, float("nan"))
        else:
            available = flat.new_full((flat.shape[0], 1), flat.shape[1], dtype=torch.int64)
            if mask is not None:
                kept = mask.reshape(flat.shape[:2])
                available = kept.sum(1, keepdim=True)
            num_codes = self.codebook.shape[-2]
            step = (available // num_codes).clamp(min=1)
            offset = torch.randint(2**31, available.shape, device=rows.device)
            chosen = (offset + step * torch.arange(num_codes, device=rows.device)) % available.clamp(min=1)
            if mask is not None:
                # Vectors that are left out go to the end.
                chosen = torch.argsort((~kept).to(torch.int8), dim=1, stable=True).gather(1, chosen)
            fresh = flat.gather(1, chosen[..., None].expand(*chosen.shape, flat.shape[-1]))
            fresh = torch.where(available[..., None] > 0, fresh, float("nan")).view(self.codebook.shape)
        fresh = fresh.to(self.ema_count.dtype).contiguous()
        if self.shared:
            _processes.broadcast(fresh)
        return fresh


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the moving averages beside a codebook of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def finite_rows(rows: Tensor) -> Tensor:
    """A mask of the vectors that have a finite sum, and so no NaN and no infinite value. torch.isfinite would take several passes."""
    return rows.sum(-1, dtype=statistics_dtype(rows.dtype)) * 0 == 0


def perplexity_and_usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    perplexity = torch.exp(-torch.special.xlogy(share, share).sum(-1)).mean()
    return perplexity, (counts > 0).float().mean()


def histogram(indices: Tensor, shape: torch.Size) -> Tensor:
    """The number of occurrences of each code: int64 in ``shape``, (codes,) or (heads, codes)."""
    flat = indices.reshape(shape[0] if len(shape) == 2 else 1, -1)
    counts = torch.zeros((flat.shape[0], shape[-1] + 1), dtype=torch.int64, device=indices.device)
    # The last bin takes what is left out.
    counts.scatter_add_(1, torch.where(flat < 0, shape[-1], flat), torch.ones_like(flat))
    return counts[:, :-1].reshape(shape)
