"""Group normalisation and its activation in plain PyTorch: the definition and the oracle of the tests."""

import torch
from torch import Tensor

from fastvae._types import NormActivation, check_choice
from fastvae.ops import group_norm as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import accumulation_dtype, in_layout, widest_dtype
from fastvae.ops.group_norm import NORM_ACTIVATIONS, activated
from fastvae.reference._norm_activations import differentiated


def _groups(input: Tensor, num_groups: int) -> Tensor:
    """``input`` as ``(batch, groups, elements of a group)``."""
    return input.reshape(input.shape[0], num_groups, input[0:1].numel() // num_groups if input.shape[0] else 0)


def _per_channel(parameter: Tensor | None, like: Tensor, default: float) -> Tensor | float:
    """A parameter of the channels, broadcast over ``like`` in its dtype."""
    return default if parameter is None else parameter.to(like.dtype).view(-1, *(1,) * (like.ndim - 2))


def _statistics(groups: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each group, in float64. The variance is that of the deviations, never E[x^2] - E[x]^2."""
    count = max(groups.shape[2], 1)
    rounded = groups.sum(2, keepdim=True) / count
    deviations = groups - rounded
    rest = deviations.sum(2, keepdim=True, dtype=torch.float64) / count
    variance = (deviations - rest.to(groups.dtype)).square().sum(2, dtype=torch.float64) / count
    return (rounded + rest).squeeze(2), (variance + eps).rsqrt()


def _normalise(wide: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """The input less its mean, which may take more digits than a float32 has, over its standard deviation."""
    groups = _groups(wide, mean.shape[1])
    rounded = mean.to(wide.dtype)
    centred = (groups - rounded.unsqueeze(2)) - (mean - rounded).to(wide.dtype).unsqueeze(2)
    return (centred * rstd.to(wide.dtype).unsqueeze(2)).view(wide.shape)


def group_norm_silu(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: NormActivation = "silu",
) -> Tensor:
    """:func:`fastvae.functional.group_norm_silu`, differentiable any number of times."""
    check_choice("activation", activation, NORM_ACTIVATIONS)
    return group_norm_forward(ops.ForwardArguments(input, num_groups, weight, bias, eps, NORM_ACTIVATIONS[activation])).output


@in_plain_torch(ops.GroupNorm)
@ops.forward.implement("reference")
def group_norm_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    """The operator, differentiable any number of times in either mode where it is called as this function."""
    input, weight, bias = arguments.input, arguments.weight, arguments.bias
    wide = input.to(accumulation_dtype(input.dtype))
    mean, rstd = _statistics(_groups(wide, arguments.num_groups), arguments.eps)
    normal = _normalise(wide, mean, rstd)
    affine = normal * _per_channel(weight, normal, 1.0) + _per_channel(bias, normal, 0.0)
    return ops.ForwardResults(in_layout(activated(affine, arguments.activation), input), mean, rstd)


@ops.forward.define
def _by_group_norm_of_torch(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    """For other runtimes, which have a GroupNorm; many have no float64."""
    input, num_groups, dtype = arguments.input, arguments.num_groups, accumulation_dtype(arguments.input.dtype)
    wide = input.to(dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (arguments.weight, arguments.bias))
    normal = torch.nn.functional.group_norm(wide, num_groups, weight, bias, arguments.eps)
    variance, mean = torch.var_mean(wide.reshape(input.shape[0], num_groups, -1), 2, correction=0)
    statistics = (t.to(widest_dtype(input.device)) for t in (mean, (variance + arguments.eps).rsqrt()))
    return ops.ForwardResults(activated(normal, arguments.activation).to(input.dtype), *statistics)


@ops.recompute.implement("reference")
def _group_norm_recompute(arguments: ops.RecomputeArguments) -> Tensor:
    return group_norm_forward(arguments.forward).output


@ops.backward.implement("reference")
def _group_norm_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input, rstd, weight, bias, num_groups = arguments.input, arguments.rstd, arguments.weight, arguments.bias, arguments.num_groups
    wide, grad = (t.to(accumulation_dtype(input.dtype)) for t in (input, arguments.grad_output))
    normal = _normalise(wide, arguments.mean, rstd)
    scale = _per_channel(weight, normal, 1.0)
    grad = differentiated(grad, normal * scale + _per_channel(bias, normal, 0.0), arguments.activation)
    summed = tuple(d for d in range(input.ndim) if d != 1)
    grad_weight, grad_bias = (
        input.new_empty((0,)) if parameter is None else terms.sum(summed, dtype=torch.float64).to(parameter.dtype)
        for parameter, terms in ((weight, grad * normal), (bias, grad))
    )
    scaled, standard = _groups(grad * scale, num_groups), _groups(normal, num_groups)
    count = max(scaled.shape[2], 1)
    mean_grad = scaled.sum(2, keepdim=True) / count
    projection = (scaled * standard).sum(2, keepdim=True) / count
    grad_input = (scaled - mean_grad - standard * projection) * rstd.to(wide.dtype).unsqueeze(2)
    return ops.BackwardResults(in_layout(grad_input.view(input.shape), input), grad_weight, grad_bias)


@ops.restoring_backward.implement("reference")
def _group_norm_restoring_backward(arguments: ops.RestoringBackwardArguments) -> ops.BackwardResults:
    results = _group_norm_backward(arguments.backward)
    arguments.grad_output.copy_(_group_norm_recompute(arguments.recompute))
    return results
