"""Group normalisation, activation and convolution as one node of autograd, which keeps the input of the normalisation alone.

There is no operator of this name: the function composes those of the group norm with torch's convolution.
"""

import functools
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastvae.ops import group_norm
from fastvae.ops._autograd import first_derivative_only, has_values, under_autocast
from fastvae.ops._results import channels_are_last, empty_in_layout

Padding = Literal["same", "valid"]

_aten = torch.ops.aten


class Arguments(NamedTuple):
    """``norm_weight`` and ``norm_bias`` are those of the normalisation, ``weight`` and ``bias`` those of the convolution, which multiplies
    in ``dtype``. The other fields are those of ``torch.convolution``, a number for each dimension of positions."""

    input: Tensor
    num_groups: int
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float
    activation: int
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    # Methods: torch.compile of torch 2.10 cannot take apart what a property of a named tuple returns.
    def norm(self) -> group_norm.ForwardArguments:
        return group_norm.ForwardArguments(self.input, self.num_groups, self.norm_weight, self.norm_bias, self.eps, self.activation)

    def geometry(self) -> tuple:
        """What ``torch.convolution`` and its backward pass take behind the tensors."""
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups

    def convolve(self, normal: Tensor) -> Tensor:
        # autocast has nothing left to bring to another dtype.
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return torch.convolution(normal.to(self.dtype), self.weight.to(self.dtype), bias, *self.geometry())


class NormActConv(torch.autograd.Function):
    """Takes the :class:`Arguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input, num_groups, norm_weight, norm_bias, eps, activation, weight, bias, dtype, stride, padding, dilation, groups, backend
    ):  # fmt: skip
        norm = num_groups, norm_weight, norm_bias, eps, activation
        arguments = Arguments(input, *norm, weight, bias, dtype, stride, padding, dilation, groups)
        normal, mean, rstd = group_norm.forward.overloads[backend](*arguments.norm())
        return arguments.convolve(normal), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arguments, ctx.backend = inputs
        a = Arguments(*arguments)
        _, mean, rstd = output
        ctx.num_groups, ctx.eps, ctx.activation, ctx.dtype, ctx.geometry = a.num_groups, a.eps, a.activation, a.dtype, a.geometry()
        ctx.bias_shape, ctx.bias_dtype = (None, None) if a.bias is None else (a.bias.shape, a.bias.dtype)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a.input, mean, rstd, a.norm_weight, a.norm_bias, a.weight)

    @staticmethod
    @first_derivative_only("fastvae.reference.norm_act_conv")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * (len(Arguments._fields) + 1)
        *saved, weight = ctx.saved_tensors
        input, *_, norm_weight, norm_bias = saved
        needs_normal, needs_weight, needs_bias = needs = _needed(ctx.needs_input_grad)
        norm_grads: tuple[Tensor | None, ...] = None, None, None
        grads_of_convolution = functools.partial(_convolution_backward, ctx, grad_output, weight.to(ctx.dtype))
        if needs_normal and needs_weight and has_values(grad_output):
            # The gradient with respect to the convolution's input depends on the shape and layout of that alone; the norm's backward pass
            # leaves the input itself where the gradient was.
            normal = grads_of_convolution(_like_output(input), [True, False, False])[0].to(input.dtype)
            norm_grads = group_norm.restoring_backward.overloads[ctx.backend](normal, *saved, ctx.num_groups, ctx.eps, ctx.activation)
            grad_weight, grad_bias = grads_of_convolution(normal, [False, True, needs_bias])[1:]
        else:
            recompute = group_norm.recompute.overloads[ctx.backend]
            normal = _like_output(input)
            if needs_weight:
                normal = recompute(grad_output, *saved, ctx.num_groups, ctx.eps, ctx.activation)
            grad_normal, grad_weight, grad_bias = grads_of_convolution(normal, needs)
            if needs_normal:
                operands = grad_normal.to(input.dtype), *saved
                norm_grads = group_norm.backward.overloads[ctx.backend](*operands, ctx.num_groups, ctx.activation)
        grads = dict.fromkeys(Arguments._fields)
        grads["input"], grad_norm_weight, grad_norm_bias = norm_grads
        grads["norm_weight"] = None if norm_weight is None else grad_norm_weight
        grads["norm_bias"] = None if norm_bias is None else grad_norm_bias
        grads["weight"] = grad_weight.to(weight.dtype) if needs_weight else None
        grads["bias"] = grad_bias.to(ctx.bias_dtype) if needs_bias else None
        return *grads.values(), None


def _like_output(input: Tensor) -> Tensor:
    """A tensor in the shape, dtype and layout of the normalisation's output, with any values."""
    # A dimension of size 1 may have any stride, and torch chooses kernels by strides.
    is_like = 1 not in input.shape and (input.is_contiguous() or channels_are_last(input))
    return input if is_like else empty_in_layout(input)


def _convolution_backward(ctx, grad_output: Tensor, weight: Tensor, normal: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a convolution of ``normal`` with respect to it, the weight and the bias."""
    return _aten.convolution_backward.default(grad_output, normal.to(ctx.dtype), weight, ctx.bias_shape, *ctx.geometry, needs)


def _needed(needs_input_grad: tuple[bool, ...]) -> list[bool]:
    """Whether gradients are needed of the convolution's input, weight and bias."""
    needs = dict(zip(Arguments._fields, needs_input_grad, strict=False))
    return [needs["input"] or needs["norm_weight"] or needs["norm_bias"], needs["weight"], needs["bias"]]


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the caller's autocast; None where that is off."""
    return torch.get_autocast_dtype(device.type) if under_autocast(device) else None


def dtype_of_products(weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution of this weight multiplies: that of the caller's autocast, or its own."""
    return (None if weight.dtype == torch.float64 else autocast_dtype(weight.device)) or weight.dtype


def geometry(
    weight: Tensor, stride: int | tuple[int, ...], padding: int | tuple[int, ...] | Padding, dilation: int | tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Stride, padding and dilation, each a number for each dimension of positions.

    Raises:
        ValueError: for another count of numbers, numbers that are too small, another word, and for ``"same"`` where it would be different
            at both ends, or has a stride.
    """
    size = tuple(weight.shape[2:])
    stride, dilation = _numbers("stride", stride, len(size), 1), _numbers("dilation", dilation, len(size), 1)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        both = [d * (s - 1) for d, s in zip(dilation, size, strict=True)]
        if any(n % 2 for n in both) or any(s != 1 for s in stride):
            raise ValueError(f"padding: got 'same' for a kernel of {size} with stride {stride}, takes it for odd kernels with stride 1")
        padding = tuple(n // 2 for n in both)
    elif isinstance(padding, str):
        raise ValueError(f"padding: got {padding!r}, takes numbers, 'same' or 'valid'")
    return stride, _numbers("padding", padding, len(size), 0), dilation


def _numbers(name: str, value: int | tuple[int, ...], count: int, least: int) -> tuple[int, ...]:
    numbers = (value,) * count if isinstance(value, int) else tuple(value)
    if len(numbers) != count or any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in numbers):
        raise ValueError(f"{name}: got {value!r}, takes an integer >= {least} or {count} of them")
    return numbers
