"""The layers that fastvae replaces, in plain PyTorch: the baselines of the demonstration and of the benchmarks."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._types import NormActivation
from fastvae.nn import GroupNormSiLU, UpsampleConv2d
from fastvae.ops.group_norm import NORM_ACTIVATIONS, activated


class PlainGroupNormSiLU(nn.GroupNorm):
    """The modules of torch that :class:`fastvae.nn.GroupNormSiLU` replaces."""

    def __init__(self, num_groups: int, num_channels: int, eps: float, activation: NormActivation):
        super().__init__(num_groups, num_channels, eps)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        return activated(super().forward(input), NORM_ACTIVATIONS[self.activation])


class PlainUpsampleConv2d(nn.Conv2d):
    """The modules of torch that :class:`fastvae.nn.UpsampleConv2d` replaces."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def with_plain_layers(model: AnyModule) -> AnyModule:
    """The model, its layers of fastvae replaced by those of torch with the same weights."""
    plain: nn.Module
    for name, module in list(model.named_modules()):
        if type(module) is GroupNormSiLU:
            plain = PlainGroupNormSiLU(module.num_groups, module.num_channels, module.eps, module.activation)
        elif type(module) is UpsampleConv2d:
            plain = PlainUpsampleConv2d(module.in_channels, module.out_channels, 3, padding=1)
        else:
            continue
        plain.load_state_dict(module.state_dict())
        model.set_submodule(name, plain)
    return model


def quantize_and_move(
    x: Tensor, codebook: Tensor, ema_count: Tensor, ema_sum: Tensor, decay: float = 1.0, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The training step of a vector quantizer: ``(quantized, loss)``. Moves the codebook and its moving averages in place.

    Args:
        x: vectors, ``(count, dim)``.
        codebook: ``(num_codes, dim)``.
        ema_count: moving count of the vectors of each code, ``(num_codes,)``.
        ema_sum: moving sum of the vectors of each code, ``(num_codes, dim)``.
        decay, eps: of the moving averages.
    """
    with torch.no_grad():
        indices = torch.cdist(x, codebook).argmin(-1)
        codes = codebook[indices]
    quantized = x + (codes - x).detach()
    loss = F.mse_loss(x, codes)
    with torch.no_grad():
        one_hot = F.one_hot(indices, len(codebook)).type(x.dtype)
        ema_count.lerp_(one_hot.sum(0), 1 - decay)
        ema_sum.lerp_(one_hot.T @ x, 1 - decay)
        total = ema_count.sum()
        codebook.copy_(ema_sum / ((ema_count + eps) / (total + len(codebook) * eps) * total)[:, None])
    return quantized, loss


class PlainVectorQuantizer(nn.Module):
    """:func:`quantize_and_move` as a layer of images: ``(quantized, loss) = layer(x)``.

    Args:
        num_codes, dim: of the codebook.
        commitment_cost: weight of the loss.
        decay: of the moving averages.
    """

    codebook: Tensor
    ema_count: Tensor
    ema_sum: Tensor

    def __init__(self, num_codes: int, dim: int, *, commitment_cost: float = 0.25, decay: float = 0.99):
        super().__init__()
        self.commitment_cost, self.decay = commitment_cost, decay
        self.register_buffer("codebook", torch.randn(num_codes, dim))
        self.register_buffer("ema_count", torch.ones(num_codes))
        self.register_buffer("ema_sum", self.codebook.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantizes ``(batch, dim, ...)``."""
        vectors = x.movedim(1, -1)
        rows = vectors.reshape(-1, x.shape[1])
        quantized, loss = quantize_and_move(rows, self.codebook, self.ema_count, self.ema_sum, self.decay)
        return quantized.view(vectors.shape).movedim(-1, 1), self.commitment_cost * loss
