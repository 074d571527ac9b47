"""VQ-VAE and VQ-VAE-2: autoencoders with a discrete latent."""

from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.nn import VectorQuantizer


@exportable
class VQVAEOutput(NamedTuple):
    """The loss, its terms and the tensors behind them; with two levels ``indices``, ``perplexity`` and ``usage`` hold (top, bottom)."""

    loss: Tensor
    recon_loss: Tensor
    vq_loss: Tensor
    recon: Tensor
    indices: Tensor | tuple[Tensor, Tensor]
    perplexity: Tensor | tuple[Tensor, Tensor]
    usage: Tensor | tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), the block of van den Oord et al. (2017), section 4.1."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, hidden, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(hidden, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def _residual_stack(channels: int, hidden: int, blocks: int) -> list[nn.Module]:
    return [*(ResidualBlock(channels, hidden) for _ in range(blocks)), nn.ReLU()]


def conv_encoder(in_channels: int, channels: int = 128, *, downsampling: int = 4, hidden: int = 32, blocks: int = 2) -> nn.Sequential:
    """Convolutions of stride 2 until the image is ``downsampling`` (2 or 4) times smaller, then residual blocks.

    Args:
        in_channels: channels of the image.
        channels: channels that come out.
        downsampling: 2 or 4.
        hidden: channels inside a residual block.
        blocks: residual blocks.
    """
    if downsampling not in (2, 4):
        raise ValueError(f"downsampling: got {downsampling}, takes 2 or 4")
    if downsampling == 4:
        layers = [nn.Conv2d(in_channels, channels // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(channels // 2, channels, 4, 2, 1), nn.ReLU()]
    else:
        layers = [nn.Conv2d(in_channels, channels, 4, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(channels, channels, 3, padding=1), *_residual_stack(channels, hidden, blocks))


def conv_decoder(
    in_channels: int, out_channels: int, channels: int = 128, *, upsampling: int = 4, hidden: int = 32, blocks: int = 2
) -> nn.Sequential:
    """The mirror image of :func:`conv_encoder`."""
    if upsampling not in (2, 4):
        raise ValueError(f"upsampling: got {upsampling}, takes 2 or 4")
    layers = [nn.Conv2d(in_channels, channels, 3, padding=1), *_residual_stack(channels, hidden, blocks)]
    if upsampling == 4:
        layers += [nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1), nn.ReLU()]
        channels //= 2
    return nn.Sequential(*layers, nn.ConvTranspose2d(channels, out_channels, 4, 2, 1))


def _check_variance(data_variance: float) -> float:
    if not data_variance > 0:
        raise ValueError(f"data_variance: got {data_variance}, takes a number > 0")
    return float(data_variance)


def _recon_loss(recon: Tensor, x: Tensor, data_variance: float) -> Tensor:
    """The mean squared error in units of the data's variance. Told the factor, the kernel writes its gradient with it."""
    weight = 1 / data_variance
    return weight * FV.mse_loss(recon, x, grad_scale=weight)


AnyVQVAE = TypeVar("AnyVQVAE", bound="VQVAE")


class VQVAE(nn.Module, Pretrained):
    r"""A VQ-VAE of any encoder and decoder (van den Oord et al., *Neural Discrete Representation Learning*, 2017).

    .. math:: \tfrac{1}{\sigma^2} \mathrm{MSE}(x, \hat x) + L_{vq}

    A call trains. :meth:`encode`, :meth:`decode` and :meth:`reconstruct` read: they have no gradient and change nothing, in training mode
    too, where they give what they would give in evaluation mode.

    Args:
        encoder: gives ``(batch, dim, ...)``.
        decoder: gives the data from the quantized encoding.
        quantizer: a :class:`fastvae.nn.VectorQuantizer` or ``ResidualVectorQuantizer`` with ``channels_first=True``.
        data_variance: :math:`\sigma^2` of the data, so that the two terms are of one size.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, quantizer: nn.Module, *, data_variance: float = 1.0):
        super().__init__()
        self.encoder, self.decoder, self.quantizer = encoder, decoder, quantizer
        self.data_variance = _check_variance(data_variance)

    @classmethod
    @ready_made
    def conv(
        cls: type[AnyVQVAE],
        in_channels: int = 3,
        *,
        num_codes: int = 512,
        dim: int = 64,
        channels: int = 128,
        hidden: int = 32,
        blocks: int = 2,
        data_variance: float = 1.0,
        **quantizer_options,
    ) -> AnyVQVAE:
        """The paper's convolutional network, 4 times smaller inside, for images whose sides are multiples of 4.

        Args:
            in_channels: channels of the images.
            num_codes, dim: of the codebook.
            channels, hidden, blocks: of the networks, see :func:`conv_encoder`.
            data_variance: see the class.
            quantizer_options: of :class:`fastvae.nn.VectorQuantizer`.
        """
        encoder = nn.Sequential(conv_encoder(in_channels, channels, hidden=hidden, blocks=blocks), nn.Conv2d(channels, dim, 1))
        decoder = conv_decoder(dim, in_channels, channels, hidden=hidden, blocks=blocks)
        quantizer = VectorQuantizer(num_codes, dim, channels_first=True, **quantizer_options)
        return cls(encoder, decoder, quantizer, data_variance=data_variance)

    def extra_repr(self) -> str:
        return f"data_variance={self.data_variance}"

    def forward(self, x: Tensor) -> VQVAEOutput:
        """The loss of a batch ``(batch, channels, ...)``, floating or uint8 (value / 255)."""
        output = self.quantizer(self.encoder(as_float(x, self.encoder)))
        recon = self.decoder(output.quantized)
        recon_loss = _recon_loss(recon, x, self.data_variance)
        vq_loss = output.loss
        return VQVAEOutput(recon_loss + vq_loss, recon_loss, vq_loss, recon, output.indices, output.perplexity, output.usage)

    @reading
    def encode(self, x: Tensor) -> Tensor:
        """The indices of a batch."""
        return self.quantizer(self.encoder(as_float(x, self.encoder))).indices

    @reading
    def decode(self, indices: Tensor) -> Tensor:
        """Data from indices."""
        return self.decoder(cast("VectorQuantizer", self.quantizer).decode(indices))

    @reading
    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded codes of a batch."""
        return self.forward(x).recon


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
        self.data_variance = _check_variance(data_variance)

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
        recon_loss, vq_loss = _recon_loss(recon, x, self.data_variance), top.loss + bottom.loss
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
