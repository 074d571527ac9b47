"""Group normalisation, activation and convolution, with half the memory for the backward pass."""

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._types import NormActivation
from fastvae.functional._call import apply
from fastvae.functional._checks import check_device, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.functional.group_norm import norm_arguments
from fastvae.ops import norm_act_conv as ops


@documented
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
    r"""A convolution of :func:`group_norm_silu`, for which the backward pass keeps ``input`` and two numbers a group.

    .. math:: y = W * a(\mathrm{GroupNorm}(x)) + b

    One after the other the two keep the input of each. Here the backward pass computes the convolution's input again from ``input``: on
    the CPU beside the gradient of the normalisation, over which it is written, elsewhere by one more pass over memory. Output and gradients
    are those of the two functions to the last bit. Under autocast the convolution is in autocast's dtype.

    Args:
        input: :math:`x`, ``(batch, channels, ...)`` with one to three dimensions of positions; see :func:`group_norm_silu`.
        num_groups: number of groups of the normalisation, a divisor of ``channels``.
        norm_weight, norm_bias: of the normalisation, ``(channels,)``, in the dtype of ``input`` or in float32; 1 and 0 where they are None.
        weight: of the convolution, ``(out_channels, channels / groups, ...)``, in the dtype of ``input``; under autocast in any.
        bias: of the convolution, ``(out_channels,)``, in the dtype of ``weight``.
        eps: added to the variance.
        activation: :math:`a`: ``"silu"``, ``"relu"``, ``"gelu"``, or ``"none"`` for the normalisation alone.
        stride, padding, dilation, groups: those of :func:`torch.nn.functional.conv2d`, whose ``padding="same"`` is for kernels that it pads
            alike at both ends.

    Returns:
        What the convolution gives, in its dtype and memory layout.

    Raises:
        $errors
    """
    norm = norm_arguments(input, num_groups, norm_weight, norm_bias, eps, activation, prefix="norm_")
    _check_convolution(input, weight, bias, groups)
    dtype = _checked_dtype(input, weight, bias)
    arguments = ops.Arguments(*norm, weight, bias, dtype, *ops.geometry(weight, stride, padding, dilation), groups)
    return apply(ops.NormActConv, arguments, _backend.resolve("group_norm_forward", input.device, input.dtype))[0]


def _check_convolution(input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    check_tensor("weight", weight)
    check_device("weight", weight, "input", input)
    if input.ndim not in (3, 4, 5):
        raise ValueError(f"input: got shape {tuple(input.shape)}, takes one to three dimensions behind (batch, channels)")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: got {groups!r}, takes an integer >= 1")
    if weight.ndim != input.ndim or weight.shape[1] * groups != input.shape[1] or weight.shape[0] % groups:
        takes = f"(out_channels, {input.shape[1]} / groups, ...) with {input.ndim} dimensions, out_channels a multiple of groups"
        raise ValueError(f"weight: got shape {tuple(weight.shape)} with groups {groups}, takes {takes}")
    if bias is not None:
        check_tensor("bias", bias)
        check_device("bias", bias, "input", input)
        check_shape("bias", bias, weight.shape[:1], "one value an output channel")


def _checked_dtype(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype in which the convolution multiplies."""
    # Autocast leaves float64 as it is, and brings everything else to its dtype.
    casts = ops.autocast_dtype(input.device) is not None and torch.float64 not in (input.dtype, weight.dtype)
    if weight.dtype != input.dtype and not casts:
        raise TypeError(f"weight: got {weight.dtype}, takes the dtype of input, {input.dtype}, outside autocast")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias: got {bias.dtype}, takes the dtype of weight, {weight.dtype}")
    return ops.dtype_of_products(weight)
