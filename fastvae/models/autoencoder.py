"""Deterministic autoencoders: plain, denoising, sparse, contractive and stacked, and encoders and decoders for them."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._ops import accumulation_dtype
from fastvae._pytree import exportable
from fastvae.functional._checks import check_choice, check_nonnegative
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.nn.corruption import GaussianNoise

LOSSES = {"mse": FV.mse_loss, "bce_with_logits": FV.binary_cross_entropy_with_logits, "bce": FV.binary_cross_entropy}
ACTIVATIONS = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
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


class AE(nn.Module):
    r"""An autoencoder of any encoder and decoder: the mean over samples of :math:`\sum_i \ell(\hat x_i, x_i)`, :math:`\hat x = g(f(x))`.

    :meth:`encode` and :meth:`decode` are parts of a call: differentiable, in the model's mode. The other methods read: they have no
    gradient and run as in evaluation mode, so that they change no buffer of a model in training but ``threshold``, which
    :meth:`fit_threshold` sets.

    Args:
        encoder: f, from a batch to codes. It sees an 8-bit image as value / 255.
        decoder: g, from codes to the shape of the data.
        loss: ``"mse"`` :math:`(\hat x - x)^2`, ``"bce_with_logits"`` (the decoder gives logits), or ``"bce"`` (it gives probabilities).
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, loss: str = "mse"):
        super().__init__()
        check_choice("loss", loss, LOSSES)
        self.encoder = encoder
        self.decoder = decoder
        self.loss = loss
        self._set_threshold(torch.tensor(math.nan))

    def _set_threshold(self, value: Tensor) -> None:
        """NaN stands for none, which is not stored."""
        self.register_buffer("threshold", value, persistent=not value.isnan())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: dict, strict: bool, *args: Any) -> None:
        # Whether there is a threshold is a part of the state that is loaded.
        stored = prefix + "threshold" in state_dict
        if stored:
            self.register_buffer("threshold", self.threshold, persistent=True)
        elif strict:
            self._set_threshold(torch.full_like(self.threshold, math.nan))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *args)

    def encode(self, x: Tensor) -> Tensor:
        """The codes: features for what comes after."""
        return self.encoder(as_float(x, self.encoder))

    def decode(self, z: Tensor) -> Tensor:
        """Reconstructions in the range of the data."""
        recon = self.decoder(z)
        return recon.sigmoid() if self.loss == "bce_with_logits" else recon

    def forward(self, x: Tensor) -> AEOutput:
        """The loss of a batch ``(batch, ...)``, floating or uint8, which means value / 255."""
        z, penalty, weight = self._encode_with_penalty(as_float(x, self.encoder))
        recon = self.decoder(z)
        recon_loss = LOSSES[self.loss](recon, x, reduction="batchmean")
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
        self._set_threshold(torch.quantile(scores, quantile).to(self.threshold))
        return self.threshold.clone()

    def is_anomaly(self, x: Tensor) -> Tensor:
        """Which samples score above the threshold, bool, shape ``(batch,)``."""
        if self.threshold.isnan():
            raise RuntimeError("threshold: has not been fitted, call fit_threshold(batches) with validation data")
        return self.anomaly_score(x) > self.threshold


class DenoisingAE(AE):
    r"""Encodes a corrupted input and reconstructs the clean one (Vincent et al., *Extracting and Composing Robust Features with Denoising
    Autoencoders*, 2008). A call corrupts in evaluation mode too, as the objective says; :meth:`reconstruct` does not.

    Args:
        encoder, decoder, loss: see :class:`AE`.
        corruption: module or function from a batch to a corrupted one: ``fastvae.nn.corruption.GaussianNoise``, ``Masking``,
            ``SaltAndPepper``; by default Gaussian noise of standard deviation 0.3.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, corruption: Callable[[Tensor], Tensor] | None = None, loss: str = "mse"):
        super().__init__(encoder, decoder, loss=loss)
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
        encoder, decoder, loss: see :class:`AE`.
        penalty: ``"kl"`` or ``"l1"``.
        weight: of the penalty.
        rho: the mean activation that ``"kl"`` asks for, in (0, 1).
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        *,
        penalty: str = "kl",
        weight: float = 1.0,
        rho: float = 0.05,
        loss: str = "mse",
    ):
        super().__init__(encoder, decoder, loss=loss)
        check_choice("penalty", penalty, ("kl", "l1"))
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

    def _divergence(self, rho_hat: Tensor) -> Tensor:
        # A unit that is never active has a finite gradient still; one outside (0, 1) shows as NaN.
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
        encoder, decoder, loss: see :class:`AE`.
        weight: :math:`\lambda`.
        jacobian: options of :func:`fastvae.functional.jacobian_frobenius`: ``method``, ``num_projections``, ``chunk_size``. By default the
            closed form for one layer, the Gram form for an MLP, and random projections for anything else.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, weight: float = 0.1, loss: str = "mse", **jacobian):
        super().__init__(encoder, decoder, loss=loss)
        self.weight = check_nonnegative("weight", weight)
        self.jacobian = jacobian

    def _encode_with_penalty(self, x: Tensor) -> tuple[Tensor, Tensor, float]:
        norm, z = FV.jacobian_frobenius(self.encoder, x, with_output=True, **self.jacobian)
        return z, norm, self.weight


class StackedAE(AE):
    """An MLP autoencoder that can be trained one layer at a time (Bengio et al., *Greedy Layer-Wise Training of Deep Networks*, 2007).

    :meth:`pretrain` does so, each layer as an autoencoder of the codes below it; training the model itself afterwards is the fine-tuning.

    Args:
        data_shape: shape of one ``x``, an integer for a vector.
        sizes: units of the layers; the last is the code.
        activation: of every layer, the code's too.
        output: activation of the reconstruction: ``"sigmoid"``, ``"tanh"`` or ``"identity"``, by the range of the data.
        loss: see :class:`AE`.
    """

    def __init__(
        self,
        data_shape: int | Sequence[int] = (1, 28, 28),
        sizes: Sequence[int] = (512, 256, 32),
        *,
        activation: str = "relu",
        output: str = "sigmoid",
        loss: str = "mse",
    ):
        make, make_output = _activation("activation", activation), _activation("output", output)
        shape = _shape(data_shape)
        pairs = list(itertools.pairwise((math.prod(shape), *sizes)))
        encoders = [nn.Sequential(nn.Linear(below, above), make()) for below, above in pairs]
        outputs = [make_output, *[make] * (len(pairs) - 1)]
        decoders = [nn.Sequential(nn.Linear(above, below), make_()) for (below, above), make_ in zip(pairs, outputs, strict=True)]
        super().__init__(nn.Sequential(nn.Flatten(), *encoders), nn.Sequential(*reversed(decoders), nn.Unflatten(1, shape)), loss=loss)

    def stage(self, level: int) -> AE:
        """The autoencoder of one layer, counted from 0; its modules are this model's own."""
        encoders, decoders = list(self.encoder)[1:], list(self.decoder)[-2::-1]
        # Codes are real numbers, whatever the data are.
        return AE(encoders[level], decoders[level], loss=self.loss if level == 0 else "mse")

    @reading
    def stage_input(self, x: Tensor, level: int) -> Tensor:
        """What the layer ``level`` learns to reconstruct: the codes of the layers below it."""
        return self.encoder[: level + 1](as_float(x, self.encoder))

    def pretrain(
        self,
        batches: Iterable[Tensor],
        epochs: int = 10,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        corruption: Callable[[Tensor], Tensor] | None = None,
    ) -> list[list[float]]:
        """Trains the layers in turn, from the input up.

        Args:
            batches: what can be iterated over once an epoch, such as a ``DataLoader`` of images alone.
            epochs: passes over ``batches`` for each layer.
            optimizer: from parameters to an optimizer; Adam with a learning rate of 1e-3 by default.
            corruption: of what each layer encodes, which makes this a stacked denoising autoencoder.

        Returns:
            The mean loss of each epoch, a list for each layer.
        """
        make = functools.partial(torch.optim.Adam, lr=1e-3) if optimizer is None else optimizer
        return [self._pretrain_stage(level, batches, epochs, make, corruption) for level in range(len(self.encoder) - 1)]

    def _pretrain_stage(self, level, batches, epochs, make_optimizer, corruption) -> list[float]:
        stage = self.stage(level)
        if corruption is not None:
            stage = DenoisingAE(stage.encoder, stage.decoder, corruption=corruption, loss=stage.loss)
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


def _activation(name: str, value: str) -> type[nn.Module]:
    check_choice(name, value, ACTIVATIONS)
    return ACTIVATIONS[value]


def _shape(data_shape: int | Sequence[int]) -> tuple[int, ...]:
    return (data_shape,) if isinstance(data_shape, int) else tuple(data_shape)


def mlp_coders(
    data_shape: int | Sequence[int] = (1, 28, 28),
    hidden: Sequence[int] = (512, 256),
    latent_dim: int = 32,
    *,
    activation: str = "relu",
    code: str = "identity",
    output: str = "sigmoid",
) -> tuple[nn.Sequential, nn.Sequential]:
    """An MLP encoder and its mirror image, 784-512-256-32-256-512-784 by default: ``AE(*mlp_coders())``.

    Args:
        data_shape: shape of one ``x``, an integer for a vector.
        hidden: units of the hidden layers; none for a single layer.
        latent_dim: units of the code.
        activation: of the hidden layers: ``"relu"``, ``"leaky_relu"``, ``"silu"``, ``"sigmoid"``, ``"tanh"`` or ``"identity"``.
        code: activation of the code.
        output: activation of the reconstruction, by the range of the data; ``"identity"`` for logits.
    """
    shape = _shape(data_shape)
    sizes = (math.prod(shape), *hidden, latent_dim)
    encoder = _mlp(sizes, _activation("activation", activation), _activation("code", code))
    decoder = _mlp(sizes[::-1], _activation("activation", activation), _activation("output", output))
    return nn.Sequential(nn.Flatten(), *encoder), nn.Sequential(*decoder, nn.Unflatten(1, shape))


def _mlp(sizes: Sequence[int], activation: type[nn.Module], last: type[nn.Module]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), activation()]
    return [*layers[:-1], last()]


def linear_coders(data_shape: int | Sequence[int], latent_dim: int) -> tuple[nn.Sequential, nn.Sequential]:
    """One linear layer each way. With squared error it reaches the error of a principal component analysis with as many components
    (Baldi and Hornik 1989)."""
    return mlp_coders(data_shape, (), latent_dim, output="identity")


def conv_coders(latent_dim: int = 32, *, output: str = "sigmoid") -> tuple[nn.Sequential, nn.Sequential]:
    """A convolutional encoder and decoder for images of 1 x 28 x 28: two convolutions of stride 2 each way, and two linear layers.

    Args:
        latent_dim: units of the code.
        output: activation of the reconstruction; ``"identity"`` for logits.
    """
    make_output = _activation("output", output)
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 256),
        nn.ReLU(),
        nn.Linear(256, latent_dim),
    )
    decoder = nn.Sequential(
        nn.Linear(latent_dim, 256),
        nn.ReLU(),
        nn.Linear(256, 64 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 3, stride=2, padding=1, output_padding=1),
        make_output(),
    )
    return encoder, decoder
