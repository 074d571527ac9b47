"""Layers for ``kernels.kernelize``: each replaces the ``forward`` of a module, whose attributes it reads, and has no state of its own."""

import torch
from torch import Tensor, nn

from . import functional as FV


class GroupNorm(nn.Module):
    """In place of :class:`torch.nn.GroupNorm`."""

    can_torch_compile: bool = True

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return FV.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, "none")


class GroupNormSiLU(nn.Module):
    """In place of a :class:`torch.nn.GroupNorm` with SiLU behind it."""

    can_torch_compile: bool = True

    num_groups: int
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return FV.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """In place of a :class:`torch.nn.RMSNorm` of the last dimension."""

    can_torch_compile: bool = True

    weight: Tensor | None
    eps: float | None

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return FV.rms_norm_silu(x, self.weight, None, eps, dim=-1, activation="none")


class RMSNormSiLU(nn.Module):
    """In place of an RMS normalisation of the channels, dimension 1, with SiLU behind it."""

    can_torch_compile: bool = True

    weight: Tensor | None
    eps: float

    def forward(self, input: Tensor) -> Tensor:
        return FV.rms_norm_silu(input, self.weight, None, self.eps)


class Snake(nn.Module):
    """In place of a Snake activation with one frequency a channel, ``alpha``."""

    can_torch_compile: bool = True

    alpha: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return FV.snake(x, self.alpha)


class NearestCode(nn.Module):
    """In place of a search of ``codebook``, ``(codes, dim)``: the indices of the codes nearest to vectors ``(..., dim)``."""

    can_torch_compile: bool = True

    codebook: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return FV.vq_nearest(x, self.codebook)


class VectorQuantize(nn.Module):
    """In place of a quantizer without a moving average: the codes of ``codebook`` nearest to vectors ``(..., dim)``, with the gradient
    straight through, their indices, and the loss of codebook and commitment."""

    can_torch_compile: bool = True

    codebook: Tensor
    commitment_cost: float

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = FV.vector_quantize(x, self.codebook, commitment_cost=self.commitment_cost)
        return quantized, indices, loss
