"""Feature scaling that is fitted to data, stored with the model and invertible."""

from typing import Any

import torch
from torch import Tensor, nn

from fastvae.ops._results import accumulation_dtype


class _AffineScaler(nn.Module):
    """``(x - offset) * scale + low`` for each feature; offset and scale are buffers, without elements until :meth:`fit`."""

    low = 0.0
    offset: Tensor
    scale: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.empty(0))
        self.register_buffer("scale", torch.empty(0))

    def fit(self, x: Tensor) -> "_AffineScaler":
        """Takes the statistics of ``x``, ``(samples, ...)``, over its first dimension, one for each feature; gives the module itself. They
        are kept in float32, those of float64 in float64.

        Raises:
            ValueError: for no samples.
        """
        x = self._to_float(x)
        if x.ndim < 2 or x.shape[0] == 0:
            raise ValueError(f"x: got shape {tuple(x.shape)}, takes (samples, features, ...) with at least one sample")
        offset, spread = self._statistics(x.to(accumulation_dtype(x.dtype)))
        self.offset = offset.to(self.offset.device)
        # A feature without spread is not scaled, so that the inverse gives it back.
        self.scale = torch.where(spread == 0, 1.0, 1.0 / spread).to(self.scale.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """The scaled features in the dtype of ``x``, in that of the statistics where it holds integers; uint8 means value / 255."""
        self._check_fitted()
        x = self._to_float(x)
        return _in_dtype_of(x, (x - self.offset) * self.scale + self.low)

    def inverse(self, y: Tensor) -> Tensor:
        """The features in their own units, in the dtype of ``y``."""
        self._check_fitted()
        return _in_dtype_of(y, (y - self.low) / self.scale + self.offset)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _to_float(self, x: Tensor) -> Tensor:
        return x.to(self.offset.dtype) / 255 if x.dtype == torch.uint8 else x

    def _check_fitted(self) -> None:
        if self.offset.numel() == 0:
            raise RuntimeError(f"{type(self).__name__}: has not been fitted, call fit(x) with the training data")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The features' shape is that of the data it was fitted to.
        for name in ("offset", "scale"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _in_dtype_of(data: Tensor, result: Tensor) -> Tensor:
    return result.to(data.dtype) if data.is_floating_point() else result


class MinMaxScaler(_AffineScaler):
    r"""Each feature of the training data to a range: :math:`y = a + (b - a) \frac{x - \min x}{\max x - \min x}`.

    A feature that does not vary becomes :math:`a`. Other data may lie outside the range.

    Args:
        low, high: the range [a, b]; (0, 1) for a sigmoid output or cross-entropy, (-1, 1) for tanh.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0):
        super().__init__()
        if not low < high:
            raise ValueError(f"low, high: got {low!r}, {high!r}, takes low < high")
        self.low, self.high = float(low), float(high)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        least, most = x.aminmax(dim=0)
        return least, (most - least) / (self.high - self.low)

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"


class StandardScaler(_AffineScaler):
    r"""The z-score of each feature: :math:`y = (x - \mathrm{mean}\, x) / \mathrm{std}\, x`, with the statistics of the training data.

    The standard deviation is that of the population (divided by the number of samples); a feature that does not vary becomes 0.
    """

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        variance, mean = torch.var_mean(x, dim=0, correction=0)
        # Rounding leaves a little of a constant's variance.
        constant = (x == x[0]).all(0)
        return torch.where(constant, x[0], mean), torch.where(constant, 0.0, variance.sqrt())
