"""Images that come from a browser: their sizes are checked before their pixels are decoded."""

from pathlib import Path

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.training.errors import DataError
from fastvae.training.images import BROKEN, pixels

with extra("train"):
    from PIL import Image

# Pillow opens dozens of formats, one of them by another program. A browser shows these.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Decoded, an RGBA image of so many pixels takes 128 MiB. Its file may be a thousand times smaller.
MAX_PIXELS = 2**25


def read(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """An image file as a batch of one, uint8 ``(1, channels, height, width)``: resized to cover the height and width of ``shape``, its
    centre cut out, and grey where ``shape`` has one channel.

    Args:
        path: a PNG, JPEG, WebP, GIF or BMP file; of several frames the first is read.
        shape: channels, 1 or 3, height and width.

    Raises:
        DataError: for more than 2^25 pixels, before they are decoded, or for a file that is no image of these formats.
    """
    channels, *size = shape
    try:
        with Image.open(path, formats=FORMATS) as file:
            _check_size(file.width, file.height)
            return torch.from_numpy(pixels(file, (size[0], size[1]), "grey" if channels == 1 else "rgb")).unsqueeze(0)
    except Image.DecompressionBombError as error:
        # Pillow's own limit, which is higher.
        raise DataError(f"image: takes at most {MAX_PIXELS} pixels: {error}") from error
    except BROKEN as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"image: cannot be read, takes a file of {', '.join(FORMATS)}") from error


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"image: got {width} x {height}, takes at most {MAX_PIXELS} pixels")
