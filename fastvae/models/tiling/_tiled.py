"""The public function, and the object that it gives."""

import copy
from typing import Any

from torch import Tensor, nn

from fastvae.distributions.prior import check_count
from fastvae.functional._checks import check_nonnegative
from fastvae.models._reading import reading
from fastvae.models.tiling._decoder import TiledDecoder
from fastvae.models.tiling._modules import steps_of


def tiled(vae: nn.Module) -> "TiledVAE":
    r"""Decodes large images tile by tile, to what ``vae.decode`` gives but for rounding: without seams, in working memory that does not
    grow with the image.

    Each tile is computed from the part of the latent image that it depends on, the tile and its halo. Each GroupNorm first gets its mean
    and variance over the whole image, in a pass of its own over all tiles, for which those of the GroupNorms before it are known; the last
    pass gives the image. So with :math:`L` GroupNorms the first layers run :math:`L + 1` times and those behind the last GroupNorm once:
    about :math:`L / 2` times the multiplications, and those in the halos in addition, which are more for small tiles. A feature map of the
    whole image that takes no more memory than a tile's is stored, and what comes before it is not computed again. A decoder without
    GroupNorm takes one pass.

    Args:
        vae: a model whose ``decode`` calls a submodule ``decoder``: any of :mod:`fastvae.models` with a convolutional decoder and a latent
            image, such as ``ImageVAE.residual`` and ``VQVAE.conv``, or diffusers' ``AutoencoderKL``, patched or not. It is not changed, and
            looked at anew in each call. The decoder is of convolutions with stride 1 and zeros as padding, transposed convolutions,
            upsampling by repetition, activations, GroupNorm, BatchNorm, RMS norms, dropout, and residual blocks of those. Self-attention
            runs as a whole and takes some feature maps in its resolution, which grow with the latent image.

    Returns:
        An object with the method :meth:`~fastvae.models.tiling.TiledVAE.decode`.

    Raises:
        ValueError: where ``vae`` has no decoder, or the decoder has a module that is not known, which the message names, or one with hooks
            or a ``forward`` of its own: these would see tiles in place of images.
    """
    return TiledVAE(vae)


class TiledVAE:
    """The result of :func:`fastvae.tiled`."""

    def __init__(self, vae: nn.Module):
        if not isinstance(vae, nn.Module) or vae._modules.get("decoder") is None or not hasattr(type(vae), "decode"):
            raise ValueError(f"vae: got {type(vae).__name__}, takes a module with a submodule `decoder` and a method `decode`")
        self.vae = vae
        # A module that is not known is an error here, before there is an image to wait for.
        steps_of(self._decoder, "decoder")

    @property
    def _decoder(self) -> nn.Module:
        return self.vae.get_submodule("decoder")

    def decode(self, z: Tensor, tile: int = 512, *, budget: float | None = None, **options: Any) -> Any:
        """What ``vae.decode(z, **options)`` gives in evaluation mode, without gradients.

        Args:
            z: the latent image, ``(batch, channels, height, width)``, or what else ``vae.decode`` takes. All samples of the batch are
                decoded at once.
            tile: largest height and width of a tile, in pixels of the image, which is cut into tiles of equal size. An image that is no
                larger is decoded as a whole.
            budget: largest number of bytes of a feature map of the whole image that is stored for the passes that follow; two are at once.
                0 stores none but those around attention, more takes fewer passes. By default as many bytes as the largest feature map of a
                tile, so that ``tile`` alone decides on the memory.
            options: those of ``vae.decode``, such as ``return_dict`` of diffusers.

        Returns:
            What ``vae.decode`` returns.

        Raises:
            ValueError: for a ``tile`` below 1, a negative ``budget``, or a latent that is not an image.
        """
        decoder = TiledDecoder(self._decoder, check_count("tile", tile), budget if budget is None else check_nonnegative("budget", budget))
        # The method of the model's class calls the decoder, with all that it does before and behind that. A method of the instance, such as
        # a compiled one, would call that of self.vae.
        model = copy.copy(self.vae)
        model._modules = {**self.vae._modules, "decoder": decoder}
        if getattr(model, "use_tiling", False):
            # diffusers would cut the latent image itself.
            model.use_tiling = False  # type: ignore[assignment]
        return _decode(model, z, **options)


@reading
def _decode(model: Any, z: Tensor, **options: Any) -> Any:
    return type(model).decode(model, z, **options)
