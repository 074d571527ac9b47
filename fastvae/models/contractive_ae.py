"""The contractive autoencoder (Rifai et al., *Contractive Auto-Encoders: Explicit Invariance During Feature Extraction*, 2011)."""

from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import ReconLoss
from fastvae.functional._checks import check_nonnegative
from fastvae.models.autoencoder import AE


class ContractiveAE(AE):
    r"""An autoencoder whose code moves little with the input: :math:`+ \lambda \| \partial f(x) / \partial x \|_F^2`, mean over samples
    (Rifai et al., *Contractive Auto-Encoders: Explicit Invariance During Feature Extraction*, 2011).

    Args:
        encoder, decoder, recon_loss: see :class:`~fastvae.models.AE`.
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
