"""Group normalisation and its activation as a module."""

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import NormActivation, check_choice
from fastvae.functional._modules import describe, swap_obstacle
from fastvae.ops.group_norm import NORM_ACTIVATIONS


class GroupNormSiLU(nn.GroupNorm):
    """:func:`fastvae.functional.group_norm_silu` as a module: a :class:`torch.nn.GroupNorm` with the activation in it.

    The arguments, parameters and names of :class:`torch.nn.GroupNorm`, so that either loads the other's ``state_dict``.

    Args:
        num_groups: a divisor of ``num_channels``.
        num_channels: channels of the input, ``(batch, num_channels, ...)``.
        eps: added to the variance.
        affine: whether there are ``weight`` and ``bias``, one value a channel.
        activation: ``"silu"``, ``"relu"``, ``"gelu"``, or ``"none"`` for the normalisation alone.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: NormActivation = "silu",
    ):
        check_choice("activation", activation, NORM_ACTIVATIONS)
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        self.activation = activation

    @classmethod
    def sharing(cls, norm: nn.GroupNorm, activation: NormActivation = "silu") -> "GroupNormSiLU":
        """The module that applies ``norm`` and the activation, with the very parameters of ``norm``.

        Raises:
            ValueError: where ``norm`` is more than a :class:`torch.nn.GroupNorm`: a subclass, parametrized, or with hooks.
        """
        if reason := swap_obstacle(norm, nn.GroupNorm):
            raise ValueError(f"norm: {describe(norm)} {reason}, takes a GroupNorm of torch and nothing more")
        module = cls(norm.num_groups, norm.num_channels, norm.eps, affine=False, activation=activation)
        module.affine, module.weight, module.bias = norm.affine, norm.weight, norm.bias
        return module.train(norm.training)

    def forward(self, input: Tensor, activation: NormActivation | None = None) -> Tensor:
        """The output in the dtype and memory layout of ``input``; ``activation`` overrides the module's for this call."""
        return FV.group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps, activation or self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"
