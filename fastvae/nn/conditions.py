"""Conditions that a network is given beside its input: classes, vectors and sequences, embedded in one form."""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae._backend import FLOATS
from fastvae._pytree import exportable
from fastvae.functional._checks import check_device, check_interval, check_tensor


@exportable
class Condition(NamedTuple):
    """The embedded conditions of a batch.

    ``vector``, ``(batch, dim)``, is the whole condition. ``tokens``, ``(batch, length, dim)``, are its parts, to which cross-attention
    attends; ``mask``, bool ``(batch, length)``, is true where there is a token, and None where all are.
    """

    vector: Tensor
    tokens: Tensor
    mask: Tensor | None = None

    @staticmethod
    def of_vector(vector: Tensor) -> "Condition":
        """A condition of one part."""
        return Condition(vector, vector.unsqueeze(1))

    def for_samples(self, count: int) -> "Condition":
        """The whole batch again and again, as often as ``count`` samples need it."""
        conditions = len(self.vector)
        if count == conditions:
            return self
        if not conditions or count % conditions:
            raise ValueError(f"y: got {conditions} conditions for {count} samples, takes a number of them that divides it")
        times = count // conditions
        mask = None if self.mask is None else repeat_rows(self.mask, times)
        return Condition(repeat_rows(self.vector, times), repeat_rows(self.tokens, times), mask)

    def replaced(self, keep: Tensor, embedding: Tensor) -> "Condition":
        """The conditions of the samples where ``keep``, bool ``(batch,)``, is true, and one embedding, ``(dim,)``, for the others."""
        vector = torch.where(keep[:, None], self.vector, embedding)
        tokens = torch.where(keep[:, None, None], self.tokens, embedding)
        return Condition(vector, tokens, None if self.mask is None else self.mask | ~keep[:, None])


def repeat_rows(tensor: Tensor, times: int) -> Tensor:
    """A batch ``times`` times, one after the other."""
    return tensor.repeat(times, *(1,) * (tensor.ndim - 1))


class ConditionEmbedding(nn.Module):
    """The base of all embeddings of a condition y: a call gives a :class:`Condition`.

    Attributes:
        dim: size of the embedding.
        takes: the tensors that a call takes, in words, for errors.
    """

    takes: str

    def __init__(self, dim: int):
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim: got {dim!r}, takes an integer of at least 1")
        self.dim = dim

    @abstractmethod
    def forward(self, y: Any) -> Condition:
        """The embedded conditions of a batch."""

    def check(self, y: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
        """Raises where ``y`` has another dtype, device or shape; None stands for any size."""
        if y is None:
            raise ValueError(f"y: got None, takes {self.takes}")
        check_tensor("y", y, dtypes)
        check_device("y", y, "the model", next(self.parameters()))
        if y.ndim != len(shape) or any(wanted is not None and wanted != size for wanted, size in zip(shape, y.shape, strict=True)):
            raise ValueError(f"y: got shape {tuple(y.shape)}, takes {self.takes}")


class ClassCondition(ConditionEmbedding):
    """An embedding of classes: y is int64, ``(batch,)``, from 0 to ``num_classes - 1``.

    A class out of the range is an error. On a GPU, where a check would wait for the device, and in a compiled program it is undefined.

    Args:
        num_classes: number of classes.
        dim: size of the embedding.
    """

    def __init__(self, num_classes: int, dim: int):
        super().__init__(dim)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes: got {num_classes!r}, takes an integer of at least 1")
        self.num_classes = num_classes
        self.takes = f"int64 classes from 0 to {num_classes - 1}, (batch,)"
        self.embedding = nn.Embedding(num_classes, dim)

    def check_classes(self, y: Any, least: int = 0) -> None:
        """Raises where ``y`` has another dtype, device or shape, or a class below ``least`` or beyond the last one."""
        self.check(y, (torch.int64,), (None,))
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            check_interval("y", y, least, self.num_classes - 1)

    def forward(self, y: Tensor) -> Condition:
        self.check_classes(y)
        return Condition.of_vector(self.embedding(y))


class VectorCondition(ConditionEmbedding):
    """A linear embedding of vectors: y is floating, ``(batch, size)``.

    Args:
        size: numbers of one y.
        dim: size of the embedding.
    """

    def __init__(self, size: int, dim: int):
        super().__init__(dim)
        self.size, self.takes = size, f"floating vectors of {size} numbers, (batch, {size})"
        self.embedding = nn.Linear(size, dim)

    def forward(self, y: Tensor) -> Condition:
        self.check(y, FLOATS, (None, self.size))
        return Condition.of_vector(self.embedding(y.to(self.embedding.weight.dtype)))


class SequenceCondition(ConditionEmbedding):
    """An embedding of sequences, each element by itself with its position; the vector is the mean of the embedded elements.

    y is floating, ``(batch, length, features)``, or a pair of it and a mask, bool ``(batch, length)``, true where there is an element.

    Args:
        features: numbers of one element.
        dim: size of the embedding, an even number for the sines and cosines of the position (Vaswani et al., 2017).
    """

    def __init__(self, features: int, dim: int):
        super().__init__(dim)
        if dim % 2:
            raise ValueError(f"dim: got {dim}, takes an even number for a sequence")
        self.features = features
        self.takes = f"floating sequences, (batch, length, {features}), or a pair of them and a bool mask (batch, length)"
        self.projection = nn.Linear(features, dim)
        self.embedding = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, y: Tensor | tuple[Tensor, Tensor]) -> Condition:
        sequence, mask = (y, None) if y is None or isinstance(y, Tensor) else y
        self.check(sequence, FLOATS, (None, None, self.features))
        projected = self.projection(sequence.to(self.projection.weight.dtype))
        tokens = self.embedding(projected + positions(projected))
        if mask is None:
            return Condition(tokens.mean(1), tokens)
        if mask.dtype != torch.bool or mask.shape != sequence.shape[:2]:
            raise ValueError(f"y: got a mask of {mask.dtype} and shape {tuple(mask.shape)}, takes bool, {tuple(sequence.shape[:2])}")
        weights = mask.to(tokens.dtype).unsqueeze(-1)
        return Condition((tokens * weights).sum(1) / weights.sum(1).clamp_min(1), tokens, mask)


def positions(tokens: Tensor) -> Tensor:
    """Sines and cosines of the positions of a sequence ``(batch, length, dim)``: ``(length, dim)``."""
    length, dim = tokens.shape[1:]
    rates = torch.exp(torch.arange(0, dim, 2, device=tokens.device) * (-math.log(10000.0) / dim))
    angles = torch.arange(length, device=tokens.device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(tokens.dtype)
