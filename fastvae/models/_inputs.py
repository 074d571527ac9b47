"""The conversion of data to the dtype and the memory layout of a model."""

import torch
from torch import Tensor, nn


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's floating-point parameters; torch's default where there are none."""
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.get_default_dtype())


def as_float(x: Tensor, module: nn.Module) -> Tensor:
    """An 8-bit image as value / 255, in the dtype of the module that is to read it; anything else as it is."""
    return x.to(parameter_dtype(module)) / 255 if x.dtype == torch.uint8 else x


def in_channels_last(x: Tensor) -> Tensor:
    """An image or a latent image in ``torch.channels_last``; a vector as it is."""
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x
