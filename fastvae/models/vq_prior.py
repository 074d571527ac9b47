"""A prior over the codes of a VQ-VAE, by which a VQ-VAE can be sampled."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae.models._drawing import check_drawing, draw
from fastvae.models._hub import Pretrained
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.models.networks import KeyValueCache, Layers, TransformerBlock
from fastvae.models.networks.transformer import POSITION_STD
from fastvae.models.vqvae import VQVAE, VQVAE2
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer
from fastvae.ops._results import accumulation_dtype


@exportable
class IndexPriorOutput(NamedTuple):
    """``loss`` is the sum of ``level_loss``, one term a level, in nats per sample; ``logits`` ``(batch, positions, codes)`` and ``indices``
    ``(batch, positions)`` have an entry for each level too."""

    loss: Tensor
    level_loss: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]


AnyIndexPrior = TypeVar("AnyIndexPrior", bound="IndexPrior")
# The shape of one image's indices, or one shape for each level.
IndexShape = Sequence[int] | Sequence[Sequence[int]]


class IndexPrior(nn.Module, Pretrained):
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
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, takes an integer >= 1 or None")
        if depth < 1:
            raise ValueError(f"depth: got {depth}, takes an integer >= 1")
        codes = [_num_codes(quantizer) for quantizer in _quantizers(vqvae)]
        self.index_shapes = _level_shapes(index_shape, len(codes))
        self.num_classes = num_classes
        self.vqvae = vqvae.requires_grad_(False).eval()
        self.lengths = [math.prod(shape) for shape in self.index_shapes]
        self.start = nn.Embedding(num_classes or 1, width)
        self.embeddings = nn.ModuleList(nn.Embedding(count, width) for count in codes)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(sum(self.lengths), width))
        layers = Layers("silu", dropout=dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, causal=True, layers=layers) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList(nn.Linear(width, count) for count in codes)

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
        logits = self._logits(indices, label)
        losses = [_cross_entropy(*level) for level in zip(logits, indices, strict=True)]
        level_loss = tuple(loss.mean() for loss in losses)
        return IndexPriorOutput(sum(level_loss[1:], level_loss[0]), level_loss, logits, indices)

    def log_prob(self, indices: Tensor | tuple[Tensor, ...], label: Tensor | None = None) -> Tensor:
        """The log-probability of indices as :meth:`VQVAE.encode` gives them, in nats: ``(batch,)``."""
        levels = self._flattened((indices,) if isinstance(indices, Tensor) else indices)
        losses = [_cross_entropy(*level) for level in zip(self._logits(levels, label), levels, strict=True)]
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
            raise ValueError(f"index_shape: got {_shown(self.index_shapes)} for indices of shape {_shown(shapes)}")
        return tuple(level.flatten(1) for level in indices)

    def _logits(self, indices: tuple[Tensor, ...], label: Tensor | None) -> tuple[Tensor, ...]:
        """Those of every position, given the indices before it; a tensor ``(batch, positions, codes)`` for each level."""
        embedded = [embedding(level) for embedding, level in zip(self.embeddings, indices, strict=True)]
        hidden = torch.cat([self._start(len(indices[0]), label), *embedded], dim=1)[:, :-1] + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        levels = self.norm(hidden).split(self.lengths, dim=1)
        return tuple(output(level) for output, level in zip(self.outputs, levels, strict=True))

    def _start(self, n: int, label: Tensor | None) -> Tensor:
        """The vector before the first index, ``(n, 1, width)``."""
        if self.num_classes is None:
            if label is not None:
                raise ValueError("label: got one, takes None for a prior without num_classes")
            return self.start.weight.expand(n, 1, -1)
        if label is None or label.shape != (n,) or label.is_floating_point():
            got = None if label is None else f"{label.dtype} of shape {tuple(label.shape)}"
            raise ValueError(f"label: got {got}, takes {n} integers below num_classes, {self.num_classes}")
        return self.start(label).unsqueeze(1)

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
        caches = [KeyValueCache(len(self.positions)) for _ in self.blocks]
        embedded, levels = self._start(n, label), []
        for embedding, output, shape in zip(self.embeddings, self.outputs, self.index_shapes, strict=True):
            drawn = []
            for _ in range(math.prod(shape)):
                drawn.append(draw(output(self._next(embedded, caches)), generator, temperature, top_k))
                embedded = embedding(drawn[-1]).unsqueeze(1)
            levels.append(torch.stack(drawn, dim=1).unflatten(1, shape))
        return tuple(levels)

    def _next(self, embedded: Tensor, caches: list[KeyValueCache]) -> Tensor:
        """The hidden vector ``(batch, width)`` of the position whose predecessor is ``embedded``."""
        hidden = embedded + self.positions[caches[0].length]
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, cache)
        return self.norm(hidden[:, 0])

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
        return f"index_shape={_shown(self.index_shapes)}, num_classes={self.num_classes}"


def _cross_entropy(logits: Tensor, indices: Tensor) -> Tensor:
    """Of each sample: the sum over its positions, ``(batch,)``."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(logits.mT, indices, reduction="none").sum(1)


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


def _level_shapes(index_shape: Any, levels: int) -> tuple[tuple[int, ...], ...]:
    nested = [isinstance(part, Sequence) for part in index_shape]
    shapes = tuple(tuple(shape) for shape in index_shape) if nested and all(nested) else (tuple(index_shape),)
    sizes = [size for shape in shapes for size in shape]
    if len(shapes) != levels or not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        takes = "a shape" if levels == 1 else "the shapes of top and bottom"
        raise ValueError(f"index_shape: got {index_shape}, takes {takes} of integers >= 1")
    return shapes


def _shown(shapes: tuple[tuple[int, ...], ...]) -> str:
    return str(shapes if len(shapes) > 1 else shapes[0])
