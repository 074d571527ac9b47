"""Layers through which a condition enters a network, and the sequence of layers that hands it to them.

Each takes the values ``h`` of a hidden layer, ``(batch, channels, ...)``, before their activation, and the
:class:`~fastvae.nn.conditions.Condition` of the batch, and gives values of the same shape.
"""

import math
from abc import abstractmethod
from typing import cast

from torch import Tensor, nn

from fastvae._types import Conditioning, check_choice
from fastvae.nn.conditions import Condition


class Conditioned(nn.Module):
    """The base of all layers that take a condition."""

    @abstractmethod
    def forward(self, h: Tensor, condition: Condition) -> Tensor:
        """The values of the layer at the condition."""


def per_channel(values: Tensor, h: Tensor) -> Tensor:
    """``(batch, channels)`` in a shape that broadcasts over the places of ``h``."""
    return values.view(*values.shape, *(1,) * (h.ndim - 2))


class Concatenation(Conditioned):
    r"""Concatenates the condition to the input of the layer that stands before this one: :math:`W [x; c] = W_x x + W_c c`.

    That layer has computed :math:`W_x x`, this one adds :math:`W_c c`, so nothing is copied. Behind a convolution the condition is the same
    at each place, and goes on beyond the border.

    Args:
        channels: of ``h``.
        condition_dim: size of the condition's vector.
    """

    def __init__(self, channels: int, condition_dim: int):
        super().__init__()
        self.linear = nn.Linear(condition_dim, channels, bias=False)

    def forward(self, h: Tensor, condition: Condition) -> Tensor:
        return h + per_channel(self.linear(condition.vector), h)


class FiLM(Conditioned):
    """Scales and shifts each channel, ``h * (1 + scale) + shift``, both linear in the condition (Perez et al., *FiLM*, 2018).

    Args:
        channels: of ``h``.
        condition_dim: size of the condition's vector.
    """

    def __init__(self, channels: int, condition_dim: int):
        super().__init__()
        self.linear = nn.Linear(condition_dim, 2 * channels)

    def forward(self, h: Tensor, condition: Condition) -> Tensor:
        scale, shift = (per_channel(values, h) for values in self.linear(condition.vector).chunk(2, dim=1))
        return h * (1 + scale) + shift


class ConditionalBatchNorm(Conditioned):
    """Batch normalisation whose scale and shift come from the condition (de Vries et al., *Modulating early visual processing by language*,
    2017).

    Args:
        channels: of ``h``.
        condition_dim: size of the condition's vector.
    """

    def __init__(self, channels: int, condition_dim: int):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False)
        self.film = FiLM(channels, condition_dim)

    def forward(self, h: Tensor, condition: Condition) -> Tensor:
        normalised = self.norm(h) if h.ndim == 2 else self.norm(h.flatten(2)).unflatten(2, h.shape[2:])
        return self.film(normalised, condition)


class CrossAttention(Conditioned):
    """Adds what each place of ``h`` finds in the condition's tokens by attention (Vaswani et al., *Attention Is All You Need*, 2017); a
    vector is one place.

    Args:
        channels: of ``h``.
        condition_dim: size of a token.
        heads: of the attention, a divisor of ``channels``; by default 4, or the largest divisor of 4 that divides ``channels``.
    """

    def __init__(self, channels: int, condition_dim: int, heads: int | None = None):
        super().__init__()
        heads = math.gcd(channels, 4) if heads is None else heads
        if heads < 1 or channels % heads:
            raise ValueError(f"heads: got {heads}, takes a divisor of the channels, {channels}")
        self.norm = nn.LayerNorm(channels)
        self.attention = nn.MultiheadAttention(channels, heads, kdim=condition_dim, vdim=condition_dim, batch_first=True)

    def forward(self, h: Tensor, condition: Condition) -> Tensor:
        places = h.flatten(2).transpose(1, 2) if h.ndim > 2 else h.unsqueeze(1)
        hidden = None if condition.mask is None else ~condition.mask
        found, _ = self.attention(self.norm(places), condition.tokens, condition.tokens, key_padding_mask=hidden, need_weights=False)
        return h + found.transpose(1, 2).reshape(h.shape)


class ConditionedSequential(nn.Sequential, Conditioned):
    """``nn.Sequential`` that hands the condition to those of its layers that take one."""

    def forward(self, h: Tensor, condition: Condition) -> Tensor:  # type: ignore[override]
        for layer in self:
            h = layer(h, condition) if isinstance(layer, Conditioned) else layer(h)
        return h


def call_at(network: nn.Module, h: Tensor, condition: Condition) -> Tensor:
    """What a network gives for ``h`` at the conditions of a batch, of which ``h`` has as many samples, or a multiple."""
    return network(h, condition.for_samples(len(h)))


class At(nn.Module):
    """A network at the conditions of a batch, as a network of its input alone; see :func:`call_at`.

    Args:
        network: takes an input and a condition.
        condition: the embedded conditions.
    """

    def __init__(self, network: nn.Module, condition: Condition):
        super().__init__()
        self.network, self.condition = network, condition

    def forward(self, h: Tensor) -> Tensor:
        return call_at(self.network, h, self.condition)


class AtPositions(Conditioned):
    """A layer of the condition for sequences ``(batch, positions, channels)``, whose channels come last.

    Args:
        layer: takes ``(batch, channels, positions)``.
    """

    def __init__(self, layer: Conditioned):
        super().__init__()
        self.layer = layer

    def forward(self, h: Tensor, condition: Condition) -> Tensor:
        return self.layer(h.mT, condition).mT


CONDITIONINGS: dict[str, type[Conditioned]] = {
    "concatenation": Concatenation,
    "film": FiLM,
    "batch_norm": ConditionalBatchNorm,
    "cross_attention": CrossAttention,
}


def conditioned(network: nn.Sequential, conditioning: Conditioning, condition_dim: int) -> ConditionedSequential:
    """A network with a layer of the condition in each stage but the last: before its activation, or behind a stage of a transformer.

    Args:
        network: a sequence of stages, each a sequence of one linear or convolutional layer, an activation, and ``Flatten`` or
            ``Unflatten``, or else a module with ``width`` channels that gives ``(batch, positions, width)``; its layers are used, not
            copied.
        conditioning: ``"concatenation"``, ``"film"``, ``"batch_norm"`` or ``"cross_attention"``.
        condition_dim: size of the condition.

    Raises:
        ValueError: for a network of one stage, which has no hidden layer.
    """
    check_choice("conditioning", conditioning, CONDITIONINGS)
    *hidden, last = network
    if not hidden:
        raise ValueError("network: got one stage, takes at least one hidden layer for the condition")
    return ConditionedSequential(*(_conditioned_stage(stage, CONDITIONINGS[conditioning], condition_dim) for stage in hidden), last)


def _conditioned_stage(stage: nn.Module, make: type[Conditioned], condition_dim: int) -> ConditionedSequential:
    if not isinstance(stage, nn.Sequential):
        return ConditionedSequential(stage, AtPositions(make(cast("int", stage.width), condition_dim)))
    # An activation does not care for shapes, so the condition sees the maps that come from a vector.
    before = [layer for layer in stage if isinstance(layer, nn.Flatten | nn.Unflatten) or hasattr(layer, "weight")]
    return ConditionedSequential(*before, make(_channels(before[-1]), condition_dim), *(layer for layer in stage if layer not in before))


def _channels(layer: nn.Module) -> int:
    """The channels of what a layer gives."""
    if isinstance(layer, nn.Unflatten):
        return layer.unflattened_size[0]
    return cast("int", layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
