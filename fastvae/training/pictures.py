"""Grids of images, as tensors and as PNG files."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._extras import extra
from fastvae.training.errors import writing

with extra("train"):
    from PIL import Image


def are_images(x: Tensor) -> bool:
    """Whether a batch can be shown: ``(batch, channels, height, width)`` with 1 or 3 channels."""
    return x.ndim == 4 and x.shape[1] in (1, 3)


def in_8_bits(x: Tensor) -> Tensor:
    """Images on the CPU in 8 bits; floating ones are in [0, 1], and what lies outside is clipped."""
    if x.dtype != torch.uint8:
        x = (x.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8)
    return x.cpu()


def grid(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Images as one, ``(channels, height, width)`` in 8 bits: row by row, with white between them."""
    tiles = F.pad(in_8_bits(images), (gap, gap, gap, gap), value=255)
    return _full_rows(tiles, columns).permute(2, 0, 3, 1, 4).flatten(1, 2).flatten(2, 3)


def save_png(picture: Tensor, path: Path) -> None:
    """Writes an image of 8 bits, ``(channels, height, width)`` with 1 or 3 channels."""
    pixels = picture[0] if len(picture) == 1 else picture.movedim(0, -1).contiguous()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(path)


def pairs(x: Tensor, recon: Tensor, columns: int) -> Tensor:
    """A grid in which each row of originals stands above the row of their reconstructions."""
    originals, recons = (_full_rows(in_8_bits(images), columns) for images in (x, recon))
    return grid(torch.stack([originals, recons], dim=1).flatten(0, 2), columns)


def _full_rows(images: Tensor, columns: int) -> Tensor:
    """``(rows, columns, ...)``, filled up with white."""
    missing = -len(images) % columns
    return torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)]).unflatten(0, (-1, columns))
