"""The denoising autoencoder (Vincent et al., *Extracting and Composing Robust Features with Denoising Autoencoders*, 2008)."""

from collections.abc import Callable

from torch import Tensor, nn

from fastvae._types import ReconLoss
from fastvae.models.autoencoder import AE
from fastvae.nn.corruption import GaussianNoise


class DenoisingAE(AE):
    r"""Encodes a corrupted input and reconstructs the clean one (Vincent et al., *Extracting and Composing Robust Features with Denoising
    Autoencoders*, 2008). A call corrupts in evaluation mode too, as the objective says; :meth:`reconstruct` does not.

    Args:
        encoder, decoder, recon_loss: see :class:`~fastvae.models.AE`.
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
