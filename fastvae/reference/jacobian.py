"""The contractive penalty and the epilogues of the Gram form in plain PyTorch: the definition and the oracle of the
tests."""

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvae._outputs import JacobianMethod
from fastvae._torch_private import BATCH_NORMS
from fastvae._types import Activation, BoundReduction, JacobianMethodName, Reduction, check_choice
from fastvae.ops import jacobian as ops
from fastvae.ops._autograd import in_plain_torch
from fastvae.ops._gram_chunks import gram_in_chunks
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, reduction_number
from fastvae.ops.jacobian import ACTIVATION_NAMES, ACTIVATIONS
from fastvae.reference._reduce import expand_gradient, reduce_elements

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def derivative(hidden: Tensor, activation: str, alpha: float) -> Tensor:
    """The activation's derivative, itself differentiable: from its output, or from its input for those ``from_preactivation``."""
    return derivatives(hidden, activation, alpha)[0]


def derivatives(h: Tensor, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """The activation's derivative, and what its derivative with respect to ``h`` is."""
    if activation == "sigmoid":
        return h * (1.0 - h), 1.0 - 2.0 * h
    if activation == "tanh":
        return 1.0 - h * h, -2.0 * h
    if activation == "relu":
        return torch.where(h <= 0, 0.0, _ones(h)), torch.zeros_like(h)
    if activation == "leaky_relu":
        return torch.where(h <= 0, alpha, _ones(h)), torch.zeros_like(h)
    if activation == "elu":
        return torch.where(h <= 0, h + alpha, _ones(h)), torch.where(h <= 0, _ones(h), 0.0)
    if activation == "softplus":
        return -torch.expm1(-alpha * h), alpha * torch.exp(-alpha * h)
    if activation == "silu":
        sigma = torch.sigmoid(h)
        product = sigma * torch.sigmoid(-h)
        return sigma + h * product, product * (2.0 + h * (1.0 - 2.0 * sigma))
    if activation == "gelu":
        density = torch.exp(-0.5 * h * h) * (0.5 * _SQRT_2_OVER_PI)
        return 0.5 * torch.erfc(-h * _SQRT_HALF) + h * density, density * (2.0 - h * h)
    if activation == "gelu_tanh":
        tanh = torch.tanh(_SQRT_2_OVER_PI * (h + _CUBIC * h * h * h))
        slope, curvature = _SQRT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * h * h), 6.0 * _SQRT_2_OVER_PI * _CUBIC * h
        spread = 1.0 - tanh * tanh
        first = 0.5 * (1.0 + tanh) + 0.5 * h * spread * slope
        return first, spread * (slope + 0.5 * h * (curvature - 2.0 * tanh * slope * slope))
    return _ones(h), torch.zeros_like(h)


def _ones(h: Tensor) -> Tensor:
    """1, and NaN where ``h`` is."""
    return torch.where(h.isnan(), h, 1.0)


def contractive_penalty(
    hidden: Tensor,
    weight: Tensor,
    activation: Activation = "sigmoid",
    reduction: Reduction = "batchmean",
    *,
    alpha: float | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """:func:`fastvae.functional.contractive_penalty`, differentiable any number of times.

    ``grad_scale`` changes nothing: no gradient is written in the forward pass.
    """
    check_choice("activation", activation, ACTIVATIONS)
    alpha = ACTIVATIONS[activation].alpha if alpha is None else alpha
    return penalty(hidden, weight, ACTIVATIONS[activation].number, alpha, reduction_number(reduction))


def jacobian_frobenius(
    encoder: nn.Module,
    x: Tensor,
    *,
    method: JacobianMethodName = "auto",
    num_projections: int = 1,
    generator: torch.Generator | None = None,
    reduction: BoundReduction = "batchmean",
    chunk_size: int | None = None,
    with_output: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`fastvae.functional.jacobian_frobenius`, differentiable any number of times.

    The norm is exact, from a backward pass for each output, for every method but ``"projection"``; ``"auto"`` projects where samples meet,
    in batch-norm in training mode.
    """
    check_choice("reduction", reduction, get_args(BoundReduction))
    if check_choice("method", method, get_args(JacobianMethodName)) == "auto":
        method = explain_jacobian_method(encoder, x).method
    parts = [
        _projected_norms(encoder, part, num_projections, generator) if method == "projection" else _exact_norms(encoder, part)
        for part in x.split(chunk_size or max(x.shape[0], 1))
    ]
    norms, output = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    norm = reduce_elements(norms, REDUCTIONS[reduction], norms.dtype)
    return (norm, output) if with_output else norm


def explain_jacobian_method(encoder: nn.Module, x: Tensor) -> JacobianMethod:
    """Which method ``method="auto"`` of this module's :func:`jacobian_frobenius` takes for an encoder and a batch, and why."""
    for name, module in encoder.named_modules() if isinstance(encoder, nn.Module) else ():
        if module.training and isinstance(module, BATCH_NORMS):
            return JacobianMethod("projection", f"samples meet in layer {name!r}, {module}: unbiased random projections serve any encoder")
    return JacobianMethod("autograd", "the definition: a backward pass for each output")


def _encode(encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as a tensor that can be differentiated by, and its codes, by an attention that can be differentiated twice."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        return x, encoder(x)


def _squared_norms(rows: list[Tensor]) -> Tensor:
    """The sum over ``rows`` of each sample's squared norm."""
    return torch.stack([row.flatten(1).to(accumulation_dtype(row.dtype)).square().sum(1) for row in rows]).sum(0)


def _rows(outputs: list[Tensor], x: Tensor, differentiated: bool) -> list[Tensor]:
    """The gradient of each output, itself differentiable where ``differentiated``."""
    options: dict[str, Any] = {"create_graph": differentiated, "retain_graph": True, "materialize_grads": True}
    return [torch.autograd.grad(output, x, **options)[0] for output in outputs]


def _exact_norms(encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        x, output = _encode(encoder, x)
        # Samples do not meet: the gradient of a unit's sum over the batch holds the row of each sample.
        units = (output.flatten(1) if output.ndim > 1 else output.unsqueeze(1)).sum(0)
        norms = _squared_norms(_rows(list(units), x, differentiated))
    return (norms, output) if differentiated else (norms.detach(), output.detach())


def _projected_norms(encoder, x: Tensor, count: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """``C / n sum_i |v_i^T J|^2`` for n directions v uniform on the sphere in the C dimensions of the output (Hoffman et al. 2019)."""
    differentiated = torch.is_grad_enabled()
    with torch.enable_grad():
        x, output = _encode(encoder, x)
        units = math.prod(output.shape[1:])
        device = output.device if generator is None else generator.device
        normals = torch.randn((count, len(output), units), dtype=accumulation_dtype(output.dtype), device=device, generator=generator)
        directions = nn.functional.normalize(normals, dim=2).to(output).view(count, *output.shape)
        norms = _squared_norms(_rows([(output * direction).sum() for direction in directions], x, differentiated)) * (units / count)
    return (norms, output) if differentiated else (norms.detach(), output.detach())


def penalty(hidden, weight, activation: int, alpha: float, reduction: int) -> Tensor:
    """The operator's penalty, differentiable any number of times in either mode."""
    dtype = accumulation_dtype(hidden.dtype)
    slopes = derivative(hidden.to(dtype), ACTIVATION_NAMES[activation], alpha)
    return reduce_elements(slopes.square() * weight.to(dtype).square().sum(1), reduction, hidden.dtype)


@in_plain_torch(ops.ContractivePenalty)
def _penalty_in_plain_torch(arguments: ops.ForwardArguments) -> tuple[Tensor]:
    hidden, weight, activation, alpha, reduction, *_ = arguments
    return (penalty(hidden, weight, activation, alpha, reduction),)


def _gradients(weights, norms, arguments: ops.ForwardArguments | ops.BackwardArguments) -> ops.BackwardResults:
    """The gradients of the penalties of hidden's elements, each times its element of ``weights``."""
    grads = arguments.allocate()
    hidden, weight = arguments.hidden, arguments.weight
    slope, change = derivatives(hidden.to(norms.dtype), ACTIVATION_NAMES[arguments.activation], arguments.alpha)
    if arguments.with_grad_hidden:
        grads.grad_hidden.copy_(weights * norms * 2.0 * slope * change)
    if arguments.with_grad_weight:
        columns = (weights * slope.square()).sum(0)
        grads.grad_weight.copy_(2.0 * columns.unsqueeze(1) * weight.to(norms.dtype))
    return ops.BackwardResults(grads.grad_hidden, grads.grad_weight)


@ops.forward.implement("reference")
def _jacobian_forward(arguments: ops.ForwardArguments) -> ops.ForwardResults:
    hidden, weight, reduction = arguments.hidden, arguments.weight, arguments.reduction
    dtype = accumulation_dtype(hidden.dtype)
    norms = weight.to(dtype).square().sum(1)
    elements = derivative(hidden.to(dtype), ACTIVATION_NAMES[arguments.activation], arguments.alpha).square() * norms
    weights = expand_gradient(norms.new_full((), arguments.grad_scale), hidden.shape, reduction) if _is_scalar(reduction) else None
    return ops.ForwardResults(reduce_elements(elements, reduction, hidden.dtype), norms, *_gradients(weights, norms, arguments))


def _is_scalar(reduction: int) -> bool:
    return reduction not in (REDUCTIONS["none"], REDUCTIONS["sample"])


@ops.backward.implement("reference")
def _jacobian_backward(arguments: ops.BackwardArguments) -> ops.BackwardResults:
    weights = expand_gradient(arguments.grad_output, arguments.hidden.shape, arguments.reduction)
    return _gradients(weights, arguments.squared_norms, arguments)


@in_plain_torch(ops.GramPenalty)
def _gram_in_plain_torch(inputs: tuple) -> tuple[Tensor]:
    left, inner, outer, lower, reduction, _ = inputs
    return (gram_norms(left, inner, outer, lower, reduction),)


def gram_norms(left, inner, outer, lower, reduction: int) -> Tensor:
    """The norms of the Gram form, differentiable any number of times in either mode."""
    scaled = outer.unsqueeze(2) * left * inner.unsqueeze(1)
    return reduce_elements(((scaled @ (lower @ lower.T)) * scaled).sum((1, 2)), reduction, outer.dtype)


@ops.gram_scale.implement("reference")
def _jacobian_gram_scale(arguments: ops.GramScaleArguments) -> Tensor:
    left, inner, outer = arguments
    return (outer.unsqueeze(2) * left * inner.unsqueeze(1)).flatten(0, 1)


@ops.gram_reduce.implement("reference")
def _jacobian_gram_reduce(arguments: ops.GramReduceArguments) -> ops.GramReduceResults:
    left, inner, outer, product, with_grad = arguments
    product = product.view(*outer.shape, inner.shape[1])
    dots = (left * inner.unsqueeze(1) * product).sum(2)
    if not with_grad:
        return ops.GramReduceResults(dots, inner.new_empty((0,)), left.new_empty((0,)))
    weighted = outer.unsqueeze(2) * product
    grad_left = weighted * inner.unsqueeze(1)
    return ops.GramReduceResults(dots, (left * weighted).sum(1), grad_left if left.ndim == 3 else grad_left.sum(0))


ops.gram.implement("reference")(gram_in_chunks("reference"))
