"""A positive parameter of a likelihood, such as its variance: fixed, learned, or given by the decoder."""

import math
from typing import get_args

import torch
from torch import Tensor, nn

from fastvae._types import Extent, check_choice
from fastvae.distributions.likelihood import Likelihood
from fastvae.functional._checks import check_interval, check_tensor


class PositiveLikelihood(Likelihood):
    """The base of likelihoods with a positive parameter, whose logarithm is kept, since any real number is one.

    The logarithm is a buffer where the parameter is fixed, an ``nn.Parameter`` where it is learned, and the last of the decoder's
    parameters where it is ``"per_element"``.

    Args:
        positive: the name of the argument, for errors.
        value: a positive number or tensor, which is fixed, or where the learned values are: ``"global"``, ``"per_channel"`` or
            ``"per_element"``.
        channels: the size of dimension 1 of the data, for ``"per_channel"`` alone.
        start: the logarithm at which ``"global"`` and ``"per_channel"`` start.

    Attributes:
        log_name: the name under which a subclass keeps the logarithm: that of the argument ``start`` too.
        outputs: how many parameters the decoder gives besides.
    """

    log_name: str
    outputs: int = 1

    def __init__(self, positive: str, value: float | Tensor | Extent, channels: int | None, start: float):
        super().__init__()
        self.extent = "fixed"
        self.channels = channels
        if isinstance(value, str):
            self.extent = check_choice(positive, value, get_args(Extent))
        if (self.extent == "per_channel") != (channels is not None):
            raise ValueError(f"channels: got {channels}, takes a number for {positive}='per_channel' and None for any other")
        if start != 0 and self.extent not in ("global", "per_channel"):
            raise ValueError(f"{self.log_name}: got {start}, takes another start than 0 where {positive} is 'global' or 'per_channel'")
        self.parameters_per_element = self.outputs + (self.extent == "per_element")
        if self.extent == "fixed":
            self.register_buffer(self.log_name, _logarithm(positive, value))
        elif self.extent != "per_element":
            shape = () if channels is None else (channels,)
            self.register_parameter(self.log_name, nn.Parameter(torch.full(shape, float(start))))

    def parts(self, params: Tensor) -> tuple[Tensor, ...]:
        """The decoder's other parameters, then the logarithm, which broadcasts to each of them."""
        split = self.split(params)
        if self.extent == "per_element":
            return split
        log = getattr(self, self.log_name)
        if self.extent == "per_channel":
            if split[0].shape[1] != self.channels:
                raise ValueError(f"decoder: gave {split[0].shape[1]} channels, has to give {self.channels}, the likelihood's channels")
            log = log.view(-1, *(1,) * (params.ndim - 2))
        return *split, log

    def extra_repr(self) -> str:
        return f"{self.extent}" if self.channels is None else f"{self.extent}, channels={self.channels}"


def _logarithm(positive: str, value) -> Tensor:
    """The logarithm of a fixed value."""
    if isinstance(value, Tensor):
        check_tensor(positive, value)
        finfo = torch.finfo(value.dtype)
        check_interval(positive, value, finfo.tiny, finfo.max)
        return value.detach().log()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{positive}: got {value!r}, takes a number > 0, a tensor, or one of {', '.join(map(repr, get_args(Extent)))}")
    return torch.tensor(math.log(value))
