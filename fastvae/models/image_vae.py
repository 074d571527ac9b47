"""The VAE of large images."""

import contextlib
from collections.abc import Sequence
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from fastvae._torch_private import processor_multiplies_bfloat16
from fastvae._types import Initialisation, LayerActivation, Memory, Precision, check_choice
from fastvae.models._inputs import as_float, in_channels_last, parameter_dtype
from fastvae.models._ready_made_vae import network_sizes
from fastvae.models._recipe import ready_made
from fastvae.models.networks import Layers, ResidualDecoder, ResidualEncoder
from fastvae.models.networks.layers import height_and_width
from fastvae.models.vae import VAE
from fastvae.ops._autograd import has_autocast, under_autocast


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
        activation: LayerActivation = "silu",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        memory: Memory = "full",
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
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`. Any activation but SiLU
                and ReLU is a pass of its own behind the normalisation.
            memory: ``"lean"`` keeps about half for the backward pass, and computes the inputs of convolutions again there: one more pass
                over memory for each. Outputs and gradients are the same to the last bit.
            options: those of the class.
        """
        for width in channels:
            if width % groups:
                raise ValueError(f"groups: got {groups} for {width} channels, takes a divisor of every number of channels")
        check_choice("memory", memory, get_args(Memory))
        layers = Layers(activation, init, dropout, spectral_norm)
        architecture = in_channels, channels, blocks, groups, latent_channels, attention
        latent_shape = None
        if image_size is not None:
            height, width = height_and_width(image_size)
            scale = 2 ** (len(channels) - 1)
            latent_shape = (latent_channels, height // scale, width // scale)
        code_channels, out_channels = network_sizes(latent_channels, in_channels, options)
        encoder = ResidualEncoder(*architecture, code_channels=code_channels, layers=layers, memory=memory)
        decoder = ResidualDecoder(*architecture, out_channels=out_channels, layers=layers, memory=memory)
        return cls(encoder, decoder, latent_shape, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision!r}"

    def _encoded(self, x: Tensor) -> Any:
        """The encoder's output, in float32 or wider."""
        x = in_channels_last(as_float(x, self.encoder))
        with self._autocast(x.device):
            encoded = super()._encoded(x)
        return _widened(encoded) if isinstance(encoded, Tensor) else tuple(map(_widened, encoded))

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output: logits, probabilities or means, in the dtype of the parameters."""
        dtype = parameter_dtype(self.decoder)
        z = in_channels_last(z.to(dtype))
        if under_autocast(z.device):
            return super().decode(z)
        with self._autocast(z.device):
            recon = super().decode(z)
        return recon.to(dtype)

    def _autocast(self, device: torch.device):
        if self.precision == "float32" or not has_autocast(device) or under_autocast(device):
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16" or bfloat16_pays(device))


def _widened(tensor: Tensor) -> Tensor:
    """In float32 what autocast left in 16 bits."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
