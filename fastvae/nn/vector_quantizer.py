"""Vector quantization as a layer, with a codebook that learns by gradient or by moving averages."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae.functional._checks import check_choice, check_nonnegative
from fastvae.functional.codebook import GRADIENTS, codebook_ema_step_, codebook_sums

UPDATES = ("ema", "gradient")


@exportable
class VQOutput(NamedTuple):
    """What a quantizer gives.

    ``perplexity`` is :math:`\\exp(-\\sum_k p_k \\log p_k)` of the batch's code frequencies, from 1 (one code) to the number of codes, and
    ``usage`` the share of codes that occur in the batch; both are means over heads, over all processes, and carry no gradient.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor
    usage: Tensor


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _all_reduce(*tensors: Tensor) -> None:
    if _is_distributed():
        for tensor in tensors:
            distributed.all_reduce(tensor)


class VectorQuantizer(nn.Module):
    r"""Replaces vectors with the nearest of ``num_codes`` learned codes (van den Oord et al., *Neural Discrete Representation
    Learning*, 2017).

    In training mode the codebook learns: with ``update="ema"`` it follows the means of its vectors
    (:func:`fastvae.functional.codebook_ema_update_`), with ``"gradient"`` it is a parameter that the loss moves. Where
    ``torch.distributed`` runs, counts and sums are added over all processes, so that their codebooks stay equal.

    Args:
        num_codes: size of the codebook.
        dim: length of the vectors; with several heads, of all heads together.
        update: ``"ema"`` or ``"gradient"``.
        commitment_cost: weight of the loss that pulls vectors to their codes.
        gradient: ``"straight_through"`` or ``"rotation"``, see :func:`fastvae.functional.vector_quantize`.
        decay, eps: of the moving averages.
        revive_below: a code whose moving count of vectors falls below this is replaced with a vector of the batch, and its count and
            sum with it, so that it does not die again at once; 0 for never.
        kmeans_iters: iterations of k-means on the first training batch, from which the codebook starts; 0 for a random start.
        cosine: compares directions: vectors and codes are scaled to length 1.
        heads: splits each vector into so many parts that are quantized separately.
        share_codebook: one codebook for all heads; by default each has its own.
        channels_first: takes ``(batch, dim, ...)`` in place of ``(..., dim)``.
    """

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        update: str = "ema",
        commitment_cost: float = 0.25,
        gradient: str = "straight_through",
        decay: float = 0.99,
        eps: float = 1e-5,
        revive_below: float = 0.0,
        kmeans_iters: int = 0,
        cosine: bool = False,
        heads: int = 1,
        share_codebook: bool = False,
        channels_first: bool = False,
    ):
        super().__init__()
        check_choice("update", update, UPDATES)
        check_choice("gradient", gradient, GRADIENTS)
        if num_codes < 1:
            raise ValueError(f"num_codes: got {num_codes}, takes at least 1")
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: got {heads}, takes a divisor of dim, {dim}")
        self.num_codes, self.dim, self.heads = num_codes, dim, heads
        self.update, self.gradient = update, gradient
        self.commitment_cost = check_nonnegative("commitment_cost", commitment_cost)
        self.decay, self.eps = decay, eps
        self.revive_below = check_nonnegative("revive_below", revive_below)
        self.kmeans_iters = kmeans_iters
        self.cosine, self.share_codebook, self.channels_first = cosine, share_codebook, channels_first

        shape = (num_codes, dim // heads) if heads == 1 or share_codebook else (heads, num_codes, dim // heads)
        codebook = torch.empty(shape).uniform_(-1.0 / num_codes, 1.0 / num_codes)
        codebook = F.normalize(codebook, dim=-1) if cosine else codebook
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_sum", codebook.clone())
        self.register_buffer("ema_count", torch.ones(shape[:-1]))
        self.register_buffer("started", torch.tensor(kmeans_iters == 0))
        # What `started` holds: reading it from the device at every call would wait for it.
        self._started = kmeans_iters == 0

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._started = bool(self.started)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VQOutput:
        """Quantizes ``x``.

        Args:
            x: ``(..., dim)``, or ``(batch, dim, ...)`` with ``channels_first``.
            mask: bool, the shape of ``indices`` without heads: ``False`` leaves a vector out of the loss, the codebook and the
                statistics; it is quantized to 0, and its index is -1.

        Returns:
            :class:`VQOutput`; the indices have the shape of ``x`` without ``dim``, and with several heads a last dimension for them.
        """
        if self.channels_first:
            x = x.movedim(1, -1)
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: got {x.shape[-1]} channels, takes dim, {self.dim}")
        rows = self._split_heads(x)
        row_mask = None if mask is None else self._split_mask(mask, x)
        learns = self.training and (self.update == "ema" or self.revive_below > 0)
        if self.training:
            self._start(rows.detach(), row_mask)
        if self.cosine:
            rows = F.normalize(rows, dim=-1)
        # A copy where the codebook changes before the backward pass.
        codes = self.codebook.clone() if learns else self.codebook
        if self.cosine and self.update == "gradient":
            codes = F.normalize(codes, dim=-1)

        quantized, indices, loss = self._quantize(rows, codes, row_mask)
        statistics = self._statistics(rows.detach(), indices, row_mask, learns)
        quantized = self._join_heads(quantized, x.shape)
        indices = self._join_indices(indices, x.shape[:-1])
        if self.channels_first:
            quantized = quantized.movedim(-1, 1)
        return VQOutput(quantized, indices, loss, *statistics)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at ``indices`` as :meth:`forward` returns them, in the layout of its input; 0 for index -1."""
        codebook = F.normalize(self.codebook, dim=-1) if self.cosine else self.codebook
        index = indices.clamp(min=0)
        if codebook.ndim == 3:
            codes = torch.stack([codebook[head][index[..., head]] for head in range(self.heads)], dim=-2)
        else:
            codes = codebook[index]
        codes = torch.where(indices[..., None] < 0, 0.0, codes)
        if self.heads > 1:
            codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self.channels_first else codes

    def _quantize(self, rows: Tensor, codes: Tensor, mask: Tensor | None) -> FV.VQ:
        costs = {"commitment_cost": self.commitment_cost, "codebook_cost": 1.0 if self.update == "gradient" else 0.0}
        if mask is None:
            return FV.vector_quantize(rows, codes, gradient=self.gradient, **costs)
        # A masked vector may be anything, NaN too.
        quantized, indices, errors = FV.vector_quantize(
            torch.where(mask[..., None], rows, 0.0), codes, gradient=self.gradient, reduction="none", **costs
        )
        kept = torch.where(mask[..., None], errors.float(), 0.0).sum()
        loss = kept / (mask.sum().clamp(min=1) * rows.shape[-1])
        return FV.VQ(torch.where(mask[..., None], quantized, 0.0), torch.where(mask, indices, -1), loss)

    @torch.no_grad()
    def _statistics(self, rows: Tensor, indices: Tensor, mask: Tensor | None, learns: bool) -> tuple[Tensor, Tensor]:
        """Perplexity and usage; in training the codebook learns from the same counts."""
        if learns:
            counts, sums = codebook_sums(rows, indices, self.codebook)
            _all_reduce(counts, sums)
            self._learn(counts, sums)
            if self.revive_below > 0:
                self._revive(rows, mask)
        else:
            counts = _histogram(indices, self.codebook.shape[:-1])
            _all_reduce(counts)
        share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
        perplexity = torch.exp(-torch.special.xlogy(share, share).sum(-1)).mean()
        return perplexity, (counts > 0).float().mean()

    def _learn(self, counts: Tensor, sums: Tensor) -> None:
        if self.update == "gradient":
            self.ema_count.lerp_(counts.to(self.ema_count.dtype), 1.0 - self.decay)
            return
        codebook_ema_step_(self.codebook, self.ema_count, self.ema_sum, counts, sums, decay=self.decay, eps=self.eps)
        if self.cosine:
            self.codebook.copy_(F.normalize(self.codebook, dim=-1))

    def _revive(self, rows: Tensor, mask: Tensor | None) -> None:
        fresh = self._sample(rows, mask)
        dead = (self.ema_count < self.revive_below) & torch.isfinite(fresh).all(-1)
        self.codebook.copy_(torch.where(dead[..., None], fresh, self.codebook))
        self.ema_count.masked_fill_(dead, self.revive_below)
        if self.update == "ema":
            self.ema_sum.copy_(torch.where(dead[..., None], fresh * self.revive_below, self.ema_sum))

    def _sample(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """One vector of the batch for each code, in the shape of the codebook; NaN where the batch has none.

        Vectors at equal distances in the batch, from a random place on, so that none is drawn twice unless they are fewer than the codes.
        """
        flat = rows.reshape(-1, *rows.shape[-2:]) if self.codebook.ndim == 3 else rows.reshape(1, -1, rows.shape[-1])
        if flat.shape[1] == 0:
            fresh = flat.new_full(self.codebook.shape, float("nan"))
        else:
            available = flat.new_full((flat.shape[0], 1), flat.shape[1], dtype=torch.int64)
            if mask is not None:
                kept = mask.reshape(flat.shape[:2])
                available = kept.sum(1, keepdim=True)
            step = (available // self.num_codes).clamp(min=1)
            offset = torch.randint(2**31, available.shape, device=rows.device)
            chosen = (offset + step * torch.arange(self.num_codes, device=rows.device)) % available.clamp(min=1)
            if mask is not None:
                # Vectors that are left out go to the end.
                chosen = torch.argsort((~kept).to(torch.int8), dim=1, stable=True).gather(1, chosen)
            fresh = flat.gather(1, chosen[..., None].expand(*chosen.shape, flat.shape[-1]))
            fresh = torch.where(available[..., None] > 0, fresh, float("nan")).view(self.codebook.shape)
        fresh = fresh.to(self.codebook.dtype).contiguous()
        if _is_distributed():
            distributed.broadcast(fresh, src=0)
        return fresh

    @torch.no_grad()
    def _start(self, rows: Tensor, mask: Tensor | None) -> None:
        """k-means on the first batch."""
        if self._started:
            return
        rows = F.normalize(rows, dim=-1) if self.cosine else rows
        fresh = self._sample(rows, mask)
        codes = torch.where(torch.isfinite(fresh), fresh, self.codebook)
        counts = torch.zeros_like(self.ema_count)
        safe = rows if mask is None else torch.where(mask[..., None], rows, 0.0)
        for _ in range(self.kmeans_iters):
            indices = FV.vq_nearest(safe, codes)
            indices = indices if mask is None else torch.where(mask, indices, -1)
            counts, sums = codebook_sums(safe, indices, codes)
            _all_reduce(counts, sums)
            means = (sums / counts.clamp(min=1)[..., None]).to(codes.dtype)
            means = F.normalize(means, dim=-1) if self.cosine else means
            codes = torch.where(counts[..., None] > 0, means, codes)
        self.codebook.copy_(codes)
        self.ema_count.copy_(counts)
        if self.update == "ema":
            self.ema_sum.copy_(codes * self.ema_count[..., None])
        self.started.fill_(True)
        self._started = True

    def _split_heads(self, x: Tensor) -> Tensor:
        """``x``, or (heads, rows, dim of a head) where each head has a codebook, or (rows, heads, dim of a head) where they share one."""
        if self.heads == 1:
            return x
        split = x.reshape(-1, self.heads, self.dim // self.heads)
        return split if self.share_codebook else split.transpose(0, 1)

    def _split_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise ValueError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, takes torch.bool of shape {tuple(x.shape[:-1])}")
        if self.heads == 1:
            return mask
        spread = mask.reshape(-1, 1).expand(-1, self.heads)
        return spread if self.share_codebook else spread.transpose(0, 1)

    def _join_heads(self, quantized: Tensor, shape: torch.Size) -> Tensor:
        if self.heads == 1:
            return quantized
        return (quantized if self.share_codebook else quantized.transpose(0, 1)).reshape(shape)

    def _join_indices(self, indices: Tensor, shape: torch.Size) -> Tensor:
        if self.heads == 1:
            return indices
        return (indices if self.share_codebook else indices.transpose(0, 1)).reshape(*shape, self.heads)

    def extra_repr(self) -> str:
        names = ("update", "commitment_cost", "gradient", "decay", "revive_below", "kmeans_iters", "cosine", "heads", "channels_first")
        return f"{self.num_codes}, {self.dim}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _histogram(indices: Tensor, shape: torch.Size) -> Tensor:
    """How often each code occurs: int64 in ``shape``, (codes,) or (heads, codes)."""
    flat = indices.reshape(shape[0] if len(shape) == 2 else 1, -1)
    counts = torch.zeros((flat.shape[0], shape[-1] + 1), dtype=torch.int64, device=indices.device)
    # The last bin takes what is left out.
    counts.scatter_add_(1, torch.where(flat < 0, shape[-1], flat), torch.ones_like(flat))
    return counts[:, :-1].reshape(shape)


class ResidualVectorQuantizer(nn.Module):
    """Quantizes a vector in steps, each the error of the steps before (Zeghidour et al., *SoundStream*, 2021, algorithm 1).

    The gradient of ``quantized`` reaches ``x`` once and unchanged, whatever the number of steps.

    Args:
        num_quantizers: steps.
        num_codes, dim: of each step's :class:`VectorQuantizer`.
        quantizer_dropout: in training each call uses a random number of steps, so that few of them give a coarse version.
        min_quantizers: the fewest that it uses.
        channels_first: takes ``(batch, dim, ...)`` in place of ``(..., dim)``.
        options: of :class:`VectorQuantizer`; ``gradient`` and ``heads`` are not offered.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        dim: int,
        *,
        quantizer_dropout: bool = False,
        min_quantizers: int = 1,
        channels_first: bool = False,
        **options,
    ):
        super().__init__()
        for name in ("gradient", "heads", "share_codebook"):
            if name in options:
                raise TypeError(f"{name}: not an option of a residual quantizer")
        if not 1 <= min_quantizers <= num_quantizers:
            raise ValueError(f"min_quantizers: got {min_quantizers}, takes 1 to num_quantizers, {num_quantizers}")
        self.layers = nn.ModuleList(VectorQuantizer(num_codes, dim, **options) for _ in range(num_quantizers))
        self.quantizer_dropout, self.min_quantizers, self.channels_first = quantizer_dropout, min_quantizers, channels_first

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VQOutput:
        """:class:`VQOutput`: the sum of the steps' codes and losses, indices with a last dimension for the steps (-1 for one left out),
        perplexity and usage of each step, shape ``(num_quantizers,)`` (0 for one left out)."""
        if self.channels_first:
            x = x.movedim(1, -1)
        active = self._active(x.device)
        residual, total, loss, outputs = x, torch.zeros_like(x), 0.0, []
        for layer in self.layers[:active]:
            output = layer(residual, mask)
            codes = output.quantized.detach()
            residual, total, loss = residual - codes, total + codes, loss + output.loss
            outputs.append(output)
        missing = len(self.layers) - active
        indices = F.pad(torch.stack([o.indices for o in outputs], dim=-1), (0, missing), value=-1)
        perplexity, usage = (F.pad(torch.stack([getattr(o, name) for o in outputs]), (0, missing)) for name in ("perplexity", "usage"))
        quantized = x + (total - x).detach()
        if mask is not None:
            quantized = torch.where(mask[..., None], quantized, 0.0)
        return VQOutput(quantized.movedim(-1, 1) if self.channels_first else quantized, indices, loss, perplexity, usage)

    def decode(self, indices: Tensor) -> Tensor:
        """The sum of the codes at ``indices``, the last dimension of which holds the first steps, or all."""
        codes = sum(layer.decode(index) for layer, index in zip(self.layers, indices.unbind(-1), strict=False))
        return codes.movedim(-1, 1) if self.channels_first else codes

    def _active(self, device: torch.device) -> int:
        """How many steps this call takes; the same in all processes, which would otherwise wait for each other for ever."""
        if not (self.training and self.quantizer_dropout):
            return len(self.layers)
        drawn = torch.randint(self.min_quantizers, len(self.layers) + 1, ())
        if _is_distributed():
            drawn = drawn.to(device)
            distributed.broadcast(drawn, src=0)
        return int(drawn)
