"""The quantizers of vector-quantize-pytorch."""

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import nn as vq_nn
from fastvae.nn.residual_quantizer import DepthDropout

_UNUSED = object()


def _refuse(name: str, options: dict, neutral: dict) -> None:
    """Raises for an argument that has no counterpart, unless it is switched off."""
    for option, value in options.items():
        if value != neutral.get(option, _UNUSED):
            raise NotImplementedError(f"{option}: got {value!r}, which the twin of {name} does not offer")


# Values that switch an argument of the original off.
_NEUTRAL_VQ = {
    "freeze_codebook": False,
    "learnable_codebook": False,
    "ema_update": True,
    "layernorm_after_project_in": False,
    "accept_3d_fmap": False,
    "commitment_use_cross_entropy_loss": False,
    "orthogonal_reg_weight": 0.0,
    "orthogonal_reg_active_codes_only": False,
    "orthogonal_reg_max_codes": None,
    "codebook_diversity_loss_weight": 0.0,
    "stochastic_sample_codes": False,
    "straight_through": False,
    "directional_reparam": False,
    "sync_codebook": None,
    "sync_affine_param": False,
    "vq_bridge": None,
    "manual_ema_update": False,
    "in_place_codebook_optimizer": None,
    "manual_in_place_optimizer_update": False,
    "affine_param": False,
    "sync_update_v": 0.0,
    "return_zeros_for_masked_padding": True,
    "route_gradients_to_input": True,
    "sync_kmeans": True,
}


class VectorQuantize(nn.Module):
    """``vector_quantize_pytorch.VectorQuantize``: ``(quantized, indices, loss) = vq(x)``.

    The arguments that map are those of the signature; any other raises unless it has the value that switches it off. The loss is 0-dim,
    as in version 1.32 of the original (older ones gave it the shape ``(1,)`` in training); in evaluation it is 0. Images have their
    channels last in memory, as there.

    Args:
        dim, codebook_size, heads, separate_codebook_per_head, decay, eps, kmeans_init, kmeans_iters, use_cosine_sim,
            threshold_ema_dead_code, channel_last, accept_image_fmap, commitment_weight: as there.
        codebook_dim: ``dim / heads``: there is no projection to another dimension.
        rotation_trick: ``None`` is on for ``dim > 1``, as there.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        **others,
    ):
        super().__init__()
        _refuse("VectorQuantize", others, _NEUTRAL_VQ)
        if (dim if codebook_dim is None else codebook_dim) * heads != dim:
            raise NotImplementedError(f"codebook_dim: got {codebook_dim!r}, the twin of VectorQuantize takes dim / heads")
        rotates = dim > 1 if rotation_trick is None else rotation_trick
        self.layer = vq_nn.VectorQuantizer(
            codebook_size,
            dim,
            commitment_cost=commitment_weight,
            gradient="rotation" if rotates else "straight_through",
            decay=decay,
            eps=eps,
            revive_below=threshold_ema_dead_code,
            kmeans_iters=kmeans_iters if kmeans_init else 0,
            cosine=use_cosine_sim,
            heads=heads,
            share_codebook=not separate_codebook_per_head,
            channels_first=accept_image_fmap or not channel_last,
        )

    @property
    def codebook(self) -> Tensor:
        return self.layer.codebook

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self.layer.codebook.copy_(codes)

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        return self.layer.decode(indices)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(quantized, indices, loss)``; ``mask`` is ``False`` where a vector is padding."""
        output = self.layer(x, mask)
        return output.quantized, output.indices, output.loss if self.training else torch.zeros_like(output.loss)


_NEUTRAL_RESIDUAL = {
    "codebook_dim": None,
    "shared_codebook": False,
    "diveq": False,
    "heads": 1,
    "quantize_dropout_multiple_of": 1,
    "implicit_neural_codebook": False,
    "beam_size": None,
    "eval_beam_size": None,
    "quant_grad_frac": 0.0,
}


class ResidualVQ(nn.Module):
    """``vector_quantize_pytorch.ResidualVQ``: ``(quantized, indices, losses) = rvq(x)``, losses of shape ``(num_quantizers,)``.

    As there, the gradient reaches ``x`` once for each step; :class:`fastvae.nn.ResidualVectorQuantizer` passes it once.

    Args:
        dim, num_quantizers, codebook_size, quantize_dropout, quantize_dropout_cutoff_index, accept_image_fmap: as there.
        options: those of :class:`VectorQuantize`; any other argument raises unless it has the value that switches it off.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        accept_image_fmap: bool = False,
        **options,
    ):
        super().__init__()
        _refuse("ResidualVQ", {name: options.pop(name) for name in _NEUTRAL_RESIDUAL if name in options}, _NEUTRAL_RESIDUAL)
        self.layers = nn.ModuleList(VectorQuantize(dim, codebook_size, **options) for _ in range(num_quantizers))
        self.accept_image_fmap = accept_image_fmap
        self.depth = DepthDropout(quantize_dropout_cutoff_index + 1 if quantize_dropout else num_quantizers, num_quantizers)

    def extra_repr(self) -> str:
        return f"accept_image_fmap={self.accept_image_fmap}"

    @property
    def codebooks(self) -> Tensor:
        return torch.stack([layer.codebook for layer in self._steps()])

    def _steps(self) -> list[VectorQuantize]:
        return cast("list[VectorQuantize]", list(self.layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """``(quantized, indices, losses)``; a step that is left out has index -1 and loss 0."""
        x = x.movedim(1, -1) if self.accept_image_fmap else x
        active = self.depth.draw(x) if self.training else len(self.layers)
        residual, total, indices, losses = x, torch.zeros_like(x), [], []
        for layer in self._steps()[:active]:
            quantized, index, loss = layer(residual, mask)
            residual, total = residual - quantized.detach(), total + quantized
            indices.append(index)
            losses.append(loss)
        missing = len(self.layers) - active
        total = total.movedim(-1, 1) if self.accept_image_fmap else total
        return total, F.pad(torch.stack(indices, -1), (0, missing), value=-1), F.pad(torch.stack(losses, -1), (0, missing))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        parts = [layer.get_codes_from_indices(index) for layer, index in zip(self._steps(), indices.unbind(-1), strict=False)]
        codes = functools.reduce(torch.add, parts)
        return codes.movedim(-1, 1) if self.accept_image_fmap else codes
