"""The ready-made networks that every VAE of one encoder and one decoder has."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from fastvae._types import Initialisation, LayerActivation, Pooling
from fastvae.distributions.names import decoder_channels
from fastvae.distributions.posterior import Posterior
from fastvae.models import networks
from fastvae.models._recipe import ready_made

AnyReadyMade = TypeVar("AnyReadyMade", bound="ReadyMadeVAE")


class ReadyMadeVAE:
    """The classmethods that make a VAE of a ready-made encoder and decoder. A VAE inherits them beside its objective."""

    @classmethod
    @ready_made
    def conv(cls: type[AnyReadyMade], latent_dim: int = 20, **options) -> AnyReadyMade:
        """The convolutional VAE of many tutorials for images of 1 x 28 x 28; the decoder gives logits.

        Conv(1, 32) ReLU Conv(32, 64) ReLU Linear(3136, 256) ReLU, then ``mu`` and ``logvar``; Linear(d, 256) ReLU Linear(256, 3136) ReLU
        ConvT(64, 32) ReLU ConvT(32, 1). Convolutions of size 3, stride 2, padding 1.

        Args:
            latent_dim: size of ``z``: 20 for quality, 2 for pictures of the latent space.
            options: those of the class.
        """
        code_dim, out_channels = network_sizes(latent_dim, 1, options)
        encoder, decoder = networks.conv(latent_dim, code_dim=code_dim, out_channels=out_channels)
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def mlp(
        cls: type[AnyReadyMade],
        data_shape: int | Sequence[int] = (1, 28, 28),
        hidden: Sequence[int] = (400,),
        latent_dim: int = 20,
        *,
        activation: LayerActivation = "relu",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyReadyMade:
        """An MLP and its mirror image, 784-400-20-400-784 by default; the decoder gives logits.

        Args:
            data_shape: shape of one ``x``, an integer for a vector.
            hidden: units of the hidden layers; none for a single layer.
            latent_dim: size of ``z``.
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`.
            options: those of the class.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        code_dim, out_channels = network_sizes(latent_dim, data_shape, options)
        encoder, decoder = networks.mlp(data_shape, hidden, latent_dim, code_dim=code_dim, out_channels=out_channels, layers=layers)
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def strided_conv(
        cls: type[AnyReadyMade],
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        latent_dim: int = 20,
        *,
        activation: LayerActivation = "relu",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyReadyMade:
        """Convolutions of stride 2 and linear layers each way, for images of any size; that of :meth:`conv` by default.

        Args:
            image_size: height and width of the images, one number for both.
            in_channels: channels of the images.
            channels: channels behind each convolution, which halves height and width.
            hidden: units of the hidden linear layers between the convolutions and ``z``.
            latent_dim: size of ``z``.
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`.
            options: those of the class.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        code_dim, out_channels = network_sizes(latent_dim, in_channels, options)
        encoder, decoder = networks.strided_conv(
            image_size, in_channels, channels, hidden, latent_dim, code_dim=code_dim, out_channels=out_channels, layers=layers
        )
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def transformer(
        cls: type[AnyReadyMade],
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        patch_size: int = 7,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        latent_dim: int = 20,
        *,
        pooling: Pooling = "token",
        activation: LayerActivation = "silu",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyReadyMade:
        """A transformer over patches each way (Dosovitskiy et al., *An Image is Worth 16x16 Words*, 2021).

        Args:
            image_size: height and width of the images, multiples of ``patch_size``; one number for both.
            in_channels: channels of the images.
            patch_size: height and width of a patch.
            width: units of a patch.
            depth: blocks of the encoder and of the decoder.
            heads: of each block's attention, a divisor of ``width``.
            latent_dim: size of ``z``.
            pooling: the posterior comes from a learned ``"token"`` that goes through the encoder with the patches, or from the ``"mean"``
                of all patches.
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`.
            options: those of the class.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        code_dim, out_channels = network_sizes(latent_dim, in_channels, options)
        encoder, decoder = networks.transformer(
            image_size,
            in_channels,
            patch_size,
            width,
            depth,
            heads,
            latent_dim,
            code_dim=code_dim,
            out_channels=out_channels,
            pooling=pooling,
            layers=layers,
        )
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @abstractmethod
    def _of_networks(cls: type[AnyReadyMade], encoder: nn.Sequential, decoder: nn.Sequential, latent_dim: int, **options) -> AnyReadyMade:
        """The model of ready-made networks."""


def network_sizes(latent_dim: int, data_shape: int | Sequence[int], options: Mapping[str, Any]) -> tuple[int, int]:
    """The sizes of dimension 1 of what the encoder and the decoder of a ready-made network give, by the options of a model."""
    posterior: Posterior | None = options.get("posterior")
    code_dim = 2 * latent_dim if posterior is None else posterior.parameters_for(latent_dim)
    channels = data_shape if isinstance(data_shape, int) else data_shape[0]
    return code_dim, decoder_channels(channels, options)
