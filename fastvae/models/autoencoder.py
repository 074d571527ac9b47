"""The deterministic autoencoder, which its kinds extend by a penalty or another input."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae._types import ReconLoss, check_choice
from fastvae.models._anomaly_threshold import AnomalyThreshold
from fastvae.models._hub import Pretrained
from fastvae.models._inputs import as_float
from fastvae.models._line import points_between
from fastvae.models._reading import reading
from fastvae.models._ready_made_ae import ReadyMadeAE
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


class AE(ReadyMadeAE, AnomalyThreshold, Pretrained):
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

    def __init__(self, encoder: nn.Module, decoder: nn.Module, *, recon_loss: ReconLoss = "mse"):
        super().__init__()
        check_choice("recon_loss", recon_loss, RECON_LOSSES)
        self.encoder = encoder
        self.decoder = decoder
        self.recon_loss = recon_loss

    @classmethod
    def _of_networks(cls: type[AnyAE], encoder: nn.Module, decoder: nn.Module, latent_dim: int, **options) -> AnyAE:
        """The model of ready-made networks; a subclass that takes more than the two overrides it."""
        return cls(encoder, decoder, **options)

    def extra_repr(self) -> str:
        return f"recon_loss={self.recon_loss!r}"

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
