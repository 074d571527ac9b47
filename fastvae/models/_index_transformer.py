"""A causal transformer over the indices of one level or several, which are one sequence."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.models.networks import KeyValueCache, Layers, TransformerBlock
from fastvae.models.networks.transformer import POSITION_STD
from fastvae.ops._results import accumulation_dtype

# The shape of one image's indices, or one shape for each level.
IndexShape = Sequence[int] | Sequence[Sequence[int]]


class IndexTransformer(nn.Module):
    """The logits of each index, given those before it and a class.

    Args:
        codes: the number of codes of each level.
        index_shapes: the shape of each level's indices.
        width, depth, heads, num_classes, dropout: see :class:`fastvae.models.IndexPrior`.
    """

    def __init__(
        self,
        codes: Sequence[int],
        index_shapes: tuple[tuple[int, ...], ...],
        *,
        width: int,
        depth: int,
        heads: int,
        num_classes: int | None,
        dropout: float,
    ):
        super().__init__()
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes}, takes an integer >= 1 or None")
        if depth < 1:
            raise ValueError(f"depth: got {depth}, takes an integer >= 1")
        self.index_shapes, self.num_classes = index_shapes, num_classes
        self.lengths = [math.prod(shape) for shape in self.index_shapes]
        self.start = nn.Embedding(num_classes or 1, width)
        self.embeddings = nn.ModuleList(nn.Embedding(count, width) for count in codes)
        self.positions = nn.Parameter(POSITION_STD * torch.randn(sum(self.lengths), width))
        layers = Layers("silu", dropout=dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, causal=True, layers=layers) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outputs = nn.ModuleList(nn.Linear(width, count) for count in codes)

    def logits(self, indices: tuple[Tensor, ...], label: Tensor | None) -> tuple[Tensor, ...]:
        """Gives the logits of every position, given the indices before it; a tensor ``(batch, positions, codes)`` for each level."""
        embedded = [embedding(level) for embedding, level in zip(self.embeddings, indices, strict=True)]
        hidden = torch.cat([self.start_of(len(indices[0]), label), *embedded], dim=1)[:, :-1] + self.positions
        for block in self.blocks:
            hidden = block(hidden)
        levels = self.norm(hidden).split(self.lengths, dim=1)
        return tuple(output(level) for output, level in zip(self.outputs, levels, strict=True))

    def start_of(self, n: int, label: Tensor | None) -> Tensor:
        """The vector before the first index, ``(n, 1, width)``."""
        if self.num_classes is None:
            if label is not None:
                raise ValueError("label: got one, takes None for a prior without num_classes")
            return self.start.weight.expand(n, 1, -1)
        if label is None or label.shape != (n,) or label.is_floating_point():
            got = None if label is None else f"{label.dtype} of shape {tuple(label.shape)}"
            raise ValueError(f"label: got {got}, takes {n} integers below num_classes, {self.num_classes}")
        return self.start(label).unsqueeze(1)

    def write(self, start: Tensor, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        """Indices, one position after the other, ``draw`` of the logits ``(batch, codes)`` of each: a tensor ``(batch, *shape)`` for each
        level. ``start`` is what comes before the first one."""
        caches = [KeyValueCache(len(self.positions)) for _ in self.blocks]
        embedded, levels = start, []
        for embedding, output, shape in zip(self.embeddings, self.outputs, self.index_shapes, strict=True):
            drawn = []
            for _ in range(math.prod(shape)):
                drawn.append(draw(output(self._next(embedded, caches))))
                embedded = embedding(drawn[-1]).unsqueeze(1)
            levels.append(torch.stack(drawn, dim=1).unflatten(1, shape))
        return tuple(levels)

    def _next(self, embedded: Tensor, caches: list[KeyValueCache]) -> Tensor:
        """The hidden vector ``(batch, width)`` of the position whose predecessor is ``embedded``."""
        hidden = embedded + self.positions[caches[0].length]
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, cache)
        return self.norm(hidden[:, 0])


def cross_entropy(logits: Tensor, indices: Tensor) -> Tensor:
    """Sums the cross-entropy of each sample over its positions, ``(batch,)``."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    return F.cross_entropy(logits.mT, indices, reduction="none").sum(1)


def level_shapes(index_shape: Any, levels: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of all levels, of what a caller gave: one shape, or one for each level."""
    nested = [isinstance(part, Sequence) for part in index_shape]
    shapes = tuple(tuple(shape) for shape in index_shape) if nested and all(nested) else (tuple(index_shape),)
    sizes = [size for shape in shapes for size in shape]
    if len(shapes) != levels or not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        takes = "a shape" if levels == 1 else "the shapes of top and bottom"
        raise ValueError(f"index_shape: got {index_shape}, takes {takes} of integers >= 1")
    return shapes


def shown(shapes: tuple[tuple[int, ...], ...]) -> str:
    """Writes shapes as a caller gives them."""
    return str(shapes if len(shapes) > 1 else shapes[0])
