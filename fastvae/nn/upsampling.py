"""Upsampling and the convolution behind it, as one."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional._modules import describe, swap_obstacle
from fastvae.ops._results import channels_are_last


def _by_parity(weight: Tensor, dim: int) -> Tensor:
    """Along one dimension of a kernel of size 3: for even and for odd positions of the output the kernel of size 2 that is left when the
    weights of equal pixels are added, ``(parity, ..., size 2)`` without ``dim``."""
    first, middle, last = weight.unbind(dim)
    even, odd = (first, middle + last), (first + middle, last)
    return torch.stack([torch.stack(taps, -1) for taps in (even, odd)])


def _empty_like(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """In the memory layout of ``like``, and no view, which what follows might not change in place."""
    shape = like.shape[0], channels, height, width
    if channels_are_last(like):
        return like.new_empty_strided(shape, (channels * height * width, 1, channels * width, channels))
    return like.new_empty(shape)


def _parities(phases: Tensor, image: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The four phases of an image of twice the size and where in it they lie, as views. One after the other: an exported program runs under
    autograd what was written into the one before, which a view from earlier does not take."""
    height, width = image.shape[2] // 2, image.shape[3] // 2
    for index, part in enumerate(phases.chunk(4, dim=1)):
        row, column = divmod(index, 2)
        yield part[:, :, row : row + height, column : column + width], image[:, :, row::2, column::2]


class _Interleave(torch.autograd.Function):
    """From the four phases side by side in the channels, ``(batch, 4 channels, height + 1, width + 1)``, the image of twice the size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(phases):
        _, channels, height, width = phases.shape
        image = _empty_like(phases, channels // 4, 2 * (height - 1), 2 * (width - 1))
        for phase, place in _parities(phases, image):
            place.copy_(phase)
        return image

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return _Separate.apply(grad)


class _Separate(torch.autograd.Function):
    """The transpose of :class:`_Interleave`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(image):
        _, channels, height, width = image.shape
        phases = _empty_like(image, 4 * channels, height // 2 + 1, width // 2 + 1).zero_()
        for phase, place in _parities(phases, image):
            phase.copy_(place)
        return phases

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return _Interleave.apply(grad)


def conv_obstacle(conv: nn.Module) -> str | None:
    """Why an :class:`UpsampleConv2d` can not take over the weight and bias of ``conv``; None where it can."""
    if reason := swap_obstacle(conv, nn.Conv2d):
        return reason
    sizes = conv.kernel_size, conv.stride, conv.dilation, conv.groups, conv.padding_mode
    if sizes != ((3, 3), (1, 1), (1, 1), 1, "zeros") or conv.padding not in ((1, 1), "same"):
        return "is not a convolution of size 3 with padding 1"
    return None


class UpsampleConv2d(nn.Conv2d):
    r"""Twice the size by repetition (``nearest``), then a convolution of size 3 with padding 1, in 4/9 of the multiplications.

    .. math:: y = W * \mathrm{repeat}_2(x) + b

    Of the nine pixels under the kernel at most four differ. For each of the four parities of a position in the output the weights of equal
    pixels are added up, which leaves four convolutions of size 2 on the input; they are computed as one and their results interleaved. It
    is the same function but for rounding (Shi et al., *Is the deconvolution layer the same as a convolutional layer?*, 2016).

    Differentiable any number of times, in reverse mode: a function with a forward mode is one that torch.compile does not take.

    Weight and bias have the names, shapes and initial values of those of ``nn.Conv2d(in_channels, out_channels, 3, padding=1)``.

    Args:
        in_channels, out_channels: of the images, ``(batch, in_channels, height, width)`` to ``(batch, out_channels, 2 height, 2 width)``.
        bias, device, dtype: as in :class:`torch.nn.Conv2d`.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True, device=None, dtype=None):
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias, device=device, dtype=dtype)

    @classmethod
    def sharing(cls, conv: nn.Conv2d) -> "UpsampleConv2d":
        """The module that doubles the size and applies ``conv``, which has size 3 and padding 1, with the very parameters of ``conv``.

        Raises:
            ValueError: where ``conv`` has other sizes or is more than a :class:`torch.nn.Conv2d`: a subclass, parametrized, or with hooks.
        """
        if reason := conv_obstacle(conv):
            raise ValueError(f"conv: {describe(conv)} {reason}, takes a Conv2d of torch of size 3 with padding 1 and nothing more")
        module = cls(conv.in_channels, conv.out_channels, bias=False, device="meta")
        module.weight, module.bias = conv.weight, conv.bias
        return module.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        """The output in the dtype and memory layout that the convolution gives."""
        # (row parity, column parity, out, in, row, column)
        weight = _by_parity(_by_parity(self.weight, 2), 3).transpose(0, 1)
        # Read once: a parametrization computes a parameter anew at each reading.
        bias = self.bias
        bias = None if bias is None else bias.repeat(4)
        return _Interleave.apply(F.conv2d(input, weight.flatten(0, 2), bias, padding=1))
