"""The VQ-VAE of two levels."""

from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.models.networks.vq_convolutional import conv_decoder, conv_encoder
from fastvae.models.vqvae import VQVAEOutput, check_variance, scaled_error
from fastvae.nn import VectorQuantizer

AnyVQVAE2 = TypeVar("AnyVQVAE2", bound="VQVAE2")


class VQVAE2(nn.Module, Pretrained):
    """Two levels: a coarse code of the whole and a fine one that is given it (Razavi et al., *VQ-VAE-2*, 2019, section 3.1).

    A call trains; :meth:`encode`, :meth:`decode` and :meth:`reconstruct` read, as those of :class:`VQVAE`.

    Args:
        bottom_encoder: from the data to features.
        top_encoder: from those features to ``(batch, dim, ...)``, coarser.
        top_quantizer: as in :class:`VQVAE`.
        top_decoder: from the top's codes to what the bottom level is given, in the size of the features.
        bottom_projection: from that and the features, joined on dimension 1, to ``(batch, dim, ...)``.
        bottom_quantizer: as in :class:`VQVAE`.
        top_upsampler: from the top's codes to the size of the bottom's.
        decoder: the data from that and the bottom's codes, joined on dimension 1.
        data_variance: see :class:`VQVAE`.
    """

    def __init__(
        self,
        *,
        bottom_encoder: nn.Module,
        top_encoder: nn.Module,
        top_quantizer: nn.Module,
        top_decoder: nn.Module,
        bottom_projection: nn.Module,
        bottom_quantizer: nn.Module,
        top_upsampler: nn.Module,
        decoder: nn.Module,
        data_variance: float = 1.0,
    ):
        super().__init__()
        self.bottom_encoder, self.top_encoder = bottom_encoder, top_encoder
        self.top_quantizer, self.top_decoder = top_quantizer, top_decoder
        self.bottom_projection, self.bottom_quantizer = bottom_projection, bottom_quantizer
        self.top_upsampler, self.decoder = top_upsampler, decoder
        self.data_variance = check_variance(data_variance)

    @classmethod
    @ready_made
    def conv(
        cls: type[AnyVQVAE2],
        in_channels: int = 3,
        *,
        num_codes: int = 512,
        dim: int = 64,
        channels: int = 128,
        hidden: int = 32,
        blocks: int = 2,
        data_variance: float = 1.0,
        **quantizer_options,
    ) -> AnyVQVAE2:
        """The paper's convolutional network, 4 and 8 times smaller inside, for images whose sides are multiples of 8.

        Args:
            in_channels: channels of the images.
            num_codes, dim: of each level's codebook.
            channels, hidden, blocks: of the networks, see :func:`conv_encoder`.
            data_variance: see :class:`VQVAE`.
            quantizer_options: of both :class:`fastvae.nn.VectorQuantizer`.
        """
        sizes = {"hidden": hidden, "blocks": blocks}
        return cls(
            bottom_encoder=conv_encoder(in_channels, channels, downsampling=4, **sizes),
            top_encoder=nn.Sequential(conv_encoder(channels, channels, downsampling=2, **sizes), nn.Conv2d(channels, dim, 1)),
            top_quantizer=VectorQuantizer(num_codes, dim, channels_first=True, **quantizer_options),
            top_decoder=conv_decoder(dim, dim, channels, upsampling=2, **sizes),
            bottom_projection=nn.Conv2d(dim + channels, dim, 1),
            bottom_quantizer=VectorQuantizer(num_codes, dim, channels_first=True, **quantizer_options),
            top_upsampler=nn.ConvTranspose2d(dim, dim, 4, 2, 1),
            decoder=conv_decoder(2 * dim, in_channels, channels, upsampling=4, **sizes),
            data_variance=data_variance,
        )

    def extra_repr(self) -> str:
        return f"data_variance={self.data_variance}"

    def _levels(self, x: Tensor):
        bottom = self.bottom_encoder(as_float(x, self.bottom_encoder))
        top = self.top_quantizer(self.top_encoder(bottom))
        given = torch.cat([self.top_decoder(top.quantized), bottom], dim=1)
        return top, self.bottom_quantizer(self.bottom_projection(given))

    def _decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        return self.decoder(torch.cat([self.top_upsampler(top), bottom], dim=1))

    def forward(self, x: Tensor) -> VQVAEOutput:
        """The loss of a batch of images, floating or uint8 (value / 255)."""
        top, bottom = self._levels(x)
        recon = self._decode(top.quantized, bottom.quantized)
        recon_loss, vq_loss = scaled_error(recon, x, self.data_variance), top.loss + bottom.loss
        pairs = ((getattr(top, name), getattr(bottom, name)) for name in ("indices", "perplexity", "usage"))
        return VQVAEOutput(recon_loss + vq_loss, recon_loss, vq_loss, recon, *pairs)

    @reading
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The indices of a batch, top and bottom."""
        top, bottom = self._levels(x)
        return top.indices, bottom.indices

    @reading
    def decode(self, indices: tuple[Tensor, Tensor]) -> Tensor:
        """Images from indices."""
        top, bottom = cast("VectorQuantizer", self.top_quantizer), cast("VectorQuantizer", self.bottom_quantizer)
        return self._decode(top.decode(indices[0]), bottom.decode(indices[1]))

    @reading
    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded codes of a batch."""
        return self.forward(x).recon
