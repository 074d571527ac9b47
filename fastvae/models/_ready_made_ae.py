"""The ready-made networks that every autoencoder has."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from fastvae._types import Initialisation, LayerActivation, Pooling
from fastvae.models import networks
from fastvae.models._recipe import ready_made

AnyReadyMade = TypeVar("AnyReadyMade", bound="ReadyMadeAE")


class ReadyMadeAE:
    """The classmethods that make an autoencoder of a ready-made encoder and decoder. An autoencoder inherits them beside its objective."""

    @classmethod
    @ready_made
    def mlp(
        cls: type[AnyReadyMade],
        data_shape: int | Sequence[int] = (1, 28, 28),
        hidden: Sequence[int] = (512, 256),
        latent_dim: int = 32,
        *,
        activation: LayerActivation = "relu",
        code: LayerActivation = "identity",
        output: LayerActivation = "sigmoid",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyReadyMade:
        """An MLP and its mirror image, 784-512-256-32-256-512-784 by default.

        Args:
            data_shape: shape of one ``x``, an integer for a vector.
            hidden: units of the hidden layers; none for a single layer.
            latent_dim: units of the code.
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`.
            code: activation of the code.
            output: activation of the reconstruction, by the range of the data; ``"identity"`` for logits.
            options: those of the class.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        encoder, decoder = networks.mlp(data_shape, hidden, latent_dim, code=code, output=output, layers=layers)
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def linear(cls: type[AnyReadyMade], data_shape: int | Sequence[int], latent_dim: int, **options) -> AnyReadyMade:
        """One linear layer each way. With squared error it reaches the error of a principal component analysis with as many components
        (Baldi and Hornik 1989).

        Args:
            data_shape, latent_dim, options: see :meth:`mlp`.
        """
        return cls.mlp(data_shape, (), latent_dim, output="identity", **options)

    @classmethod
    @ready_made
    def conv(cls: type[AnyReadyMade], latent_dim: int = 32, *, output: LayerActivation = "sigmoid", **options) -> AnyReadyMade:
        """Two convolutions of stride 2 and two linear layers each way, for images of 1 x 28 x 28; see :meth:`fastvae.models.VAE.conv`.

        Args:
            latent_dim, output, options: see :meth:`mlp`.
        """
        encoder, decoder = networks.conv(latent_dim, output=output)
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def strided_conv(
        cls: type[AnyReadyMade],
        image_size: int | tuple[int, int] = 28,
        in_channels: int = 1,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (256,),
        latent_dim: int = 32,
        *,
        activation: LayerActivation = "relu",
        code: LayerActivation = "identity",
        output: LayerActivation = "sigmoid",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyReadyMade:
        """Convolutions of stride 2 and linear layers each way, for images of any size; that of :meth:`conv` by default.

        Args:
            image_size, in_channels, channels, hidden: see :meth:`fastvae.models.VAE.strided_conv`.
            latent_dim, activation, code, output, init, dropout, spectral_norm, options: see :meth:`mlp`.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        encoder, decoder = networks.strided_conv(
            image_size, in_channels, channels, hidden, latent_dim, code=code, output=output, layers=layers
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
        latent_dim: int = 32,
        *,
        pooling: Pooling = "token",
        activation: LayerActivation = "silu",
        code: LayerActivation = "identity",
        output: LayerActivation = "sigmoid",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyReadyMade:
        """A transformer over patches each way.

        Args:
            image_size, in_channels, patch_size, width, depth, heads, pooling: see :meth:`fastvae.models.VAE.transformer`.
            latent_dim, activation, code, output, init, dropout, spectral_norm, options: see :meth:`mlp`.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        encoder, decoder = networks.transformer(
            image_size, in_channels, patch_size, width, depth, heads, latent_dim, pooling=pooling, code=code, output=output, layers=layers
        )
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @abstractmethod
    def _of_networks(cls: type[AnyReadyMade], encoder: nn.Module, decoder: nn.Module, latent_dim: int, **options) -> AnyReadyMade:
        """The model of ready-made networks."""
