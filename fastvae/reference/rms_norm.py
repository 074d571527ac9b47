"""RMS normalisation and its activation in plain PyTorch: the definition and the oracle of the tests."""

import math

import torch
from torch import Tensor

from fastvae._types import EpsMode, NormActivation, check_choice
from fastvae.ops import rms_norm as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._results import accumulation_dtype, in_layout
from fastvae.ops.group_norm import NORM_ACTIVATIONS, activated
from fastvae.ops.rms_norm import EPS_MODES
from fastvae.reference._norm_activations import differentiated


def _per_channel(parameter: Tensor | None, like: Tensor, default: float) -> Tensor | float:
    """A parameter of the channels, or of each sample's channels, broadcast over ``like`` in its dtype."""
    if parameter is None:
        return default
    wide = parameter.to(like.dtype)
    return wide.view(*wide.shape, *(1,) * (like.ndim - 2))


def _rrms(wide: Tensor, eps: float, eps_mode: int, dtype: torch.dtype) -> Tensor:
    """1 / RMS of the channels of each position, summed in ``dtype``."""
    squares = wide.square().sum(1, dtype=dtype)
    channels = max(wide.shape[1], 1)
    if eps_mode == EPS_MODES["add"]:
        return (squares / channels + eps).rsqrt().to(wide.dtype)
    # The root has an infinite derivative at 0, where the bound decides and that of the norm is 0.
    return (math.sqrt(channels) / squares.clamp(min=eps * eps).sqrt()).to(wide.dtype)


def rms_norm_silu(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dim: int = 1,
    activation: NormActivation = "silu",
    eps_mode: EpsMode = "add",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """:func:`fastvae.functional.rms_norm_silu`, differentiable any number of times."""
    check_choice("activation", activation, NORM_ACTIVATIONS)
    check_choice("eps_mode", eps_mode, EPS_MODES)
    moved = input.movedim(dim, 1)
    parameters = ops.modulated(moved, weight, bias, scale, shift)
    arguments = ops.ForwardArguments(moved, *parameters, eps, EPS_MODES[eps_mode], NORM_ACTIVATIONS[activation])
    return rms_norm_forward(arguments).output.movedim(1, dim)


@in_plain_torch(ops.RMSNorm)
@ops.forward.implement("reference")
def rms_norm_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    """The operator, differentiable any number of times in either mode where it is called as this function."""
    return _forward(arguments, torch.float64)


@ops.forward.define
def _without_float64(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    """For other runtimes, many of which have no float64."""
    return _forward(arguments, accumulation_dtype(arguments.input.dtype))


def _forward(arguments: ops.ForwardArguments, dtype: torch.dtype) -> ops.ForwardResults:
    input, weight, bias = arguments.input, arguments.weight, arguments.bias
    wide = input.to(accumulation_dtype(input.dtype))
    rrms = _rrms(wide, arguments.eps, arguments.eps_mode, dtype)
    normal = wide * rrms.unsqueeze(1)
    affine = normal * _per_channel(weight, normal, 1.0) + _per_channel(bias, normal, 0.0)
    return ops.ForwardResults(in_layout(activated(affine, arguments.activation), input), rrms.contiguous())


@ops.backward.implement("reference")
def _rms_norm_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    input, weight, bias = arguments.input, arguments.weight, arguments.bias
    wide, grad = (t.to(accumulation_dtype(input.dtype)) for t in (input, arguments.grad_output))
    rrms = arguments.rrms.unsqueeze(1)
    normal, scale = wide * rrms, _per_channel(weight, wide, 1.0)
    grad = differentiated(grad, normal * scale + _per_channel(bias, normal, 0.0), arguments.activation)
    grad_weight, grad_bias = (
        input.new_empty((0,)) if parameter is None else _sum_to(parameter, terms)
        for parameter, terms in ((weight, grad * normal), (bias, grad))
    )
    scaled = grad * scale
    projection = (scaled * normal).sum(1, keepdim=True, dtype=torch.float64).to(wide.dtype) / max(input.shape[1], 1)
    if arguments.eps_mode == EPS_MODES["clamp"]:
        # Where the bound decides, 1 / RMS is a constant.
        limit = torch.tensor(ops.limit_of_rrms(input.shape[1], arguments.eps), dtype=wide.dtype, device=input.device)
        projection = torch.where(rrms >= limit, 0.0, projection)
    grad_input = (scaled - normal * projection) * rrms
    return ops.BackwardResults(in_layout(grad_input, input), grad_weight, grad_bias)


def _sum_to(parameter: Tensor, terms: Tensor) -> Tensor:
    """The sums of ``terms`` over what the parameter is broadcast over."""
    summed = tuple(range(2, terms.ndim)) + ((0,) if parameter.ndim == 1 else ())
    return (terms.sum(summed, dtype=torch.float64) if summed else terms).to(parameter.dtype)
