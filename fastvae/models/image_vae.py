"""The VAE of large images, and its residual networks."""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._torch_private import processor_multiplies_bfloat16
from fastvae._types import Precision, check_choice
from fastvae.functional._modules import owns_output
from fastvae.models._inputs import as_float, in_channels_last, parameter_dtype
from fastvae.models._recipe import ready_made
from fastvae.models.vae import VAE, network_sizes
from fastvae.nn import GroupNormSiLU, UpsampleConv2d
from fastvae.ops._autograd import has_autocast


class ResidualBlock(nn.Module):
    """Two convolutions of size 3, each behind GroupNorm and SiLU, added to the input.

    Args:
        in_channels, out_channels: where they differ, a convolution of size 1 brings the input to ``out_channels``.
        groups: groups of the normalisations, a divisor of both.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int = 32):
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNormSiLU(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        shortcut = self.shortcut(x)
        # The sum is written to h where nobody else holds it. On a CPU the page faults of fresh memory cost a quarter of a convolution's
        # time: 3.5 ms of processor time beside 13 for (4, 32, 128, 128) in float32, and nothing in bfloat16.
        if h.dtype == shortcut.dtype and owns_output(self.conv2):
            return h.add_(shortcut)
        return h + shortcut


class Attention(nn.Module):
    """Self-attention with one head over the positions of an image, added to the input."""

    def __init__(self, channels: int, groups: int = 32):
        super().__init__()
        self.norm = GroupNormSiLU(groups, channels, activation="none")
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (t.flatten(2).mT for t in self.qkv(self.norm(x)).chunk(3, dim=1))
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.mT.unflatten(2, x.shape[2:]))


def _blocks(in_channels: int, out_channels: int, count: int, groups: int) -> list[nn.Module]:
    return [ResidualBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(count)]


def _middle(channels: int, groups: int) -> list[nn.Module]:
    return [ResidualBlock(channels, channels, groups), Attention(channels, groups), ResidualBlock(channels, channels, groups)]


class ResidualEncoder(nn.Sequential):
    """From an image to mean and log variance at ``2 ** (len(channels) - 1)`` times less resolution.

    Args:
        in_channels: channels of the image.
        channels: of each level, from the finest to the coarsest.
        blocks: residual blocks a level.
        groups: groups of the normalisations, a divisor of every number of channels.
        latent_channels: channels of the latent.
        attention: two more residual blocks with self-attention between them at the coarsest level.
        code_channels: channels that come out: by default a mean and a log variance for each of the latent's.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        groups: int = 32,
        latent_channels: int = 4,
        attention: bool = False,
        *,
        code_channels: int | None = None,
    ):
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels[0], 3, padding=1)]
        previous = channels[0]
        for level, width in enumerate(channels):
            if level > 0:
                layers.append(nn.Conv2d(previous, previous, 3, stride=2, padding=1))
            layers += _blocks(previous, width, blocks, groups)
            previous = width
        layers += _middle(previous, groups) if attention else []
        code_channels = 2 * latent_channels if code_channels is None else code_channels
        super().__init__(*layers, GroupNormSiLU(groups, previous), nn.Conv2d(previous, code_channels, 3, padding=1))


class ResidualDecoder(nn.Sequential):
    """From a latent to an image: :class:`ResidualEncoder` the other way round, with the same arguments.

    ``outputs`` numbers come out for each element of the image, on dimension 1.
    """

    def __init__(
        self,
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        groups: int = 32,
        latent_channels: int = 4,
        attention: bool = False,
        *,
        outputs: int = 1,
    ):
        previous = channels[-1]
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, previous, 3, padding=1)]
        layers += _middle(previous, groups) if attention else []
        for level, width in enumerate(reversed(channels)):
            if level > 0:
                layers.append(UpsampleConv2d(previous, previous))
            layers += _blocks(previous, width, blocks, groups)
            previous = width
        super().__init__(*layers, GroupNormSiLU(groups, previous), nn.Conv2d(previous, outputs * in_channels, 3, padding=1))


def bfloat16_pays(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware: elsewhere a convolution in bfloat16 is slower than one in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return processor_multiplies_bfloat16()
    return False


AnyImageVAE = TypeVar("AnyImageVAE", bound="ImageVAE")


class ImageVAE(VAE):
    """A VAE of convolutional networks, in the memory layout and the precision in which the device is fastest.

    Images and latent images are brought into ``torch.channels_last``, where convolutions and normalisations are fastest, and all that
    follows from them stays there. The weights are contiguous, so that FSDP can shard them; a step takes as long as with weights in that
    layout.

    Args:
        encoder, decoder, latent_shape: see :class:`~fastvae.models.VAE`.
        precision: in which encoder and decoder multiply, by autocast: ``"bfloat16"``, ``"float32"``, or ``"auto"`` for bfloat16 where the
            device multiplies it in hardware. All that the model gives is in the dtype of its parameters, the posterior and the loss at
            least in float32. Under the caller's autocast nothing is changed.
        options: those of :class:`~fastvae.models.VAE`.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        precision: Precision = "auto",
        **options,
    ):
        check_choice("precision", precision, get_args(Precision))
        super().__init__(encoder, decoder, latent_shape, **options)
        self.precision = precision

    @classmethod
    @ready_made
    def residual(
        cls: type[AnyImageVAE],
        in_channels: int = 3,
        channels: Sequence[int] = (32, 64, 128),
        blocks: int = 2,
        groups: int = 32,
        latent_channels: int = 4,
        attention: bool = False,
        *,
        image_size: int | tuple[int, int] | None = None,
        **options,
    ) -> AnyImageVAE:
        """Residual blocks of GroupNorm, SiLU and convolution, with a latent image (Rombach et al., *High-Resolution Image Synthesis with
        Latent Diffusion Models*, 2022, appendix E, without its discriminator); the decoder gives logits.

        Args:
            in_channels: channels of the image, whose height and width are multiples of ``2 ** (len(channels) - 1)``.
            channels: of each level, from the finest to the coarsest.
            blocks: residual blocks a level.
            groups: groups of the normalisations, a divisor of every number of channels.
            latent_channels: channels of the latent image.
            attention: two more residual blocks with self-attention between them at the coarsest level.
            image_size: height and width of the images, one number for both; :meth:`sample` needs it.
            options: those of the class.
        """
        for width in channels:
            if width % groups:
                raise ValueError(f"groups: got {groups} for {width} channels, takes a divisor of every number of channels")
        architecture = in_channels, channels, blocks, groups, latent_channels, attention
        latent_shape = None
        if image_size is not None:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
            scale = 2 ** (len(channels) - 1)
            latent_shape = (latent_channels, height // scale, width // scale)
        code_channels, outputs = network_sizes(latent_channels, **options)
        encoder = ResidualEncoder(*architecture, code_channels=code_channels)
        return cls(encoder, ResidualDecoder(*architecture, outputs=outputs), latent_shape, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision!r}"

    def _encoded(self, x: Tensor) -> Any:
        """What the encoder gives, in float32 or wider."""
        x = in_channels_last(as_float(x, self.encoder))
        with self._autocast(x.device):
            encoded = super()._encoded(x)
        return _widened(encoded) if isinstance(encoded, Tensor) else tuple(map(_widened, encoded))

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output: logits, probabilities or means, in the dtype of the parameters."""
        dtype = parameter_dtype(self.decoder)
        z = in_channels_last(z.to(dtype))
        if _under_autocast(z.device):
            return super().decode(z)
        with self._autocast(z.device):
            recon = super().decode(z)
        return recon.to(dtype)

    def _autocast(self, device: torch.device):
        if self.precision == "float32" or not has_autocast(device) or _under_autocast(device):
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16" or bfloat16_pays(device))


def _under_autocast(device: torch.device) -> bool:
    """Whether the caller's autocast is on; a device that has none, such as meta, may not be asked."""
    return has_autocast(device) and torch.is_autocast_enabled(device.type)


def _widened(tensor: Tensor) -> Tensor:
    """In float32 what autocast left in 16 bits."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
