"""Image files: finding them, and reading them in one size and one mode."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from fastvae._extras import extra
from fastvae._types import check_choice
from fastvae.training.errors import DataError

with extra("train"):
    from PIL import Image, ImageOps

ColorMode = Literal["rgb", "grey"]
# What Pillow raises for a file that is no image, is damaged, or would take more memory than an image of its limit (MAX_IMAGE_PIXELS).
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# More names than this are a list that nobody reads.
MAX_NAMES = 10


def find_images(root: Path) -> list[Path]:
    """The files in a folder whose names end like those of images, in the order of their names."""
    if not root.is_dir():
        raise DataError(f"root: got {root}, takes a folder")
    endings = Image.registered_extensions().keys()
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not paths:
        raise DataError(f"root: {root} holds no images, takes a folder with files such as .png or .jpg")
    return paths


def loader(size: int, mode: ColorMode) -> Callable[[Path], np.ndarray]:
    """A function from a path to a uint8 array ``(channels, size, size)``."""
    check_choice("mode", mode, get_args(ColorMode))
    if size < 1:
        raise ValueError(f"size: got {size}, takes an integer >= 1")
    # A partial of a module's function, which a worker process can be sent.
    return partial(load, size=size, mode=mode)


def check_images(paths: Sequence[Path], load: Callable[[Path], np.ndarray]) -> None:
    """Reads every image.

    Raises:
        DataError: with the number of broken ones, and the names of the first.
    """
    with ThreadPoolExecutor() as pool:
        broken = [reason for reason in pool.map(partial(_reason_why_broken, load=load), paths) if reason is not None]
    if broken:
        more = f"; and {len(broken) - MAX_NAMES} more" if len(broken) > MAX_NAMES else ""
        raise DataError(f"{len(broken)} of {len(paths)} images are broken: {'; '.join(broken[:MAX_NAMES])}{more}")


def _reason_why_broken(path: Path, load: Callable[[Path], np.ndarray]) -> str | None:
    try:
        load(path)
    except BROKEN as error:
        return f"{path}: {error}"
    return None


def load(path: Path, size: int, mode: ColorMode) -> np.ndarray:
    with Image.open(path) as file:
        return pixels(file, (size, size), mode)


def pixels(image: Any, size: tuple[int, int], mode: ColorMode) -> np.ndarray:
    """An image of Pillow as a uint8 array ``(channels, height, width)``: resized to cover ``size``, its height and width, then its centre
    is cut out."""
    height, width = size
    fitted = ImageOps.fit(_in_8_bits(ImageOps.exif_transpose(image), mode), (width, height), Image.Resampling.BICUBIC)
    array = np.array(fitted)
    return array[None] if mode == "grey" else np.ascontiguousarray(np.moveaxis(array, -1, 0))


def _in_8_bits(image: Any, mode: ColorMode) -> Any:
    wanted = "L" if mode == "grey" else "RGB"
    if image.mode.startswith("I"):
        # Pillow clips the values of a 16-bit image at 255 when it converts it.
        image = Image.fromarray((np.asarray(image, dtype=np.uint32).clip(0, 65535) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        # Transparent pixels have arbitrary colours.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(wanted)
