"""Deterministic autoencoders: plain, denoising, sparse, contractive and stacked."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae._types import Initialisation, LayerActivation, Pooling, ReconLoss, SparsePenalty, check_choice
from fastvae.functional._checks import check_nonnegative
from fastvae.models import networks
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.nn.corruption import GaussianNoise
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


class DenoisingAE(AE):
    r"""Encodes a corrupted input and reconstructs the clean one (Vincent et al., *Extracting and Composing Robust Features with Denoising
    Autoencoders*, 2008). A call corrupts in evaluation mode too, as the objective says; :meth:`reconstruct` does not.

    Args:
        encoder, decoder, recon_loss: see :class:`AE`.
        corruption: module or function from a batch to a corrupted one: ``fastvae.nn.corruption.GaussianNoise``, ``Masking``,
            ``SaltAndPepper``; by default Gaussian noise of standard deviation 0.3.
    """

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, *, corruption: Callable[[Tensor], Tensor] | None = None, recon_loss: ReconLoss = "mse"
    ):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        self.corruption = GaussianNoise(0.3) if corruption is None else corruption

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        return super()._encode_with_penalty(self.corruption(x))

    def denoise(self, x: Tensor) -> Tensor:
        """The clean version of corrupted samples: :meth:`reconstruct`."""
        return self.reconstruct(x)


def _beyond_log1p(x: Tensor) -> Tensor:
    """``x - log(1 + x)``, never negative, for ``|x| <= 1 / 4``: with ``s = x / (2 + x)`` the logarithm is ``2 (s + s^3 / 3 + ...)``, and
    ``x - 2 s = s x``."""
    s = x / (2 + x)
    square = s * s
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11)))
    return s * (x - 2 * square * series)


class SparseAE(AE):
    r"""An autoencoder whose units are seldom active.

    ``penalty="kl"``: :math:`\sum_j KL(\rho \| \hat\rho_j)` between Bernoulli distributions, :math:`\hat\rho_j` the unit's mean over the
    batch, for codes in (0, 1), those of a sigmoid (Ng, *Sparse autoencoder*, CS294A lecture notes, 2011). ``penalty="l1"``:
    :math:`\sum_j |z_j|`, mean over samples.

    Args:
        encoder, decoder, recon_loss: see :class:`AE`.
        penalty: ``"kl"`` or ``"l1"``.
        weight: of the penalty.
        rho: the mean activation that ``"kl"`` asks for, in (0, 1).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        penalty: SparsePenalty = "kl",
        weight: float = 1.0,
        rho: float = 0.05,
        recon_loss: ReconLoss = "mse",
    ):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        check_choice("penalty", penalty, get_args(SparsePenalty))
        if not 0 < rho < 1:
            raise ValueError(f"rho: got {rho!r}, takes a number in (0, 1)")
        self.penalty = penalty
        self.weight = check_nonnegative("weight", weight)
        self.rho = float(rho)

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        z = self.encoder(x)
        wide = z.to(accumulation_dtype(z.dtype))
        penalty = wide.flatten(1).abs().sum(1).mean() if self.penalty == "l1" else self._divergence(wide.mean(0))
        return z, penalty, self.weight

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, penalty={self.penalty!r}, weight={self.weight}, rho={self.rho}"

    def _divergence(self, rho_hat: Tensor) -> Tensor:
        # eps keeps the gradient of a unit that is never active finite. A mean outside (0, 1) gives NaN.
        rho, eps = self.rho, torch.finfo(rho_hat.dtype).tiny
        active = rho * (math.log(rho) - torch.log(rho_hat + eps))
        far = active + (1 - rho) * (math.log1p(-rho) - torch.log1p(-rho_hat + eps))
        # Near rho the two terms cancel but for their parts of second order, which are added up without the first.
        near = (rho_hat - rho).abs() < 0.25 * min(rho, 1 - rho)
        excess = torch.where(near, rho_hat - rho, 0.0)
        return torch.where(near, rho * _beyond_log1p(excess / rho) + (1 - rho) * _beyond_log1p(-excess / (1 - rho)), far).sum()

    @reading
    def mean_activation(self, x: Tensor) -> Tensor:
        """The mean of each unit of the code over a batch; of its absolute value with ``"l1"``."""
        z = self.encode(x)
        return (z.abs() if self.penalty == "l1" else z).mean(0)


class ContractiveAE(AE):
    r"""An autoencoder whose code moves little with the input: :math:`+ \lambda \| \partial f(x) / \partial x \|_F^2`, mean over samples
    (Rifai et al., *Contractive Auto-Encoders: Explicit Invariance During Feature Extraction*, 2011).

    Args:
        encoder, decoder, recon_loss: see :class:`AE`.
        weight: :math:`\lambda`.
        jacobian: options of :func:`fastvae.functional.jacobian_frobenius`: ``method``, ``num_projections``, ``chunk_size``. By default the
            closed form for one layer, the Gram form for an MLP, and random projections for anything else.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, weight: float = 0.1, recon_loss: ReconLoss = "mse", **jacobian):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        self.weight = check_nonnegative("weight", weight)
        self.jacobian = jacobian

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), f"weight={self.weight}", *(f"{name}={value!r}" for name, value in self.jacobian.items())])

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        norm, z = FV.jacobian_frobenius(self.encoder, x, with_output=True, **self.jacobian)
        return z, norm, self.weight


class StackedAE(AE):
    """An autoencoder that can be trained one stage at a time (Bengio et al., *Greedy Layer-Wise Training of Deep Networks*, 2007).

    :meth:`pretrain` does so, each stage as an autoencoder of the codes below it; training the model itself afterwards is the fine-tuning.

    Args:
        encoder: a sequence of stages, from the data up; the ready-made networks are such sequences.
        decoder: as many stages, from the code down: each undoes its counterpart.
        recon_loss: see :class:`AE`.
    """

    def __init__(self, encoder: nn.Sequential, decoder: nn.Sequential, *, recon_loss: ReconLoss = "mse"):
        super().__init__(encoder, decoder, recon_loss=recon_loss)
        for name, coder in (("encoder", encoder), ("decoder", decoder)):
            if not isinstance(coder, nn.Sequential):
                raise TypeError(f"{name}: got {type(coder).__name__}, takes an nn.Sequential of stages")
        if len(encoder) != len(decoder):
            raise ValueError(f"decoder: got {len(decoder)} stages, takes one for each of the encoder's {len(encoder)}")

    def stage(self, level: int) -> AE:
        """The autoencoder of one stage, counted from 0; its modules are this model's own."""
        # Codes are real numbers, whatever the data are.
        encoder, decoder = cast("nn.Sequential", self.encoder), cast("nn.Sequential", self.decoder)
        return AE(encoder[level], decoder[-1 - level], recon_loss=self.recon_loss if level == 0 else "mse")

    @reading
    def stage_input(self, x: Tensor, level: int) -> Tensor:
        """The data that the stage ``level`` learns to reconstruct: the codes of the stages below it."""
        return cast("nn.Sequential", self.encoder)[:level](as_float(x, self.encoder))

    def pretrain(
        self,
        batches: Iterable[Tensor],
        epochs: int = 10,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[float]]:
        """Trains the stages in turn, from the input up.

        Args:
            batches: what can be iterated over once an epoch, such as a ``DataLoader`` of images alone.
            epochs: passes over ``batches`` for each stage.
            optimizer: from parameters to an optimizer; Adam with a learning rate of 1e-3 by default.
            corruption: of what each stage encodes, which makes this a stacked denoising autoencoder.

        Returns:
            The mean loss of each epoch, a list for each stage.
        """
        make = functools.partial(torch.optim.Adam, lr=1e-3) if optimizer is None else optimizer
        return [self._pretrain_stage(level, batches, epochs, make, corruption) for level in range(len(cast("nn.Sequential", self.encoder)))]

    def _pretrain_stage(self, level, batches, epochs, make_optimizer, corruption) -> list[float]:
        stage = self.stage(level)
        if corruption is not None:
            stage = DenoisingAE(stage.encoder, stage.decoder, corruption=corruption, recon_loss=stage.recon_loss)
        optimizer = make_optimizer(stage.parameters())
        history = []
        for _ in range(epochs):
            losses = []
            for batch in batches:
                optimizer.zero_grad()
                loss = stage(self.stage_input(batch, level)).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            if not losses:
                raise ValueError("batches: got none, takes what can be iterated over once an epoch")
            history.append(torch.stack(losses).mean().item())
        return history
