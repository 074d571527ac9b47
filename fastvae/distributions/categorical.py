"""The categorical likelihood: one of several values for each element."""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._backend import FLOATS
from fastvae._types import CategoricalData, check_choice
from fastvae.distributions.likelihood import Likelihood
from fastvae.ops._results import accumulation_dtype

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class CategoricalLikelihood(Likelihood):
    r"""A softmax over ``num_values`` values for each element, whose logits :math:`a` the decoder gives.

    .. math:: \log p(x | z) = \sum_i a_{i, x_i} - \log \sum_k e^{a_{i, k}}

    ``data`` says what the values are and how the decoder's output is laid out:

    * ``"integers"``: ``x`` has integers from 0 to ``num_values - 1``, ``(batch, channels, ...)``; the decoder gives
      ``(batch, num_values * channels, ...)``, the logits of value 0 of all channels first. :meth:`mean` is the mean of the integers.
    * ``"images"``: the same layout for grey levels :math:`k / (K - 1)`: ``x`` is uint8, which means value / 255, or floating in [0, 1],
      rounded to the nearest level. :meth:`mean` and :meth:`sample` are in [0, 1].
    * ``"tokens"``: ``x`` is ``(batch, length)``, the decoder gives ``(batch, length, num_values)`` as sequence models do. Tokens have no
      mean, so :meth:`mean` is the most probable token.

    An integer outside the range, other than ``ignore_index``, is an error of torch on the CPU and a failed assertion on a GPU. A grey value
    outside [0, 1] counts as the nearest level.

    Args:
        num_values: :math:`K`, the number of values.
        data: ``"integers"``, ``"images"`` or ``"tokens"``.
        ignore_index: an integer whose elements have the loss 0, for padding, as in :func:`torch.nn.functional.cross_entropy`.

    Raises:
        ValueError: for an argument that does not fit, naming it.
    """

    def __init__(self, num_values: int, data: CategoricalData = "integers", *, ignore_index: int = -100):
        super().__init__()
        if isinstance(num_values, bool) or not isinstance(num_values, int) or num_values < 2:
            raise ValueError(f"num_values: got {num_values!r}, takes an integer >= 2")
        self.num_values = self.parameters_per_element = num_values
        self.data = check_choice("data", data, get_args(CategoricalData))
        self.ignore_index = ignore_index
        self.data_dtypes = (torch.uint8, *FLOATS) if data == "images" else _INTEGERS
        self.support = (0.0, 1.0 if data == "images" else num_values - 1.0)

    def params_shape(self, x: Tensor) -> tuple[int, ...]:
        return (*x.shape, self.num_values) if self.data == "tokens" else super().params_shape(x)

    def check_count(self, params: Tensor) -> None:
        if self.data != "tokens":
            super().check_count(params)
        elif params.ndim < 2 or params.shape[-1] != self.num_values:
            raise ValueError(f"decoder: gave shape {tuple(params.shape)}, has to give {self.num_values} logits in the last dimension")

    def elements(self, params: Tensor, x: Tensor) -> Tensor:
        losses = F.cross_entropy(self._logits(params), self._indices(x), reduction="none", ignore_index=self.ignore_index)
        return torch.where(x.isnan(), x, losses) if x.is_floating_point() else losses

    def mean(self, params: Tensor) -> Tensor:
        logits = self._logits(params)
        if self.data == "tokens":
            return logits.argmax(1)
        highest = 1.0 if self.data == "images" else self.num_values - 1.0
        values = torch.linspace(0.0, highest, self.num_values, dtype=logits.dtype, device=logits.device)
        return (logits.softmax(1).movedim(1, -1) @ values).to(params.dtype)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        logits = self._logits(params.detach())
        # The largest of logits with Gumbel noise, which is -log of exponential noise, is a draw (Maddison et al., 2014).
        drawn = (logits - torch.empty_like(logits).exponential_(generator=generator).log()).argmax(1)
        return (drawn / (self.num_values - 1)).to(params.dtype) if self.data == "images" else drawn

    def check_range(self, x: Tensor) -> None:
        super().check_range(x if self.data == "images" else x.long().masked_fill(x == self.ignore_index, 0))

    def extra_repr(self) -> str:
        return f"{self.num_values}, data={self.data!r}, ignore_index={self.ignore_index}"

    def _logits(self, params: Tensor) -> Tensor:
        """``(batch, num_values, *data)``, in the dtype of sums."""
        self.check_count(params)
        wide = params.to(accumulation_dtype(params.dtype))
        return wide.movedim(-1, 1) if self.data == "tokens" else wide.unflatten(1, (self.num_values, -1))

    def _indices(self, x: Tensor) -> Tensor:
        """The number of each element's value."""
        if self.data != "images" or (x.dtype == torch.uint8 and self.num_values == 256):
            return x.long()
        levels = x / 255 if x.dtype == torch.uint8 else x
        return (levels.nan_to_num(nan=0.0) * (self.num_values - 1)).round().long().clamp(0, self.num_values - 1)
