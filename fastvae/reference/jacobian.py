"""The contractive penalty and the epilogues of the Gram form in plain PyTorch: the definition and the oracle of the
tests."""

import math
from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor, nn

from fastvae._ops import ACTIVATIONS, OVERLOADS, REDUCTIONS, accumulation_dtype
from fastvae._outputs import JacobianMethod
from fastvae._types import Activation, BoundReduction, JacobianMethodName, Reduction
from fastvae.reference._options import check_choice, reduction_number
from fastvae.reference._reduce import expand_gradient, reduce_elements

_NAMES = {number: name for name, number in ACTIVATIONS.items()}
# What `alpha` is where nobody gives one; the activations that are not here have no parameter.
DEFAULT_ALPHAS = {"leaky_relu": 0.01, "elu": 1.0, "softplus": 1.0}
# Whose derivative takes the pre-activation: the output does not determine it.
FROM_PREACTIVATION = ("silu", "gelu", "gelu_tanh")

# Elements of a scaled matrix: few enough that memory does not grow with the batch, enough that what each chunk costs beside its products
# does not count.
GRAM_ELEMENTS = 1 << 21

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715


def derivative(hidden: Tensor, activation: str, alpha: float) -> Tensor:
    """The activation's derivative from its output (from its input for those in ``FROM_PREACTIVATION``), itself differentiable."""
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
    alpha = DEFAULT_ALPHAS.get(activation, 0.0) if alpha is None else alpha
    return penalty(hidden, weight, ACTIVATIONS[activation], alpha, reduction_number(reduction))


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
        if module.training and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return JacobianMethod("projection", f"samples meet in layer {name!r}, {module}: unbiased random projections serve any encoder")
    return JacobianMethod("autograd", "the definition: a backward pass for each output")


def _encode(encoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` as a tensor that can be differentiated by, and its codes."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    return x, encoder(x)


def _squared_norms(rows: list[Tensor]) -> Tensor:
    """The sum over ``rows`` of each sample's squared norm."""
    return torch.stack([row.flatten(1).to(accumulation_dtype(row.dtype)).square().sum(1) for row in rows]).sum(0)


def _rows(outputs: list[Tensor], x: Tensor, differentiated: bool) -> list[Tensor]:
    """The gradient of each output, itself differentiable where ``differentiated``."""
    options = {"create_graph": differentiated, "retain_graph": True, "materialize_grads": True}
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
    slopes = derivative(hidden.to(dtype), _NAMES[activation], alpha)
    return reduce_elements(slopes.square() * weight.to(dtype).square().sum(1), reduction, hidden.dtype)


def _gradients(weights, hidden, weight, norms, activation, alpha, with_grad_hidden, with_grad_weight):
    slope, change = derivatives(hidden.to(norms.dtype), _NAMES[activation], alpha)
    grad_hidden, grad_weight = hidden.new_empty((0,)), weight.new_empty((0,))
    if with_grad_hidden:
        grad_hidden = (weights * norms * 2.0 * slope * change).to(hidden.dtype).contiguous()
    if with_grad_weight:
        columns = (weights * slope.square()).sum(0)
        grad_weight = (2.0 * columns.unsqueeze(1) * weight.to(norms.dtype)).to(weight.dtype).contiguous()
    return grad_hidden, grad_weight


@torch.library.impl("fastvae::jacobian_forward.reference", "CompositeExplicitAutograd")
def _jacobian_forward(hidden, weight, activation, alpha, reduction, grad_scale, with_grad_hidden, with_grad_weight):
    dtype = accumulation_dtype(hidden.dtype)
    norms = weight.to(dtype).square().sum(1)
    elements = derivative(hidden.to(dtype), _NAMES[activation], alpha).square() * norms
    weights = expand_gradient(norms.new_full((), grad_scale), hidden.shape, reduction) if with_grad_hidden or with_grad_weight else None
    grads = _gradients(weights, hidden, weight, norms, activation, alpha, with_grad_hidden, with_grad_weight)
    return reduce_elements(elements, reduction, hidden.dtype), norms, *grads


@torch.library.impl("fastvae::jacobian_backward.reference", "CompositeExplicitAutograd")
def _jacobian_backward(grad_output, hidden, weight, squared_norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight):
    weights = expand_gradient(grad_output, hidden.shape, reduction)
    return _gradients(weights, hidden, weight, squared_norms, activation, alpha, with_grad_hidden, with_grad_weight)


def gram_norms(left, inner, outer, lower, reduction: int) -> Tensor:
    """The norms of the Gram form, differentiable any number of times in either mode."""
    scaled = outer.unsqueeze(2) * left * inner.unsqueeze(1)
    return reduce_elements(((scaled @ (lower @ lower.T)) * scaled).sum((1, 2)), reduction, outer.dtype)


@torch.library.impl("fastvae::jacobian_gram_scale.reference", "CompositeExplicitAutograd")
def _jacobian_gram_scale(left, inner, outer):
    return (outer.unsqueeze(2) * left * inner.unsqueeze(1)).flatten(0, 1)


@torch.library.impl("fastvae::jacobian_gram_reduce.reference", "CompositeExplicitAutograd")
def _jacobian_gram_reduce(left, inner, outer, product, with_grad):
    product = product.view(*outer.shape, inner.shape[1])
    dots = (left * inner.unsqueeze(1) * product).sum(2)
    if not with_grad:
        return dots, inner.new_empty((0,)), left.new_empty((0,))
    weighted = outer.unsqueeze(2) * product
    grad_left = weighted * inner.unsqueeze(1)
    return dots, (left * weighted).sum(1), grad_left if left.ndim == 3 else grad_left.sum(0)


def gram_in_chunks(backend: str) -> Callable:
    """``jacobian_gram`` by torch's products between the backend's two epilogues, some samples at a time, which bounds the memory."""
    scale, reduce = OVERLOADS["jacobian_gram_scale", backend], OVERLOADS["jacobian_gram_reduce", backend]

    def gram_norms(left, inner, outer, gram, weights, with_grad):
        rows, columns = outer.shape[1], inner.shape[1]
        count = max(GRAM_ELEMENTS // max(rows * columns, 1), 1)
        parts, grad_gram = [], torch.zeros_like(gram) if with_grad else gram.new_empty((0,))
        for start in range(0, outer.shape[0], count):
            chunk = slice(start, start + count)
            lefts, inners, outers = left[chunk] if left.ndim == 3 else left, inner[chunk], outer[chunk]
            scaled = scale(lefts, inners, outers)
            weighted_outers, weighted = outers, scaled
            if weights is not None:
                weighted_outers = outers * weights[chunk].unsqueeze(1)
                weighted = scaled * weights[chunk].repeat_interleave(rows).unsqueeze(1)
            parts.append(reduce(lefts, inners, weighted_outers, scaled @ gram, with_grad))
            if with_grad:
                _add_symmetric_product(grad_gram, scaled, weighted)
        if not parts:
            return outer.sum(1), *(torch.zeros_like(t) if with_grad else t.new_empty((0,)) for t in (left, inner, outer)), grad_gram
        dots, inners, lefts = zip(*parts, strict=True)
        dots = torch.cat(dots)
        norms = (outer * dots).sum(1)
        if not with_grad:
            return norms, *(gram.new_empty((0,)) for _ in range(4))
        grad_left = torch.cat(lefts) if left.ndim == 3 else sum(lefts[1:], lefts[0])
        grad_outer = 2 * dots if weights is None else 2 * dots * weights.unsqueeze(1)
        return norms, 2 * grad_left, 2 * torch.cat(inners), grad_outer, _mirrored(grad_gram)

    return gram_norms


def _add_symmetric_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds ``a.T @ b``, which is symmetric, to ``total``, but for the lower left quarter."""
    half = a.shape[1] // 2
    total[:half].addmm_(a[:, :half].T, b)
    total[half:, half:].addmm_(a[:, half:].T, b[:, half:])


def _mirrored(total: Tensor) -> Tensor:
    """Writes the lower left quarter of a symmetric matrix."""
    half = total.shape[1] // 2
    total[half:, :half].copy_(total[:half, half:].T)
    return total


torch.library.impl("fastvae::jacobian_gram.reference", "CompositeExplicitAutograd", gram_in_chunks("reference"))
