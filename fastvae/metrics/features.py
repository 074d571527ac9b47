"""The networks whose features compare sets of images, with the checks of what goes in and comes out."""

from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastvae._extras import MissingExtraError, extra
from fastvae._types import check_choice
from fastvae.distributions.prior import check_count
from fastvae.functional._checks import check_interval
from fastvae.metrics.lenet import FEATURES, trained_lenet
from fastvae.models._reading import reading

FeatureName = Literal["inception-v3", "lenet-mnist"]
Output = Literal["features", "logits"]

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"


class FeatureNetwork(nn.Module):
    """A network with a name, which gives the features of images in float64, without gradients and as in evaluation mode.

    The network sees images in [0, 1], whatever range they come in, in the dtype of its parameters.

    Args:
        network: from a batch of images to ``(batch, num_features)``.
        name: stands in the results; by default the name of the network's class.
        num_features: by default the attribute ``num_features`` of the network.
        image_shape: of one image, ``None`` for a size that does not matter; by default the network alone says what it takes.
        image_range: the range of floating images; uint8 is 0 to 255.

    Raises:
        ValueError: for a number of features that neither argument nor attribute gives, or an empty range.
    """

    def __init__(
        self,
        network: nn.Module,
        name: str | None = None,
        num_features: int | None = None,
        *,
        image_shape: tuple[int | None, ...] | None = None,
        image_range: tuple[float, float] = (0.0, 1.0),
    ):
        super().__init__()
        self.name = type(network).__name__ if name is None else name
        found: Any = getattr(network, "num_features", None) if num_features is None else num_features
        self.num_features = check_count("num_features", found)
        if not image_range[0] < image_range[1]:
            raise ValueError(f"image_range: got {image_range}, takes (low, high) with low < high")
        self.network, self.image_shape, self.image_range = network, image_shape, image_range

    def extra_repr(self) -> str:
        return f"name={self.name!r}, num_features={self.num_features}, image_shape={self.image_shape}, image_range={self.image_range}"

    @reading
    def forward(self, images: Tensor) -> Tensor:
        """The features of a batch, float64 ``(batch, num_features)``.

        Args:
            images: ``(batch, *image_shape)``, uint8, or floating in ``image_range``.

        Raises:
            TypeError: for another dtype.
            ValueError: for images of another shape or out of range, or features of another shape or that are not finite.
        """
        self._check_shape(images)
        features = self.network(self._in_unit_range(images))
        if features.shape != (len(images), self.num_features):
            raise ValueError(f"features: {self.name} gave {tuple(features.shape)}, has to give {(len(images), self.num_features)}")
        if not features.isfinite().all():
            raise ValueError(f"features: {self.name} gave values that are not finite")
        return features.double()

    def _check_shape(self, images: Tensor) -> None:
        sizes = images.shape[1:]
        if self.image_shape is None:
            return
        if len(sizes) != len(self.image_shape) or any(a not in (None, b) for a, b in zip(self.image_shape, sizes, strict=True)):
            takes = ", ".join("any" if size is None else str(size) for size in self.image_shape)
            raise ValueError(f"images: got shape {tuple(images.shape)}, {self.name} takes (batch, {takes})")

    def _in_unit_range(self, images: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), None)
        if images.dtype == torch.uint8:
            return images.to(dtype or torch.get_default_dtype()) / 255
        if not images.is_floating_point():
            raise TypeError(f"images: got {images.dtype}, takes uint8 or a floating dtype")
        low, high = self.image_range
        check_interval("images", images, low, high)
        return ((images - low) / (high - low)).to(dtype or images.dtype)


class _Bytes(nn.Module):
    """A network of 8-bit images as one of images in [0, 1]."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images * 255).round().to(torch.uint8))


def feature_network(
    network: FeatureName | nn.Module, output: Output = "features", image_range: tuple[float, float] = (0.0, 1.0)
) -> FeatureNetwork:
    """A network by its name, or one of the user's.

    ``"inception-v3"`` is the network of Heusel et al. (2017) in torchmetrics, for RGB images of any size, which it scales to 299 x 299 as
    they did: 2,048 features, or the logits of 1,008 classes without their biases. It needs torch-fidelity, which downloads the weights.
    ``"lenet-mnist"`` is :func:`~fastvae.metrics.lenet.trained_lenet`, for grey images of 28 x 28: 84 features, or the logits of 10 digits.

    Args:
        network: a name, a :class:`FeatureNetwork`, or a module with an attribute ``num_features``, see :class:`FeatureNetwork`.
        output: ``"features"`` or ``"logits"``; a network of the user's has one output.
        image_range: the range of floating images; a :class:`FeatureNetwork` has its own.

    Raises:
        ValueError: for a name that does not exist.
        MissingExtraError: for a package that is not installed, with what to install.
        OSError: for weights that cannot be downloaded.
    """
    if isinstance(network, FeatureNetwork):
        return network
    if isinstance(network, nn.Module):
        return FeatureNetwork(network, image_range=image_range)
    check_choice("network", network, get_args(FeatureName))
    check_choice("output", output, get_args(Output))
    if network == "lenet-mnist":
        lenet = trained_lenet()
        module, size = (lenet, 10) if output == "logits" else (lenet.body, FEATURES)
        return FeatureNetwork(module, network, size, image_shape=(1, 28, 28), image_range=image_range)
    layer, size = ("logits_unbiased", 1008) if output == "logits" else ("2048", 2048)
    return FeatureNetwork(_Bytes(_inception(layer)), network, size, image_shape=(3, None, None), image_range=image_range)


def _inception(layer: str) -> nn.Module:
    try:
        import_module("torch_fidelity")
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed: pip install torch-fidelity torchvision", name=error.name) from error
    with extra("metrics"):
        from torchmetrics.image.fid import NoTrainInceptionV3
    try:
        # The resizing of the first implementation, from which published figures are, does not smooth.
        return NoTrainInceptionV3("inception-v3-compat", [layer], antialias=False)
    except OSError as error:
        folder = f"{torch.hub.get_dir()}/checkpoints"
        raise OSError(f"network: cannot download the weights of inception-v3 ({error}); put {INCEPTION_URL} into {folder}") from error
