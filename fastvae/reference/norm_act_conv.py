"""Group normalisation, activation and convolution in plain PyTorch."""

from torch import Tensor

from fastvae._types import NormActivation, check_choice
from fastvae.ops import norm_act_conv as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.reference.group_norm import group_norm_forward


def norm_act_conv(
    input: Tensor,
    num_groups: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    activation: NormActivation = "silu",
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | ops.Padding = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """:func:`fastvae.functional.norm_act_conv`, differentiable any number of times."""
    check_choice("activation", activation, NORM_ACTIVATIONS)
    arguments = ops.Arguments(
        input,
        num_groups,
        norm_weight,
        norm_bias,
        eps,
        NORM_ACTIVATIONS[activation],
        weight,
        bias,
        ops.dtype_of_products(weight),
        *ops.geometry(weight, stride, padding, dilation),
        groups,
    )
    return _norm_act_conv(arguments)[0]


@in_plain_torch(ops.NormActConv)
def _norm_act_conv(arguments: ops.Arguments) -> tuple[Tensor]:
    return (arguments.convolve(group_norm_forward(arguments.norm()).output),)
