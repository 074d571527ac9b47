"""The deterministic autoencoder, which its kinds extend by a penalty or another input."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae._types import Initialisation, LayerActivation, Pooling, ReconLoss, check_choice
from fastvae.models import networks
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float
from fastvae.models._line import points_between
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.ops._results import accumulation_dtype

RECON_LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": FV.mse_loss,
    "bce_with_logits": FV.binary_cross_entropy_with_logits,
    "bce": FV.binary_cross_entropy,
}


@exportable
class AEOutput(NamedTuple):
    """The terms of the loss per sample, and the tensors behind them.

    ``penalty`` is without its weight, 0 where the model has none; ``recon`` is what the decoder gave, logits with ``"bce_with_logits"``.
    """

    loss: Tensor
    recon_loss: Tensor
    penalty: Tensor
    recon: Tensor
    z: Tensor


AnyAE = TypeVar("AnyAE", bound="AE")


class AE(nn.Module, Pretrained):
    r"""An autoencoder of any encoder and decoder: the mean over samples of :math:`\sum_i \ell(\hat x_i, x_i)`, :math:`\hat x = g(f(x))`.

    :meth:`encode` and :meth:`decode` are parts of a call: differentiable, in the model's mode. The other methods read: they have no
    gradient and run as in evaluation mode, so that they change no buffer of a model in training but ``threshold``, which
    :meth:`fit_threshold` sets.

    Args:
        encoder: f, from a batch to codes. It sees an 8-bit image as value / 255.
        decoder: g, from codes to the shape of the data.
        recon_loss: ``"mse"`` :math:`(\hat x - x)^2`, ``"bce_with_logits"`` (the decoder gives logits), or ``"bce"`` (it gives
            probabilities).
    """

    threshold: Tensor

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, recon_loss: ReconLoss = "mse"):
        super().__init__()
        check_choice("recon_loss", recon_loss, RECON_LOSSES)
        self.encoder = encoder
        self.decoder = decoder
        self.recon_loss = recon_loss
        # NaN stands for no threshold, which is not stored.
        self.register_buffer("threshold", torch.tensor(math.nan), persistent=False)

    @classmethod
    @ready_made
    def mlp(
        cls: type[AnyAE],
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
    ) -> AnyAE:
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
    def linear(cls: type[AnyAE], data_shape: int | Sequence[int], latent_dim: int, **options) -> AnyAE:
        """One linear layer each way. With squared error it reaches the error of a principal component analysis with as many components
        (Baldi and Hornik 1989).

        Args:
            data_shape, latent_dim, options: see :meth:`mlp`.
        """
        return cls.mlp(data_shape, (), latent_dim, output="identity", **options)

    @classmethod
    @ready_made
    def conv(cls: type[AnyAE], latent_dim: int = 32, *, output: LayerActivation = "sigmoid", **options) -> AnyAE:
        """Two convolutions of stride 2 and two linear layers each way, for images of 1 x 28 x 28; see :meth:`fastvae.models.VAE.conv`.

        Args:
            latent_dim, output, options: see :meth:`mlp`.
        """
        encoder, decoder = networks.conv(latent_dim, output=output)
        return cls._of_networks(encoder, decoder, latent_dim, **options)

    @classmethod
    @ready_made
    def strided_conv(
        cls: type[AnyAE],
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
    ) -> AnyAE:
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
        cls: type[AnyAE],
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
    ) -> AnyAE:
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
    def _of_networks(cls: type[AnyAE], encoder: nn.Module, decoder: nn.Module, latent_dim: int, **options) -> AnyAE:
        """The model of ready-made networks; a subclass that takes more than the two overrides it."""
        return cls(encoder, decoder, **options)

    def extra_repr(self) -> str:
        return f"recon_loss={self.recon_loss!r}"

    def _store_threshold(self, stored: bool) -> None:
        """Puts the threshold into the ``state_dict``, or takes it out."""
        self.register_buffer("threshold", self.threshold, persistent=stored)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "threshold" in state_dict:
            self._store_threshold(True)
        elif any(name.startswith(prefix) for name in state_dict):
            # The old threshold belongs to other weights.
            self.threshold.fill_(math.nan)
            self._store_threshold(False)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def encode(self, x: Tensor) -> Tensor:
        """The codes: features for what comes after."""
        return self.encoder(as_float(x, self.encoder))

    def decode(self, z: Tensor) -> Tensor:
        """Reconstructions in the range of the data."""
        recon = self.decoder(z)
        return recon.sigmoid() if self.recon_loss == "bce_with_logits" else recon

    def forward(self, x: Tensor) -> AEOutput:
        """The loss of a batch ``(batch, ...)``, floating or uint8, which means value / 255."""
        z, penalty, weight = self._encode_with_penalty(as_float(x, self.encoder))
        recon = self.decoder(z)
        recon_loss = RECON_LOSSES[self.recon_loss](recon, x, reduction="batchmean")
        return AEOutput(recon_loss + weight * penalty, recon_loss, penalty, recon, z)

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        """The codes of a scaled batch, the penalty per sample, and its weight."""
        z = self.encoder(x)
        return z, z.new_zeros((), dtype=accumulation_dtype(z.dtype)), 0.0

    @reading
    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded codes of ``x``, in the range of the data."""
        return self.decode(self.encode(x))

    @reading
    def interpolate(self, start: Tensor, end: Tensor, steps: int = 10) -> Tensor:
        """Decodes ``steps`` points on the line between the codes of two batches: ``(batch, steps, ...)``, both ends included."""
        path = points_between(self.encode(start), self.encode(end), steps)
        return self.decode(path.flatten(0, 1)).unflatten(0, path.shape[:2])

    @reading
    def anomaly_score(self, x: Tensor) -> Tensor:
        r"""The squared error :math:`\| x - \hat x \|^2` of each sample, shape ``(batch,)``."""
        return FV.mse_loss(self.reconstruct(x), x, reduction="sample")

    def fit_threshold(self, batches: Tensor | Iterable[Tensor], quantile: float = 0.95) -> Tensor:
        """Sets ``threshold``, a buffer, to a quantile of the scores of validation data that hold no anomalies, and gives a copy of it. From
        then on the ``state_dict`` holds it.

        Args:
            batches: a batch, or several.
            quantile: the share of the validation data that is to pass.
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile: got {quantile!r}, takes a number in (0, 1]")
        batches = [batches] if isinstance(batches, Tensor) else batches
        scores = torch.cat([self.anomaly_score(batch) for batch in batches])
        if scores.numel() == 0:
            raise ValueError("batches: got no samples, takes at least one")
        self.threshold.copy_(torch.quantile(scores, quantile))
        self._store_threshold(True)
        return self.threshold.clone()

    def is_anomaly(self, x: Tensor) -> Tensor:
        """A mask of the samples that score above the threshold: bool, shape ``(batch,)``."""
        if self.threshold.isnan():
            raise RuntimeError("threshold: has not been fitted, call fit_threshold(batches) with validation data")
        return self.anomaly_score(x) > self.threshold
