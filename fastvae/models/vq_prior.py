"""A prior over the codes of a VQ-VAE, by which a VQ-VAE can be sampled."""

from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae.models._drawing import check_drawing, draw
from fastvae.models._hub import Pretrained
from fastvae.models._index_transformer import IndexShape, IndexTransformer, cross_entropy, level_shapes, shown
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.models.vqvae import VQVAE
from fastvae.models.vqvae2 import VQVAE2
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer


@exportable
class IndexPriorOutput(NamedTuple):
    """``loss`` is the sum of ``level_loss``, one term a level, in nats per sample; ``logits`` ``(batch, positions, codes)`` and ``indices``
    ``(batch, positions)`` have an entry for each level too."""

    loss: Tensor
    level_loss: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]


AnyIndexPrior = TypeVar("AnyIndexPrior", bound="IndexPrior")


class IndexPrior(IndexTransformer, Pretrained):
    r"""An autoregressive distribution of the indices of a trained VQ-VAE, by a causal transformer (van den Oord et al., *Neural Discrete
    Representation Learning*, 2017, section 3.3; Razavi et al., *VQ-VAE-2*, 2019, section 3.2, with one transformer for both levels).

    .. math:: -\log p(k) = -\sum_i \log p(k_i \mid k_1, \dots, k_{i-1}, y)

    in nats per sample. The indices of an image are one sequence, row by row, and those of several heads or residual steps one after the
    other. Of a :class:`VQVAE2` the top's come first, then the bottom's, so that each of the bottom's is given all of the top's.

    The VQ-VAE is a part of the module and of its ``state_dict``, without gradients and always in evaluation mode: its parameters get
    ``requires_grad=False``, and training leaves its codebook as it is.

    Args:
        vqvae: a :class:`VQVAE` or a :class:`VQVAE2`.
        index_shape: shape of one image's indices, such as (7, 7); for a :class:`VQVAE2` a pair of shapes, top and bottom.
        width, depth, heads: units of a position, blocks, and heads of a block.
        num_classes: number of classes, where the indices are given the class :math:`y`; None for none.
        dropout: share of the hidden values that are dropped in training, in [0, 1).

    Raises:
        TypeError: for another kind of ``vqvae`` or of quantizer.
        ValueError: for an option out of its range.
    """

    def __init__(
        self,
        vqvae: VQVAE | VQVAE2,
        index_shape: IndexShape,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
    ):
        codes = [_num_codes(quantizer) for quantizer in _quantizers(vqvae)]
        shapes = level_shapes(index_shape, len(codes))
        super().__init__(codes, shapes, width=width, depth=depth, heads=heads, num_classes=num_classes, dropout=dropout)
        self.vqvae = vqvae.requires_grad_(False).eval()

    @classmethod
    @ready_made
    def transformer(cls: type[AnyIndexPrior], vqvae: VQVAE | VQVAE2, index_shape: IndexShape, **options) -> AnyIndexPrior:
        """The prior itself, which can be stored where the VQ-VAE is of a ready-made network.

        Args:
            vqvae, index_shape, options: those of the class.
        """
        return cls(vqvae, index_shape, **options)

    @property
    def latent_shape(self) -> tuple[Any, ...]:
        """``index_shape``."""
        return self.index_shapes if len(self.index_shapes) > 1 else self.index_shapes[0]

    def train(self, mode: bool = True) -> "IndexPrior":
        super().train(mode)
        self.vqvae.eval()
        return self

    def forward(self, x: Tensor, label: Tensor | None = None) -> IndexPriorOutput:
        """The negative log-likelihood of the indices of a batch of images.

        Args:
            x: images, floating or uint8 (value / 255).
            label: with ``num_classes`` the classes, integers of shape ``(batch,)`` from 0 on, which is not checked on a GPU.
        """
        encoded = self.encode(x)
        indices = self._flattened((encoded,) if isinstance(encoded, Tensor) else encoded)
        logits = self.logits(indices, label)
        losses = [cross_entropy(*level) for level in zip(logits, indices, strict=True)]
        level_loss = tuple(loss.mean() for loss in losses)
        return IndexPriorOutput(sum(level_loss[1:], level_loss[0]), level_loss, logits, indices)

    def log_prob(self, indices: Tensor | tuple[Tensor, ...], label: Tensor | None = None) -> Tensor:
        """The log-probability of indices as :meth:`VQVAE.encode` gives them, in nats: ``(batch,)``."""
        levels = self._flattened((indices,) if isinstance(indices, Tensor) else indices)
        losses = [cross_entropy(*level) for level in zip(self.logits(levels, label), levels, strict=True)]
        return -sum(losses[1:], losses[0])

    def encode(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The indices of a batch, those of the VQ-VAE."""
        return self.vqvae.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        """The decoded codes of a batch, those of the VQ-VAE."""
        return self.vqvae.reconstruct(x)

    def _flattened(self, indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shapes = tuple(tuple(level.shape[1:]) for level in indices)
        if shapes != self.index_shapes:
            raise ValueError(f"index_shape: got {shown(self.index_shapes)} for indices of shape {shown(shapes)}")
        return tuple(level.flatten(1) for level in indices)

    @reading
    def sample_indices(
        self,
        n: int,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Draws the indices of ``n`` images, one position after the other: a tensor ``(n, *index_shape)`` for each level.

        The arguments are those of :meth:`sample`.
        """
        check_drawing(temperature, top_k)
        return self.write(self.start_of(n, label), lambda logits: draw(logits, generator, temperature, top_k))

    @reading
    def sample(
        self,
        n: int,
        label: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
    ) -> Tensor:
        """Draws ``n`` images: indices from the prior, decoded by the VQ-VAE.

        Args:
            n: number of images.
            label: with ``num_classes`` the class of each image, integers of shape ``(n,)``.
            generator: decides the draws; one of the CPU serves every device.
            temperature: below 1 makes probable indices more probable; 0 takes the most probable.
            top_k: only so many of the most probable indices can be drawn; all with None.
        """
        indices = self.sample_indices(n, label, generator=generator, temperature=temperature, top_k=top_k)
        return self.vqvae.decode(cast("Any", indices if isinstance(self.vqvae, VQVAE2) else indices[0]))

    def extra_repr(self) -> str:
        return f"index_shape={shown(self.index_shapes)}, num_classes={self.num_classes}"


def _quantizers(vqvae: nn.Module) -> list[nn.Module]:
    if isinstance(vqvae, VQVAE2):
        return [vqvae.top_quantizer, vqvae.bottom_quantizer]
    if isinstance(vqvae, VQVAE):
        return [vqvae.quantizer]
    raise TypeError(f"vqvae: got {type(vqvae).__name__}, takes a VQVAE or a VQVAE2")


def _num_codes(quantizer: nn.Module) -> int:
    first = quantizer.layers[0] if isinstance(quantizer, ResidualVectorQuantizer) else quantizer
    if not isinstance(first, VectorQuantizer):
        raise TypeError(f"quantizer: got {type(quantizer).__name__}, takes a VectorQuantizer or a ResidualVectorQuantizer")
    return first.num_codes
