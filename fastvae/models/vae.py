"""Variational autoencoders (Kingma and Welling, *Auto-Encoding Variational Bayes*, 2014)."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae._types import Initialisation, LayerActivation, Likelihood, Pooling, check_choice
from fastvae.functional._checks import check_nonnegative
from fastvae.models import networks
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float, parameter_dtype
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.nn import BCELoss, BCEWithLogitsLoss, GaussianNLL, KLPenalty
from fastvae.nn.schedules import Schedule

LIKELIHOODS = {"bernoulli_logits": BCEWithLogitsLoss, "bernoulli": BCELoss, "gaussian": GaussianNLL}


@exportable
class VAEOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them.

    ``kl`` is without ``beta`` and ``capacity``; ``recon`` is what the decoder gave: logits, probabilities or means. With ``num_samples``,
    ``z`` and ``recon`` have a first dimension of that size.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor


AnyVAE = TypeVar("AnyVAE", bound="VAE")


class VAE(nn.Module, Pretrained):
    r"""A VAE of any encoder and decoder with a standard normal prior.

    .. math:: -\mathbb{E}_{q(z|x)} \log p(x|z) + \beta\, KL(q(z|x) \| N(0, I)), \quad q(z|x) = N(\mu, \mathrm{diag}(\sigma^2))

    in nats per sample; with ``capacity`` :math:`C` the second term is :math:`\beta\, |KL - C|`. A call samples ``z`` in training and in
    evaluation mode, as the bound demands; :meth:`reconstruct` decodes the posterior's mean.

    :meth:`encode`, :meth:`decode` and :meth:`decode_mean` are parts of a call: differentiable, in the model's mode. The other methods read:
    they have no gradient and run as in evaluation mode, so that they change no buffer of a model in training.

    Args:
        encoder: gives ``(mu, logvar)``, or one tensor that is split into the two on dimension 1. It sees an 8-bit image as value / 255.
        decoder: gives, for ``z``, a tensor in the shape of the data: logits, probabilities or means, as ``likelihood`` says.
        latent_shape: shape of one ``z``, an integer for a vector; :meth:`sample` needs it.
        likelihood: ``"bernoulli_logits"``, ``"bernoulli"`` (probabilities), ``"gaussian"`` (unit variance), or a module called as
            ``likelihood(recon, x, reduction=...)``, such as ``fastvae.nn.GaussianNLL(learned=True)``.
        beta: weight of the KL, a number or a schedule (Higgins et al., *beta-VAE*, 2017). ``model.kl_penalty.step()`` advances schedules.
        capacity: :math:`C` in nats per sample, a number or a schedule (Burgess et al., 2018); ``None`` for none.
        free_bits: nats a latent dimension that are free (Kingma et al., 2016).
        num_samples: samples of ``z`` for each ``x``, over which the reconstruction term is averaged.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | Sequence[int] | None = None,
        *,
        likelihood: Likelihood | nn.Module = "bernoulli_logits",
        beta: float | Schedule = 1.0,
        capacity: float | Schedule | None = None,
        free_bits: float = 0.0,
        num_samples: int | None = None,
    ):
        super().__init__()
        if isinstance(likelihood, str):
            check_choice("likelihood", likelihood, LIKELIHOODS)
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = LIKELIHOODS[likelihood](reduction="batchmean") if isinstance(likelihood, str) else likelihood
        self.kl_penalty = KLPenalty(beta, capacity)
        self.latent_shape = (latent_shape,) if isinstance(latent_shape, int) else latent_shape
        self.free_bits = check_nonnegative("free_bits", free_bits)
        self.num_samples = num_samples

    @classmethod
    @ready_made
    def conv(cls: type[AnyVAE], latent_dim: int = 20, **options) -> AnyVAE:
        """The convolutional VAE of many tutorials for images of 1 x 28 x 28; the decoder gives logits.

        Conv(1, 32) ReLU Conv(32, 64) ReLU Linear(3136, 256) ReLU, then ``mu`` and ``logvar``; Linear(d, 256) ReLU Linear(256, 3136) ReLU
        ConvT(64, 32) ReLU ConvT(32, 1). Convolutions of size 3, stride 2, padding 1.

        Args:
            latent_dim: size of ``z``: 20 for quality, 2 for pictures of the latent space.
            options: those of the class.
        """
        encoder, decoder = networks.conv(latent_dim, code_dim=2 * latent_dim)
        return cls(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def mlp(
        cls: type[AnyVAE],
        data_shape: int | Sequence[int] = (1, 28, 28),
        hidden: Sequence[int] = (400,),
        latent_dim: int = 20,
        *,
        activation: LayerActivation = "relu",
        init: Initialisation = "default",
        dropout: float = 0.0,
        spectral_norm: bool = False,
        **options,
    ) -> AnyVAE:
        """An MLP and its mirror image, 784-400-20-400-784 by default; the decoder gives logits.

        Args:
            data_shape: shape of one ``x``, an integer for a vector.
            hidden: units of the hidden layers; none for a single layer.
            latent_dim: size of ``z``.
            activation, init, dropout, spectral_norm: of all layers, see :class:`fastvae.models.networks.Layers`.
            options: those of the class.
        """
        layers = networks.Layers(activation, init, dropout, spectral_norm)
        encoder, decoder = networks.mlp(data_shape, hidden, latent_dim, code_dim=2 * latent_dim, layers=layers)
        return cls(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def strided_conv(
        cls: type[AnyVAE],
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
    ) -> AnyVAE:
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
        encoder, decoder = networks.strided_conv(
            image_size, in_channels, channels, hidden, latent_dim, code_dim=2 * latent_dim, layers=layers
        )
        return cls(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def transformer(
        cls: type[AnyVAE],
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
    ) -> AnyVAE:
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
        encoder, decoder = networks.transformer(
            image_size, in_channels, patch_size, width, depth, heads, latent_dim, code_dim=2 * latent_dim, pooling=pooling, layers=layers
        )
        return cls(encoder, decoder, latent_dim, **options)

    def extra_repr(self) -> str:
        return f"latent_shape={self.latent_shape}, free_bits={self.free_bits}, num_samples={self.num_samples}"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(mu, logvar)`` of the posterior."""
        encoded = self.encoder(as_float(x, self.encoder))
        if not isinstance(encoded, Tensor):
            mu, logvar = encoded
            return mu, logvar
        if encoded.ndim < 2 or encoded.shape[1] % 2:
            raise ValueError(f"encoder: gave shape {tuple(encoded.shape)}, has to give (mu, logvar) or an even size in dimension 1")
        mu, logvar = encoded.chunk(2, dim=1)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """The decoder's output: logits, probabilities or means."""
        return self.decoder(z)

    def decode_mean(self, z: Tensor) -> Tensor:
        """The mean of p(x | z): the decoder's logits as probabilities, anything else as it is."""
        recon = self.decode(z)
        return recon.sigmoid() if isinstance(self.likelihood, BCEWithLogitsLoss) else recon

    def forward(self, x: Tensor, eps: Tensor | None = None) -> VAEOutput:
        """The negative evidence lower bound of a batch.

        Args:
            x: data, ``(batch, ...)``; floating, or uint8, which means value / 255.
            eps: the noise, in the shape of ``z``; drawn where it is not given.
        """
        mu, logvar = self.encode(x)
        z, kl = FV.reparameterize_kl(mu, logvar, num_samples=self.num_samples, free_bits=self.free_bits, eps=eps)
        recon = self._decode_samples(z, self.num_samples)
        recon_loss = self._recon_loss(recon, x, self.num_samples, "batchmean")
        return VAEOutput(recon_loss + self.kl_penalty(kl), recon_loss, kl, recon, z, mu, logvar)

    def _decode_samples(self, z: Tensor, num_samples: int | None) -> Tensor:
        return self.decode(z) if num_samples is None else self.decode(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def _recon_loss(self, recon: Tensor, x: Tensor, num_samples: int | None, reduction: str) -> Tensor:
        if num_samples is None:
            return self.likelihood(recon, x, reduction=reduction)
        return self.likelihood(recon.flatten(0, 1), x.repeat(num_samples, *(1,) * (x.ndim - 1)), reduction=reduction)

    @reading
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """The means of p(x | z) for ``n`` draws of z from the prior, on the device of ``generator`` where one is given."""
        if self.latent_shape is None:
            raise ValueError("latent_shape: got None, sample() takes a model that was given the shape of its z")
        like = next(itertools.chain(self.decoder.parameters(), self.parameters()), torch.empty(0))
        device = like.device if generator is None else generator.device
        z = torch.randn(n, *self.latent_shape, generator=generator, device=device, dtype=parameter_dtype(self.decoder))
        return self.decode_mean(z.to(like.device))

    @reading
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x | z) at the posterior's mean of z, in the range of the data."""
        return self.decode_mean(self.encode(x)[0])

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10) -> Tensor:
        """Decodes ``steps`` points on the line between the posterior means of two batches: ``(batch, steps, ...)``, both ends included."""
        first, last = self.encode(start)[0], self.encode(end)[0]
        weights = torch.linspace(0, 1, steps, device=first.device, dtype=first.dtype).view(-1, *(1,) * (first.ndim - 1))
        path = torch.lerp(first.unsqueeze(1), last.unsqueeze(1), weights)
        return self.decode_mean(path.flatten(0, 1)).unflatten(0, path.shape[:2])

    @reading
    def anomaly_score(self, x: Tensor, num_samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """The negative evidence lower bound of each sample in nats, shape ``(batch,)``, with beta 1, averaged over ``num_samples`` of z.

        The score of An and Cho, *Variational Autoencoder based Anomaly Detection using Reconstruction Probability* (2015), plus the KL.
        """
        mu, logvar = self.encode(x)
        z, kl = FV.reparameterize_kl(mu, logvar, num_samples=num_samples, reduction="sample", generator=generator)
        recon = self._decode_samples(z, num_samples)
        return self._recon_loss(recon, x, num_samples, "sample").view(num_samples, -1).mean(0) + kl
