"""Snake as a module."""

import torch
from torch import Tensor, nn

from fastvae import functional as FV


class Snake(nn.Module):
    """:func:`fastvae.functional.snake` as a module, whose frequencies are learned.

    Parameters and names are those of the audio autoencoders Oobleck, DAC and BigVGAN: ``alpha`` and, where there is one, ``beta``, each
    ``(1, channels, 1)``.

    Args:
        channels: channels of the input, ``(batch, channels, ...)``.
        with_beta: whether there is a ``beta`` of its own (SnakeBeta).
        log_scale: whether the parameters are logarithms of the frequencies; both start at a frequency of 1.
        eps: added to ``beta``.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        *,
        with_beta: bool = False,
        log_scale: bool = False,
        eps: float = 1e-9,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
            raise ValueError(f"channels: got {channels!r}, takes an integer >= 1")
        self.channels, self.log_scale, self.eps = channels, log_scale, eps
        start = torch.full((1, channels, 1), 0.0 if log_scale else 1.0, device=device, dtype=dtype)
        self.alpha = nn.Parameter(start)
        self.beta = nn.Parameter(start.clone()) if with_beta else None

    def forward(self, input: Tensor) -> Tensor:
        """The output in the dtype and memory layout of ``input``."""
        beta = None if self.beta is None else self._scaled(self.beta)
        return FV.snake(input, self._scaled(self.alpha), beta, eps=self.eps)

    def _scaled(self, parameter: Tensor) -> Tensor:
        return parameter.exp() if self.log_scale else parameter

    def extra_repr(self) -> str:
        return f"{self.channels}, with_beta={self.beta is not None}, log_scale={self.log_scale}, eps={self.eps}"
