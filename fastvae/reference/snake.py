"""Snake in plain PyTorch: the definition and the oracle of the tests."""

import torch
from torch import Tensor

from fastvae.ops import snake as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import accumulation_dtype, in_layout


def _per_channel(parameter: Tensor, like: Tensor) -> Tensor:
    return parameter.to(like.dtype).view(-1, *(1,) * (like.ndim - 2))


def snake(input: Tensor, alpha: Tensor, beta: Tensor | None = None, *, eps: float = 1e-9) -> Tensor:
    """:func:`fastvae.functional.snake`, differentiable any number of times."""
    return snake_forward(ops.ForwardArguments(input, alpha, ops.gain_of(input, alpha, beta, eps)))


@in_plain_torch(ops.Snake)
@ops.forward.implement("reference")
def snake_forward(arguments: ops.ForwardArguments) -> Tensor:
    """The operator, differentiable any number of times in either mode where it is called as this function."""
    wide = arguments.input.to(accumulation_dtype(arguments.input.dtype))
    frequency, gain = (_per_channel(parameter, wide) for parameter in arguments[1:])
    return in_layout(wide + gain * torch.sin(frequency * wide).square(), arguments.input)


@ops.backward.implement("reference")
def _snake_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input, frequency, gain = arguments[1:]
    wide, grad = (t.to(accumulation_dtype(input.dtype)) for t in (input, arguments.grad_output))
    a, b = (_per_channel(parameter, wide) for parameter in (frequency, gain))
    sine, cosine = torch.sin(a * wide), torch.cos(a * wide)
    summed = tuple(d for d in range(input.ndim) if d != 1)
    grad_frequency, grad_gain = (
        terms.sum(summed, dtype=torch.float64).to(parameter.dtype)
        for parameter, terms in ((frequency, grad * 2.0 * b * wide * sine * cosine), (gain, grad * sine.square()))
    )
    return ops.BackwardResults(in_layout(grad * (1.0 + 2.0 * a * b * sine * cosine), input), grad_frequency, grad_gain)
