"""The preprocessing of a batch: it runs on the device, before the network sees the batch."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastvae._types import check_choice
from fastvae.nn import MinMaxScaler, StandardScaler

Binarization = Literal["none", "static", "dynamic"]
Scaling = Literal["none", "min_max", "z_score"]

SCALERS: dict[str, type[nn.Module]] = {"min_max": MinMaxScaler, "z_score": StandardScaler}


def binarize(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A draw of 0 or 255 for each pixel of an 8-bit image, 255 with probability value / 255.

    The result is 8-bit too, so that the loss reads one byte a pixel.
    """
    if x.dtype != torch.uint8:
        raise TypeError(f"x: got {x.dtype}, binarisation takes torch.uint8")
    drawn = torch.rand(x.shape, device=x.device, generator=generator)
    return (255 * drawn < x).to(torch.uint8) * 255


class Preprocessing(nn.Module):
    """Dynamic binarisation, then scaling. Its buffers are a part of the checkpoint, so data from a network can be scaled back.

    Args:
        dynamic_binarization: each pixel is drawn anew each time it is seen (Salakhutdinov and Murray, 2008); for 8-bit images.
        scaling: ``"min_max"`` to [0, 1] or ``"z_score"``, by the statistics of the training data, which :meth:`fit` takes.
    """

    def __init__(self, dynamic_binarization: bool = False, scaling: Scaling = "none"):
        super().__init__()
        check_choice("scaling", scaling, ("none", *SCALERS))
        self.dynamic_binarization = dynamic_binarization
        self.scaling = scaling
        self.scaler: Any = SCALERS[scaling]() if scaling != "none" else None

    def describe(self) -> dict[str, Any]:
        """The arguments that make it again, as a checkpoint stores them."""
        return {"dynamic_binarization": self.dynamic_binarization, "scaling": self.scaling}

    def fit(self, x: Tensor) -> None:
        """Takes the statistics of the training data."""
        if self.scaler is not None:
            self.scaler.fit(x)

    def forward(self, x: Tensor) -> Tensor:
        x = binarize(x) if self.dynamic_binarization else x
        return x if self.scaler is None else self.scaler(x)

    def inverse(self, x: Tensor) -> Tensor:
        """Scales what a network gave back into the units of the data."""
        return x if self.scaler is None else self.scaler.inverse(x)
