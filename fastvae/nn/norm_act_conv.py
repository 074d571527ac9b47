"""Group normalisation, activation and convolution as a module, and as a call of two modules."""

from typing import Any, ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import NormActivation
from fastvae.functional._modules import read_obstacle
from fastvae.nn.group_norm import GroupNormSiLU


def lean_obstacle(norm: nn.Module, conv: nn.Module) -> str | None:
    """Why ``conv(norm(input))`` cannot be one call, to stand behind "it"; None where it can: a call of the two does what their classes say
    and nothing more, as they are now."""
    if type(norm) is not GroupNormSiLU:
        return f"is a {type(norm).__name__} and not a GroupNormSiLU"
    if not _is_convolution(conv):
        return f"is followed by a {type(conv).__name__} and not by a convolution of torch"
    if reason := read_obstacle(norm):
        return reason
    if reason := read_obstacle(conv):
        return f"is followed by a convolution that {reason}"
    if conv.padding_mode != "zeros":
        return f"is followed by a convolution with padding_mode {conv.padding_mode!r}"
    if conv.padding == "same" and any(dilation * (size - 1) % 2 for dilation, size in zip(conv.dilation, conv.kernel_size, strict=True)):
        return "is followed by a convolution that pads its ends differently"
    return None


def _is_convolution(module: nn.Module) -> TypeGuard[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def norm_then_conv(norm: nn.Module, conv: nn.Module, input: Tensor) -> Tensor:
    """``conv(norm(input))``, by :func:`fastvae.functional.norm_act_conv` where that is possible."""
    if lean_obstacle(norm, conv) or not isinstance(norm, GroupNormSiLU) or not _is_convolution(conv):
        return conv(norm(input))
    return FV.norm_act_conv(
        input,
        norm.num_groups,
        norm.weight,
        norm.bias,
        conv.weight,
        conv.bias,
        eps=norm.eps,
        activation=norm.activation,
        stride=conv.stride,
        padding=cast("Any", conv.padding),
        dilation=conv.dilation,
        groups=conv.groups,
    )


class _NormActConv(nn.Module):
    _conv_class: ClassVar[Any]

    norm: GroupNormSiLU

    def __init__(
        self,
        num_groups: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: NormActivation = "silu",
    ):
        super().__init__()
        self.norm = GroupNormSiLU(num_groups, in_channels, eps, affine, device, dtype, activation=activation)
        sizes = in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        self.conv = self._conv_class(*sizes, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The output in the dtype and memory layout that the convolution gives."""
        return norm_then_conv(self.norm, self.conv, input)


class NormActConv2d(_NormActConv):
    """:func:`fastvae.functional.norm_act_conv` of images as a module: a :class:`GroupNormSiLU`, ``norm``, and a :class:`torch.nn.Conv2d`,
    ``conv``. Where one of the two has hooks, is parametrized or sharded, or is replaced by something else, they are called one after the
    other.

    Args:
        num_groups: groups of the normalisation, a divisor of ``in_channels``.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: those of the convolution.
        eps: added to the variance.
        affine: whether the normalisation has a weight and a bias.
        device, dtype: of the parameters.
        activation: ``"silu"``, ``"relu"``, ``"gelu"``, or ``"none"`` for the normalisation alone.
    """

    _conv_class = nn.Conv2d


class NormActConv3d(_NormActConv):
    """:func:`fastvae.functional.norm_act_conv` of volumes and videos as a module: a :class:`GroupNormSiLU`, ``norm``, and a
    :class:`torch.nn.Conv3d`, ``conv``; see :class:`NormActConv2d`.

    Args:
        num_groups: groups of the normalisation, a divisor of ``in_channels``.
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: those of the convolution.
        eps: added to the variance.
        affine: whether the normalisation has a weight and a bias.
        device, dtype: of the parameters.
        activation: ``"silu"``, ``"relu"``, ``"gelu"``, or ``"none"`` for the normalisation alone.
    """

    _conv_class = nn.Conv3d
