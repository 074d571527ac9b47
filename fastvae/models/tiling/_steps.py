"""The steps of a decoder, each of which computes any rectangle of its output from a rectangle of its input.

A position is counted in the whole feature map, whichever part of it is at hand. For a rectangle of the last step's output :func:`run` goes
back through the steps and asks each for the rectangle of its input that it needs, clipped to the map: that is the halo, and it shrinks
step by step. Then it goes forward. A layer is called with its own padding, which is right at the border of the map; inside, what the
padding has spoiled lies in the halo and is cut off.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor, nn

from fastvae.models.tiling._moments import Affine
from fastvae.nn import GroupNormSiLU
from fastvae.ops._results import accumulation_dtype
from fastvae.ops.group_norm import NORM_ACTIVATIONS, activated

# The height and width of a feature map, and a rectangle of it: its rows and its columns.
Size = tuple[int, int]
Region = tuple[range, range]


class Patch(NamedTuple):
    """The values ``(batch, channels, rows, columns)`` of a feature map of ``size`` in a rectangle."""

    values: Tensor
    region: Region
    size: Size

    @classmethod
    def whole(cls, values: Tensor) -> "Patch":
        """A whole feature map."""
        size = size_of(values)
        return cls(values, everything(size), size)

    def crop(self, region: Region) -> "Patch":
        """The part in a rectangle that lies in this one, as a view."""
        rows, columns = (
            slice(inner.start - outer.start, inner.stop - outer.start) for inner, outer in zip(region, self.region, strict=True)
        )
        return Patch(self.values[:, :, rows, columns], region, self.size)


def size_of(values: Tensor) -> Size:
    height, width = values.shape[2:]
    return height, width


def everything(size: Size) -> Region:
    """The rectangle of a whole feature map."""
    return range(size[0]), range(size[1])


@dataclass(frozen=True)
class Axis:
    """The positions that a layer connects along height or width.

    Output ``i`` depends on the inputs ``(i - before) // scale`` to ``(i + after) // scale``; ``n`` inputs give ``scale * n + growth``
    outputs, and inputs that begin at position ``s`` give outputs that begin at ``scale * s``.
    """

    scale: int = 1
    before: int = 0
    after: int = 0
    growth: int = 0

    def output_length(self, length: int) -> int:
        return self.scale * length + self.growth

    def needed(self, outputs: range, length: int) -> range:
        """The inputs, of ``length``, that ``outputs`` depend on; one at least, as no layer takes an empty tensor."""
        start = min(max((outputs.start - self.before) // self.scale, 0), length - 1)
        stop = min((outputs.stop - 1 + self.after) // self.scale + 1, length)
        return range(start, max(stop, start + 1))


class Step(ABC):
    """A function from feature map to feature map. Steps are compared by identity."""

    def output_size(self, size: Size) -> Size:
        return size

    def output_channels(self, channels: int) -> int:
        return channels

    def needed(self, region: Region, size: Size) -> Region:
        """The rectangle of the input, which is of ``size``, on which a rectangle of the output depends."""
        return region

    @abstractmethod
    def run(self, patch: Patch, region: Region, statistics: "Statistics") -> Patch:
        """The output at ``region``, from an input that covers what it needs."""


@dataclass(frozen=True, eq=False)
class Layer(Step):
    """A layer that depends on a window of positions, or on one position: a convolution, an upsampling, an activation.

    Args:
        call: the layer.
        axes: how it connects rows, and columns.
        out_channels: of its output; None for those of its input.
    """

    call: Callable[[Tensor], Tensor]
    axes: tuple[Axis, Axis] = (Axis(), Axis())
    out_channels: int | None = None

    def output_size(self, size: Size) -> Size:
        return self.axes[0].output_length(size[0]), self.axes[1].output_length(size[1])

    def output_channels(self, channels: int) -> int:
        return self.out_channels or channels

    def needed(self, region: Region, size: Size) -> Region:
        return self.axes[0].needed(region[0], size[0]), self.axes[1].needed(region[1], size[1])

    def run(self, patch: Patch, region: Region, statistics: "Statistics") -> Patch:
        values = self.call(patch.values)
        starts = (axis.scale * inputs.start for axis, inputs in zip(self.axes, patch.region, strict=True))
        rows, columns = (range(start, start + length) for start, length in zip(starts, values.shape[2:], strict=True))
        return Patch(values, (rows, columns), self.output_size(patch.size)).crop(region)


@dataclass(frozen=True, eq=False)
class GroupNormalisation(Step):
    """A group normalisation, with the activation of its module. Without an entry in ``statistics`` the input is the whole feature map."""

    norm: nn.GroupNorm

    def run(self, patch: Patch, region: Region, statistics: "Statistics") -> Patch:
        if self not in statistics:
            return patch._replace(values=self.norm(patch.values))
        affine, dtype = statistics[self], patch.values.dtype
        values = patch.values.to(accumulation_dtype(dtype)) - affine.centre
        values.mul_(affine.scale).add_(affine.offset)
        if isinstance(self.norm, GroupNormSiLU):
            values = activated(values, NORM_ACTIVATIONS[self.norm.activation])
        return patch._replace(values=values.to(dtype))


# What the normalisations whose statistics are known do to each channel.
Statistics = Mapping[GroupNormalisation, Affine]


@dataclass(frozen=True, eq=False)
class Residual(Step):
    """The sum of two branches, which end in maps of one size, over ``divisor``."""

    main: Sequence[Step]
    shortcut: Sequence[Step] = ()
    divisor: float = 1.0

    def output_size(self, size: Size) -> Size:
        return sizes_of(self.main, size)[-1]

    def output_channels(self, channels: int) -> int:
        return channels_of(self.main, channels)[-1]

    def needed(self, region: Region, size: Size) -> Region:
        (rows, columns), (other_rows, other_columns) = (needed_regions(steps, region, size)[0] for steps in (self.main, self.shortcut))
        return _hull(rows, other_rows), _hull(columns, other_columns)

    def run(self, patch: Patch, region: Region, statistics: "Statistics") -> Patch:
        main = run(self.main, patch, region, statistics)
        total = main.values + run(self.shortcut, patch, region, statistics).values
        return main._replace(values=total if self.divisor == 1.0 else total.div_(self.divisor))


@dataclass(frozen=True, eq=False)
class Attention(Step):
    """A module whose output depends, at each position, on the whole input, and has its shape."""

    module: Callable[[Tensor], Tensor]

    def needed(self, region: Region, size: Size) -> Region:
        return everything(size)

    def run(self, patch: Patch, region: Region, statistics: "Statistics") -> Patch:
        return patch._replace(values=self.module(patch.values)).crop(region)


def _hull(first: range, second: range) -> range:
    return range(min(first.start, second.start), max(first.stop, second.stop))


def sizes_of(steps: Sequence[Step], size: Size) -> list[Size]:
    """The sizes of the first step's input and of every step's output."""
    return list(accumulate(steps, lambda before, step: step.output_size(before), initial=size))


def channels_of(steps: Sequence[Step], channels: int) -> list[int]:
    """The channels of the first step's input and of every step's output."""
    return list(accumulate(steps, lambda before, step: step.output_channels(before), initial=channels))


def needed_regions(steps: Sequence[Step], region: Region, size: Size) -> list[Region]:
    """The rectangles of the first step's input, of ``size``, and of every step's output on which ``region`` of the last output depends."""
    regions = [region]
    for step, input_size in zip(reversed(steps), reversed(sizes_of(steps, size)[:-1]), strict=True):
        regions.append(step.needed(regions[-1], input_size))
    return regions[::-1]


def run(steps: Sequence[Step], patch: Patch, region: Region, statistics: Statistics) -> Patch:
    """The output of the last step at ``region``, from an input of the first that covers what it needs."""
    needed, *regions = needed_regions(steps, region, patch.size)
    patch = patch.crop(needed)
    for step, output_region in zip(steps, regions, strict=True):
        patch = step.run(patch, output_region, statistics)
    return patch


def normalisations(steps: Sequence[Step]) -> Iterator[tuple[GroupNormalisation, list[Step]]]:
    """The group normalisations in the order in which they run, each with the steps that lead from the first input to its own."""
    for index, step in enumerate(steps):
        before = list(steps[:index])
        if isinstance(step, GroupNormalisation):
            yield step, before
        elif isinstance(step, Residual):
            for norm, branch in (*normalisations(step.main), *normalisations(step.shortcut)):
                yield norm, [*before, *branch]
