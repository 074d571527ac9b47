"""RMS normalisation and its activation as a module."""

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import EpsMode, NormActivation, check_choice
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES


class RMSNormSiLU(nn.Module):
    """:func:`fastvae.functional.rms_norm_silu` as a module: a normalisation of the channels of each position with the activation in it.

    ``weight`` is named as in :class:`torch.nn.RMSNorm`, so that either loads the other's ``state_dict``. Of that one, which normalises the
    last dimension, it takes the place with ``dim=-1``.

    Args:
        num_channels: channels of the input, ``(batch, num_channels, ...)``.
        eps: added to the mean square, see ``eps_mode``.
        elementwise_affine: whether there is a ``weight``, one value a channel.
        bias: whether there is a ``bias`` beside it.
        device, dtype: of the parameters.
        dim: the dimension of the channels.
        activation: ``"silu"``, ``"relu"``, ``"gelu"``, or ``"none"`` for the normalisation alone.
        eps_mode: ``"clamp"`` bounds the norm of a position's channels from below by ``eps`` instead.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dim: int = 1,
        activation: NormActivation = "silu",
        eps_mode: EpsMode = "add",
    ):
        check_choice("activation", activation, NORM_ACTIVATIONS)
        check_choice("eps_mode", eps_mode, EPS_MODES)
        if isinstance(num_channels, bool) or not isinstance(num_channels, int) or num_channels < 1:
            raise ValueError(f"num_channels: got {num_channels!r}, takes an int >= 1")
        super().__init__()
        self.num_channels, self.eps, self.dim, self.activation, self.eps_mode = num_channels, eps, dim, activation, eps_mode
        for name, there in (("weight", elementwise_affine), ("bias", bias)):
            self.register_parameter(name, nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if there else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Makes the weight 1 and the bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, activation: NormActivation | None = None) -> Tensor:
        """The output in the dtype and memory layout of ``input``; ``activation`` overrides the module's for this call."""
        return FV.rms_norm_silu(
            input, self.weight, self.bias, self.eps, dim=self.dim, activation=activation or self.activation, eps_mode=self.eps_mode
        )

    def extra_repr(self) -> str:
        affine = f"elementwise_affine={self.weight is not None}, bias={self.bias is not None}"
        return f"{self.num_channels}, eps={self.eps}, {affine}, dim={self.dim}, activation={self.activation!r}, eps_mode={self.eps_mode!r}"
