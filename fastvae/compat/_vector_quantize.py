"""The VectorQuantize of vector-quantize-pytorch on this package's operators. Importing this file imports that library.

The fused forward pass replaces the matrix of all distances, its argmax, the one-hot matrix and its two products, and the gradient and the
loss behind them. It runs the original's own code for everything else: layouts of heads, k-means around its two sums, moving averages and
revival. So buffers move and random numbers are drawn as there.
"""

import functools
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vector_quantize_pytorch import vector_quantize_pytorch as original

from fastvae import functional as FV
from fastvae.functional._modules import call_obstacle
from fastvae.functional.codebook import codebook_sums
from fastvae.nn._recompute import with_value

# float64 is missing: the original rounds such vectors to float32 for the search and compares them in float64 for the loss.
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# How far rounding takes the squared length of a normalised float32 vector from 1, with room: a division and a root of a sum.
_UNIT_ROUNDING = 16 * torch.finfo(torch.float32).eps


class VectorQuantize(original.VectorQuantize):
    """The class of that name, whose ``forward`` is fused where its options and arguments allow it, and the original's elsewhere."""

    def forward(
        self,
        x,
        indices=None,
        mask=None,
        lens=None,
        topk=None,
        sample_codebook_temp=None,
        freeze_codebook=None,
        return_loss_breakdown=False,
        codebook_transform_fn=None,
        ema_update_weight=None,
        accum_ema_update=False,
        ema_update=None,
    ):
        update = {"ema_update_weight": ema_update_weight, "accum_ema_update": accum_ema_update, "ema_update": ema_update}
        needs_distances = any(argument is not None for argument in (indices, topk, codebook_transform_fn))
        kept = mask if lens is None else original.lens_to_mask(lens, x.shape[1]) if mask is None else None
        if needs_distances or option_obstacle(self) or not _is_served(self, x, kept, masked=mask is not None or lens is not None):
            return super().forward(
                x,
                indices=indices,
                mask=mask,
                lens=lens,
                topk=topk,
                sample_codebook_temp=sample_codebook_temp,
                freeze_codebook=freeze_codebook,
                return_loss_breakdown=return_loss_breakdown,
                codebook_transform_fn=codebook_transform_fn,
                **update,
            )
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        quantized, found, loss, breakdown = _quantize(self, x, kept, frozen, update)
        return (quantized, found, loss, breakdown) if return_loss_breakdown else (quantized, found, loss)

    def update_indices(self, x, indices, mask=None):
        """Moves the averages by given indices, with the same sums as :meth:`forward`."""
        if option_obstacle(self) or x.dtype not in _DTYPES:
            return super().update_indices(x, indices, mask=mask)
        sequence = _to_sequence(self, x)
        flat = _rows(self, sequence).detach().float()
        # As there, an index of -1 counts as 0 unless the mask leaves it out.
        found = _indices_of_rows(self, indices, sequence).clamp(min=0)
        row_mask = None if mask is None else _mask_of_rows(mask, flat)
        self._codebook.update_codebook(flat, _OneHot(flat, found, self._codebook.embed), mask=row_mask)

    update_ema_indices = update_indices


def option_obstacle(vq: original.VectorQuantize) -> str | None:
    """Why the options of a quantizer ask for the original's code; None where they do not."""
    codebook = vq._codebook
    if type(codebook) is not original.Codebook:
        return f"its codebook is a {type(codebook).__name__} and not a Codebook"
    if reason := call_obstacle(codebook):
        return f"its codebook {reason}"
    if getattr(codebook.gumbel_sample, "func", None) is not original.gumbel_sample or codebook.gumbel_sample.args:
        return "it chooses its codes by a function of its own (gumbel_sample)"
    sampling = codebook.gumbel_sample.keywords
    reasons = {
        "it draws its codes at random (stochastic_sample_codes)": sampling.get("stochastic", False),
        "its gradient is that of a softmax over all distances (straight_through)": sampling.get("straight_through", False),
        "its codes are shifted and scaled to the batch (affine_param)": codebook.affine_param,
        "its loss is a cross entropy of all distances (commitment_use_cross_entropy_loss)": vq.commitment_use_cross_entropy_loss,
        "its loss has the entropy of a softmax over all distances (codebook_diversity_loss_weight)": vq.has_codebook_diversity_loss,
        "an optimizer moves its codes in the forward pass (in_place_codebook_optimizer)": vq.in_place_codebook_optimizer is not None,
        "it adds noise to the direction of the code (directional_reparam)": vq.directional_reparam,
    }
    if vq.has_codebook_orthogonal_loss and vq.orthogonal_reg_active_codes_only and codebook.num_codebooks > 1:
        return "its heads have codebooks of their own (orthogonal_reg_active_codes_only)"
    return next((reason for reason, applies in reasons.items() if applies), None)


def _is_served(vq: original.VectorQuantize, x: Tensor, mask: Tensor | None, *, masked: bool) -> bool:
    """Whether the fused forward pass takes the tensors. The original has its own errors for those that neither takes."""
    if x.dtype not in _DTYPES or x.ndim not in _dimensions(vq):
        return False
    if masked and not _is_mask(vq, mask, x):
        return False
    # The original compares the codes of the heads with the input before it is split, which fails.
    if masked and vq.heads > 1 and vq.training and vq.has_commitment_loss:
        return False
    return not vq.use_cosine_sim or _has_unit_codes(vq._codebook)


def _is_mask(vq: original.VectorQuantize, mask: Tensor | None, x: Tensor) -> bool:
    if mask is None or mask.dtype != torch.bool or x.ndim != 3 or vq.accept_image_fmap or vq.accept_3d_fmap:
        return False
    return mask.shape == _to_sequence(vq, x).shape[:2]


def _dimensions(vq: original.VectorQuantize) -> tuple[int, ...]:
    return (4,) if vq.accept_image_fmap else (5,) if vq.accept_3d_fmap else (2, 3)


def _has_unit_codes(codebook: original.Codebook) -> bool:
    """Whether the code of the largest inner product is the nearest code. k-means may leave codes of length 0, and users may set others."""
    return bool(codebook.initted & ((codebook.embed.detach().float().square().sum(-1) - 1.0).abs() <= _UNIT_ROUNDING).all())


def _quantize(vq: original.VectorQuantize, x: Tensor, mask: Tensor | None, frozen: bool, update: dict[str, Any]):
    """``(quantized, indices, loss, loss breakdown)``."""
    codebook, given = vq._codebook, x
    x = _to_sequence(vq, given)
    rows = _rows(vq, x)
    row_mask = None if mask is None else _mask_of_rows(mask, rows)
    flat = rows.detach().float()
    if not codebook.initted:
        _start(codebook, flat, mask=row_mask)

    codes = _codes(codebook)
    learns_by_loss = vq.training and vq.learnable_codebook and not frozen
    # The moving averages change the codebook before the backward pass, for which the operator keeps it.
    kept = with_value(codes, codes) if learns_by_loss else codes.detach().clone() if vq.training else codes.detach()
    fused = FV.vector_quantize(
        rows if vq.training else rows.detach(),
        kept,
        commitment_cost=1.0,
        codebook_cost=float(learns_by_loss),
        gradient="rotation" if vq.rotation_trick else "straight_through",
    )
    routed = vq.training and given.requires_grad and vq.route_gradients_to_input
    masked_loss = mask is not None and vq.training and vq.has_commitment_loss
    # Without a gradient for the vectors, and with one for the codes where those learn; read before the averages move them.
    plain = _lookup(codes, fused.indices) if codes.requires_grad and (masked_loss or not routed) else fused.quantized.detach()
    if vq.training and not frozen:
        codebook.update_codebook(flat, _OneHot(flat, fused.indices, codebook.embed), mask=row_mask, **update)

    quantized = fused.quantized if routed else plain.to(given.dtype)
    if vq.training and vq.sync_update_v > 0.0:
        quantized = quantized + vq.sync_update_v * (quantized - quantized.detach())
    indices = _by_position(vq, fused.indices, x)
    indices = indices if vq.heads > 1 else indices.squeeze(2)

    commitment = vq.zero
    if vq.training and vq.has_commitment_loss and mask is None:
        # With both of its terms the value is twice that of the original's one.
        commitment = _as_of_mse_loss(fused.loss - 0.5 * fused.loss.detach() if learns_by_loss else fused.loss, rows)
    elif masked_loss:
        compared = (plain if learns_by_loss else plain.detach()).view(rows.shape[1:]).unflatten(0, x.shape[:2])
        commitment = F.mse_loss(compared.to(given.dtype), x, reduction="none")[mask].mean()
    loss, orthogonal = _total(vq, commitment, indices)

    quantized = vq.project_out(_by_position(vq, quantized, x).flatten(2))
    if mask is not None:
        padding = x.new_zeros((1, 1, 1)) if vq.return_zeros_for_masked_padding else x
        quantized = torch.where(mask[..., None], quantized, padding)
        indices = torch.where(mask if vq.heads == 1 else mask[..., None], indices, -1)
    breakdown = original.LossBreakdown(commitment, vq.zero, orthogonal, vq.zero)
    return _from_sequence(vq, quantized, given), _indices_from_sequence(vq, indices, given), loss, breakdown


def _as_of_mse_loss(loss: Tensor, rows: Tensor) -> Tensor:
    """``loss`` in the dtype of torch's loss of ``rows``."""
    return loss if torch.is_autocast_enabled(rows.device.type) else loss.to(rows.dtype)


def _codes(codebook: original.Codebook) -> Tensor:
    """The codes in float32, (codebooks, codes, dim)."""
    codes = (codebook.embed if codebook.learnable_codebook else codebook.embed.detach()).float()
    if codebook.vq_bridge is None:
        return codes
    with torch.autocast("cuda", enabled=False):
        return codebook.vq_bridge(codes)


def _lookup(codes: Tensor, indices: Tensor) -> Tensor:
    return torch.stack([F.embedding(found, each) for found, each in zip(indices, codes, strict=True)])


def _total(vq: original.VectorQuantize, commitment: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the term in it that keeps codes orthogonal."""
    if not vq.training:
        return vq.zero, vq.zero
    loss, orthogonal = vq.zero.requires_grad_(), vq.zero
    if vq.has_commitment_loss:
        loss = loss + commitment * vq.commitment_weight
    if vq.has_codebook_orthogonal_loss:
        orthogonal = _orthogonal_loss(vq, indices)
        loss = loss + orthogonal * vq.orthogonal_reg_weight
    return loss, orthogonal


def _orthogonal_loss(vq: original.VectorQuantize, indices: Tensor) -> Tensor:
    codes = vq._codebook.embed
    if vq.orthogonal_reg_active_codes_only:
        codes = codes[:, torch.unique(indices)]
    most = vq.orthogonal_reg_max_codes
    if most is not None and codes.shape[-2] > most:
        codes = codes[:, torch.randperm(codes.shape[-2], device=codes.device)[:most]]
    return original.orthogonal_loss_fn(codes)


class _OneHot:
    """Stands for the one-hot matrix of ``indices``, (codebooks, rows, codes), in the original's code, which masks it, sums it over its rows
    and multiplies ``rows`` by it."""

    def __init__(self, rows: Tensor, indices: Tensor, embed: Tensor):
        self.rows, self.indices, self.embed = rows, indices, embed

    @functools.cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        return codebook_sums(self.rows, self.indices, self.embed)

    def masked_fill(self, left_out: Tensor, _: float) -> "_OneHot":
        return _OneHot(self.rows, self.indices.masked_fill(left_out.squeeze(-1), -1), self.embed)

    def sum(self, dim: int) -> Tensor:
        return self._sums[0].to(self.rows.dtype)

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is not torch.einsum or arguments[1] is not arguments[2].rows:
            return NotImplemented
        return arguments[2]._sums[1]


def _kmeans(samples: Tensor, num_clusters: int, num_iters: int, *, use_cosine_sim: bool, sample_fn, all_reduce_fn) -> tuple[Tensor, Tensor]:
    """The original's function of that name for Euclidean distances: the means, and how many samples fell on each."""
    means = sample_fn(samples, num_clusters)
    for _ in range(num_iters):
        counts, sums = codebook_sums(samples, FV.vq_nearest(samples, means), means)
        all_reduce_fn(counts)
        moved = sums / counts.clamp(min=1)[..., None]
        all_reduce_fn(moved)
        means = torch.where(counts[..., None] == 0, means, moved)
    return means, counts


# The original's method, which draws the first means and fills the buffers, with these iterations.
_start = FunctionType(original.Codebook.init_embed_.__code__, {**original.Codebook.init_embed_.__globals__, "kmeans": _kmeans})
_start.__defaults__ = original.Codebook.init_embed_.__defaults__


def _to_sequence(vq: original.VectorQuantize, x: Tensor) -> Tensor:
    """(batch, length, dim)."""
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        return x.flatten(2).transpose(1, 2)
    if x.ndim == 2:
        return x.unsqueeze(1)
    return x if vq.channel_last else x.transpose(1, 2)


def _from_sequence(vq: original.VectorQuantize, quantized: Tensor, given: Tensor) -> Tensor:
    """The inverse of :func:`_to_sequence`, for an input ``given`` there."""
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        return quantized.transpose(1, 2).unflatten(2, given.shape[2:])
    if given.ndim == 2:
        return quantized.squeeze(1)
    return quantized if vq.channel_last else quantized.transpose(1, 2)


def _indices_from_sequence(vq: original.VectorQuantize, indices: Tensor, given: Tensor) -> Tensor:
    if vq.accept_image_fmap or vq.accept_3d_fmap:
        return indices.unflatten(1, given.shape[2:])
    return indices.squeeze(1) if given.ndim == 2 else indices


def _rows(vq: original.VectorQuantize, x: Tensor) -> Tensor:
    """The vectors of a sequence ``x`` as the codes are, (codebooks, rows, dim of the codes)."""
    codebook = vq._codebook
    rows = codebook.transform_input(vq.maybe_split_heads_from_input(vq.project_in(x)))
    rows = rows.to(torch.promote_types(rows.dtype, x.dtype))
    return rows.reshape(codebook.num_codebooks, rows.shape[:-1].numel() // codebook.num_codebooks, rows.shape[-1])


def _indices_of_rows(vq: original.VectorQuantize, indices: Tensor, x: Tensor) -> Tensor:
    """(codebooks, rows), of indices as they are returned for a sequence ``x``."""
    by_position = indices.reshape(*x.shape[:2], vq.heads)
    if vq._codebook.num_codebooks > 1:
        return by_position.movedim(2, 0).flatten(1)
    return by_position.transpose(1, 2).reshape(1, -1)


def _mask_of_rows(mask: Tensor, rows: Tensor) -> Tensor:
    """(codebooks, rows), in the order of the rows: batch, heads that share a codebook, length."""
    heads = rows.shape[1] // max(mask.numel(), 1)
    return mask[:, None].expand(-1, heads, -1).reshape(1, -1).expand(rows.shape[0], -1)


def _by_position(vq: original.VectorQuantize, of_rows: Tensor, x: Tensor) -> Tensor:
    """(batch, length, heads, ...) of a tensor (codebooks, rows, ...), for a sequence ``x``."""
    batch, length = x.shape[:2]
    if vq._codebook.num_codebooks > 1:
        return of_rows.unflatten(1, (batch, length)).movedim(0, 2)
    return of_rows.squeeze(0).unflatten(0, (batch, vq.heads, length)).transpose(1, 2)
