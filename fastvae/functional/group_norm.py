"""Group normalisation and its activation in one operator, for training."""

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._types import NormActivation, check_choice
from fastvae.functional._call import apply
from fastvae.functional._checks import check_channel_parameter, check_eps, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops.group_norm import NORM_ACTIVATIONS, ForwardArguments, GroupNorm


@documented
def group_norm_silu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: NormActivation = "silu",
) -> Tensor:
    r"""Group normalisation (Wu and He, *Group Normalization*, 2018) followed by an activation, SiLU by default, in one
    operator.

    .. math:: y = a(u), \qquad u = \gamma_c \frac{x - \mu_{ng}}{\sqrt{\sigma^2_{ng} + \epsilon}} + \beta_c, \qquad
        a(u) = u\, \sigma(u),\; \max(u, 0)\; \text{or}\; u\, \Phi(u)

    Mean and (biased) variance are those of a sample's group of adjacent channels over all positions. The arguments of
    :func:`torch.nn.functional.group_norm`. For the backward pass ``input`` and two numbers a group are kept; :math:`u` and
    :math:`a'(u)` are computed again.

    Args:
        input: :math:`x`, ``(batch, channels, ...)``; float32, bfloat16, float16 or float64. Contiguous or with the channels last
            (``torch.channels_last``, ``torch.channels_last_3d``) it is used as it lies in memory; other strides cost a copy.
        num_groups: number of groups, a divisor of ``channels``.
        weight, bias: :math:`\gamma` and :math:`\beta`, ``(channels,)``, in the dtype of ``input`` or in float32; 1 and 0 by default.
        eps: :math:`\epsilon`.
        activation: ``"silu"``; ``"relu"``, whose derivative at 0 is 0; ``"gelu"``, with the distribution function :math:`\Phi` of the
            standard normal, not its approximation by tanh, and NaN at -inf as torch's; or ``"none"`` for the normalisation alone.

    Returns:
        :math:`y` (:math:`u` without activation), in the dtype and the memory layout of ``input``, also under autocast. Statistics and
        arithmetic are in float32 (float64 for float64), sums over more than some thousand elements in float64.

    Raises:
        $errors
    """
    arguments = norm_arguments(input, num_groups, weight, bias, eps, activation)
    return apply(GroupNorm, arguments, _backend.resolve("group_norm_forward", input.device, input.dtype))[0]


def norm_arguments(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: NormActivation,
    prefix: str = "",
) -> ForwardArguments:
    """The checked arguments of the operator. Errors name weight and bias with ``prefix``."""
    check_tensor("input", input)
    if input.ndim < 2:
        raise ValueError(f"input: got shape {tuple(input.shape)}, takes (batch, channels, ...)")
    channels = input.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | torch.SymInt) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: got {num_groups!r} for {channels} channels, takes a divisor of the number of channels")
    for name, value in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)):
        if value is not None:
            check_channel_parameter(name, value, input)
            check_shape(name, value, (channels,), "one value a channel")
    eps = check_eps(eps)
    check_choice("activation", activation, NORM_ACTIVATIONS)
    return ForwardArguments(input, num_groups, weight, bias, eps, NORM_ACTIVATIONS[activation])
