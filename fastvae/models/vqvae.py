"""The VQ-VAE: an autoencoder with a discrete latent."""

from typing import NamedTuple, TypeVar, cast

from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.models.networks.vq_convolutional import conv_decoder, conv_encoder
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


def check_variance(data_variance: float) -> float:
    if not data_variance > 0:
        raise ValueError(f"data_variance: got {data_variance}, takes a number > 0")
    return float(data_variance)


def scaled_error(recon: Tensor, x: Tensor, data_variance: float) -> Tensor:
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
        self.data_variance = check_variance(data_variance)

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
        recon_loss = scaled_error(recon, x, self.data_variance)
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
