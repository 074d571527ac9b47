"""The contractive penalty in closed form, and the squared Frobenius norm of any encoder's Jacobian."""

import functools
import math
from collections.abc import Callable
from typing import cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fastvae import _backend
from fastvae._outputs import JacobianMethod
from fastvae._torch_private import BATCH_NORMS, DROPOUTS
from fastvae._types import Activation, BoundReduction, JacobianMethodName, Reduction, check_choice
from fastvae.functional import _chain
from fastvae.functional._call import apply, writes_gradient
from fastvae.functional._checks import check_device, check_scale, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops import jacobian as ops
from fastvae.ops._autograd import transformed, without_autocast
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, reduction_number, reduction_scale
from fastvae.ops.jacobian import ACTIVATIONS

METHODS = get_args(JacobianMethodName)
NORM_REDUCTIONS = get_args(BoundReduction)


@documented
def contractive_penalty(
    hidden: Tensor,
    weight: Tensor,
    activation: Activation = "sigmoid",
    reduction: Reduction = "batchmean",
    *,
    alpha: float | None = None,
    grad_scale: float = 1.0,
) -> Tensor:
    r"""The squared Frobenius norm of the Jacobian of one layer :math:`h = \phi(W x + b)`, in closed form.

    .. math:: \left\| \frac{\partial h}{\partial x} \right\|_F^2 = \sum_j \phi'(a_j)^2 \, \| W_j \|^2, \quad a = W x + b

    Rifai et al., *Contractive Auto-Encoders: Explicit Invariance During Feature Extraction* (2011).

    Args:
        hidden: the layer's output :math:`h`, ``(batch, units)``; float32, bfloat16, float16 or float64. For ``"silu"``, ``"gelu"`` and
            ``"gelu_tanh"``, whose output does not determine the derivative, the pre-activation :math:`a`.
        weight: :math:`W`, ``(units, inputs)`` as in :class:`torch.nn.Linear`. Its dtype may differ from that of ``hidden``, as it does
            under autocast, but for float64.
        activation: ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"leaky_relu"``, ``"elu"``, ``"softplus"``, ``"silu"``, ``"gelu"``,
            ``"gelu_tanh"`` or ``"identity"``.
        reduction: ``"none"`` the share of each unit, ``(batch, units)``; ``"sample"`` the squared norm of each sample, ``(batch,)``;
            ``"batchmean"`` the mean of those, ``"sum"``, or ``"mean"`` over samples and units.
        alpha: the activation's parameter: the negative slope of ``"leaky_relu"`` (0.01), alpha of ``"elu"`` (1), beta of ``"softplus"``
            (1); the default is torch's.
        grad_scale: the gradient that the backward pass is expected to bring in, the weight of the penalty in the loss: on the CPU the
            forward pass writes so many times the gradient. The penalty is not scaled, and the result is right whatever comes in.

    Returns:
        The penalty; in the dtype of ``hidden`` for ``"none"``, else in float32 (float64 for float64). 0 for an empty batch.

    Raises:
        $errors
    """
    check_choice("activation", activation, ACTIVATIONS)
    _check_layer(hidden, weight)
    number, scale, alpha = reduction_number(reduction), check_scale(grad_scale), _check_alpha(activation, alpha)
    with_grads = _written_gradients(hidden, weight, reduction, scale)
    arguments = ops.ForwardArguments(hidden, weight, ACTIVATIONS[activation].number, alpha, number, scale, *with_grads)
    return apply(ops.ContractivePenalty, arguments, _backend.resolve("jacobian_forward", hidden.device, hidden.dtype))[0]


def _written_gradients(hidden, weight, reduction, grad_scale) -> tuple[bool, bool]:
    """Whether the forward pass writes the gradients of hidden and of weight. It does so on the CPU alone: the backward pass has to read the
    incoming gradient, for which another device would wait."""
    learners = [t for t in (hidden, weight) if t.requires_grad]
    written = hidden.is_cpu and writes_gradient(learners, reduction, grad_scale)
    return written and hidden.requires_grad, written and weight.requires_grad


def _check_layer(hidden, weight) -> None:
    check_tensor("hidden", hidden)
    check_tensor("weight", weight)
    check_device("weight", weight, "hidden", hidden)
    if hidden.ndim != 2:
        raise ValueError(f"hidden: got shape {tuple(hidden.shape)}, takes (batch, units)")
    if weight.ndim != 2 or weight.shape[0] != hidden.shape[1]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, takes (units, inputs) with the units of hidden, {hidden.shape[1]}")
    if (weight.dtype == torch.float64) != (hidden.dtype == torch.float64):
        raise TypeError(f"weight: got {weight.dtype}, takes float64 with a float64 hidden, which is {hidden.dtype}, and only then")


def _check_alpha(activation, alpha) -> float:
    if alpha is None:
        return ACTIVATIONS[activation].alpha
    if not ACTIVATIONS[activation].has_parameter:
        raise ValueError(f"alpha: got {alpha!r}, takes None: {activation!r} has no parameter")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"alpha: got {alpha!r}, takes a finite number")
    return float(alpha)


def _gram_penalty(left: Tensor, inner: Tensor, outer: Tensor, lower: Tensor, reduction: str) -> Tensor:
    tensors = left, inner, outer, lower
    with_grad = reduction != "sample" and torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    backend = _backend.resolve("jacobian_gram", left.device, left.dtype)
    return apply(ops.GramPenalty, (*tensors, REDUCTIONS[reduction], with_grad), backend)[0]


@documented
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
    r"""The squared Frobenius norm of an encoder's Jacobian at each sample, :math:`\| \partial f(x) / \partial x \|_F^2`, differentiable.

    * ``"closed_form"``: one linear layer, see :func:`contractive_penalty`.
    * ``"gram"``: an MLP, exactly. With V the Jacobian above the first layer and G = :math:`W_1 W_1^T`, which all samples share,
      :math:`\| V W_1 \|^2 = \langle V, V G \rangle`, so a Jacobian as wide as the input is not built. Which products are formed, from
      which end, follows from the sizes: the order that takes the fewest operations.
      The products are torch's and follow its setting: where ``torch.set_float32_matmul_precision`` allows TF32, they round their factors
      as the encoder's own layers do, and the norm has a relative error of up to 1e-3 on a GPU.
    * ``"projection"``: any module, convolutional ones too. Unbiased: :math:`C / n \sum_i \| v_i^T J \|^2` for n directions v uniform on the
      sphere in the C dimensions of the output (Hoffman et al., *Robust Learning with Jacobian Regularization*, 2019). In one that mixes
      samples, batch-norm in training mode, the Jacobian is that of the whole batch.
    * ``"autograd"``: any module whose samples do not meet, exactly and slowly: ``torch.func.vmap(torch.func.jacrev(encoder))``.
    * ``"auto"``: the first that serves of the first three; :func:`explain_jacobian_method` tells which and why.

    The first two read an encoder that is an ``nn.Linear`` or an ``nn.Sequential`` (nested too) of ``Linear``, activations, ``Flatten`` at
    the start, and dropout and ``BatchNorm1d`` in evaluation mode. They do not call it, so they do not serve one that would do more when it
    is called: one with hooks, its own or those registered for all modules, or with a ``forward`` of its own. Linear layers may be
    parametrized, by ``weight_norm`` or ``spectral_norm``: each parametrization is computed once.

    Args:
        encoder: from ``(batch, ...)`` to ``(batch, ...)``.
        x: the batch; float32, bfloat16, float16 or float64.
        method: see above.
        num_projections: n, for ``"projection"``.
        generator: what directions are drawn from, on the CPU or on the device of ``x``; by default torch's own.
        reduction: ``"batchmean"``, ``"sum"``, or ``"sample"``, shape ``(batch,)``.
        chunk_size: at most so many samples at a time, which bounds the memory: the backward pass computes each chunk again (but for
            ``"autograd"``, where it bounds that of the forward pass alone), from the buffers that the forward pass began with, and leaves
            the encoder's as they are. The result is the same but for rounding, and for an encoder that changes its buffers, such as
            batch-norm in training mode: for that each chunk is a call. ``None``: all at once.
        with_output: gives ``encoder(x)`` too, from the same pass over the encoder.

    Returns:
        The squared norm, in float32 (float64 for float64), 0 for an empty batch; ``(norm, output)`` where ``with_output``.

    Raises:
        TypeError, ValueError: for an argument that does not fit, naming it; for an encoder that the method cannot serve, naming the layer
            and the method that can.
    """
    _check_encoder(encoder, x)
    check_choice("method", method, METHODS)
    check_choice("reduction", reduction, NORM_REDUCTIONS)
    _check_count("num_projections", num_projections)
    if chunk_size is not None:
        _check_count("chunk_size", chunk_size)
    norm, output = _norm_and_output(encoder, x, method, num_projections, generator, reduction, chunk_size)
    return (norm, output) if with_output else norm


def _norm_and_output(encoder, x, method, num_projections, generator, reduction, chunk_size):
    if method == "autograd":
        _check_samples_apart(encoder)
        return _reduce(*_in_chunks(lambda: functools.partial(_exact, encoder), x, chunk_size, recompute=False), reduction)
    layers = None if method == "projection" else _read(encoder, x, method)
    if layers is None:
        replayed = chunk_size is not None and isinstance(encoder, nn.Module) and not transformed()
        wrap = _Replayed if replayed else lambda encoder: encoder
        return _reduce(*_in_chunks(lambda: _Projection(wrap(encoder), num_projections, generator), x, chunk_size), reduction)
    compute = functools.partial(_closed_form if len(layers) == 1 else _gram, _chain.read_parameters(layers))
    if chunk_size is None:
        return compute(x, reduction)
    return _reduce(*_in_chunks(lambda: functools.partial(compute, reduction="sample"), x, chunk_size), reduction)


def explain_jacobian_method(encoder: nn.Module, x: Tensor) -> JacobianMethod:
    """The method that :func:`jacobian_frobenius` takes with ``method="auto"`` for an encoder and a batch, and the reason."""
    _check_encoder(encoder, x)
    try:
        layers = _chain.read_chain(encoder, x.ndim)
    except _chain.NotAChain as obstacle:
        return JacobianMethod("projection", f"{obstacle}: unbiased random projections serve any encoder; method='autograd' is exact")
    if len(layers) == 1:
        return JacobianMethod("closed_form", "one linear layer")
    sizes = (layers[0].linear.in_features, *(layer.linear.out_features for layer in layers))
    plan = _chain.plan(sizes, x.shape[0])
    if plan.gram_at is None:
        below = f"layers 1 to {plan.meet} multiplied out" if plan.meet > 1 else "the first layer as it is"
    else:
        below = f"the Gram matrix of {'the first layer' if plan.gram_at == 1 else f'layers 1 to {plan.gram_at}'}"
    chain = "-".join(map(str, sizes))
    return JacobianMethod("gram", f"an MLP {chain}: {below}, {plan.operations:.2e} multiplications for {x.shape[0]} samples")


def _check_encoder(encoder, x) -> None:
    if not callable(encoder):
        raise TypeError(f"encoder: got {type(encoder).__name__}, takes a module")
    check_tensor("x", x)
    if x.ndim < 1:
        raise ValueError("x: got a tensor without dimensions, takes (batch, ...)")


def _check_count(name, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, takes an integer >= 1")


def _read(encoder, x, method) -> list[_chain.Layer] | None:
    """The layers of an MLP; None for another encoder where ``method`` is ``"auto"``."""
    try:
        layers = _chain.read_chain(encoder, x.ndim)
    except _chain.NotAChain as obstacle:
        if method == "auto":
            return None
        raise ValueError(f"method: got {method!r}, but {obstacle}: use method='projection', or 'autograd' in evaluation mode") from None
    if method == "closed_form" and len(layers) > 1:
        raise ValueError(f"method: got 'closed_form' for an encoder of {len(layers)} linear layers, takes one: use method='gram'")
    return layers


def _check_samples_apart(encoder) -> None:
    if not isinstance(encoder, nn.Module):
        return
    for name, module in encoder.named_modules():
        if module.training and isinstance(module, BATCH_NORMS | DROPOUTS):
            raise ValueError(
                f"method: got 'autograd', but layer {name!r}, {module}, is in training mode: use method='projection', or encoder.eval()"
            )


def _reduce(norms: Tensor, output: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    if reduction == "sample":
        return norms, output
    return norms.sum() * reduction_scale(norms.shape, REDUCTIONS[reduction]), output


def _in_chunks(
    make: Callable[[], Callable[[Tensor], tuple[Tensor, Tensor]]], x: Tensor, chunk_size: int | None, recompute: bool = True
) -> tuple[Tensor, Tensor]:
    """``make()(x)``, norms and outputs, one chunk of samples at a time, each with a function of its own. The backward pass computes a
    chunk again."""
    if chunk_size is None or chunk_size >= x.shape[0]:
        return make()(x)
    recompute = recompute and torch.is_grad_enabled()
    parts = [checkpoint(make(), part, use_reentrant=False) if recompute else make()(part) for part in x.split(chunk_size)]
    norms, outputs = zip(*parts, strict=True)
    return torch.cat(norms), torch.cat(outputs)


def _closed_form(layers, x, reduction) -> tuple[Tensor, Tensor]:
    (link,), code = _chain.encode_chain(layers, x)
    alpha = link.alpha if ACTIVATIONS[link.activation].has_parameter else None
    return contractive_penalty(link.hidden, link.weight, cast("Activation", link.activation), reduction, alpha=alpha), code


def _gram(layers, x, reduction) -> tuple[Tensor, Tensor]:
    links, code = _chain.encode_chain(layers, x)
    sizes = (links[0].weight.shape[1], *(link.weight.shape[0] for link in links))
    plan = _chain.plan(sizes, x.shape[0])
    # Autocast would round the products of what is differentiated twice.
    with without_autocast(x.device):
        slopes = [link.slopes() for link in links]
        weights = [link.weight for link in links]
        upper = _multiply_from_the_top(weights, slopes, plan.meet)
        if upper is not None and plan[:2] == (1, 1):
            return _gram_penalty(upper, slopes[0], slopes[-1], weights[0], reduction), code
        lower = _multiply_from_below(weights, slopes, plan)
        return _reduce(_meet(upper, lower, slopes, plan), code, reduction)


def _multiply_from_the_top(weights, slopes, meet) -> Tensor | None:
    """W_L S W ... W_{meet+1}, without the slopes at its two ends."""
    if meet == len(weights):
        return None
    product = weights[-1]
    for level in range(len(weights) - 2, meet - 1, -1):
        product = (product * slopes[level].unsqueeze(1)) @ weights[level]
    return product


def _multiply_from_below(weights, slopes, plan) -> Tensor:
    """The product up to ``meet`` without its last slopes, or what its Gram form is."""
    product = weights[0]
    for level in range(1, plan.meet if plan.gram_at is None else plan.gram_at):
        product = weights[level] @ (slopes[level - 1].unsqueeze(2) * product)
    if plan.gram_at is None:
        return product
    product = product @ product.mT
    for level in range(plan.gram_at, plan.meet):
        factor = weights[level] * slopes[level - 1].unsqueeze(1)
        product = factor @ product @ factor.mT
    return product


def _meet(upper, lower, slopes, plan) -> Tensor:
    if upper is None:
        return (slopes[-1].square() * lower.square().sum(-1)).sum(1)
    upper = upper * slopes[plan.meet - 1].unsqueeze(1)
    dots = (upper @ lower).square().sum(2) if plan.gram_at is None else ((upper @ lower) * upper).sum(2)
    return (slopes[-1].square() * dots).sum(1)


def _exact(encoder, x) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return _no_norms(encoder, x)

    def encode_one(sample):
        output = _encode(encoder, sample.unsqueeze(0)).squeeze(0)
        return output, output

    jacobians, output = torch.func.vmap(torch.func.jacrev(encode_one, has_aux=True))(x)
    return _squared_norms(jacobians), output


def _squared_norms(rows: Tensor) -> Tensor:
    return rows.flatten(1).to(accumulation_dtype(rows.dtype)).square().sum(1)


def _no_norms(encoder, x) -> tuple[Tensor, Tensor]:
    """Of an empty batch: no values, with a graph behind them."""
    output = _encode(encoder, x)
    return _squared_norms(output), output


def _encode(encoder, x) -> Tensor:
    """The output of an encoder, whose attention can be differentiated twice: torch's fused kernels of it cannot."""
    with sdpa_kernel(SDPBackend.MATH):
        output = encoder(x)
    if not isinstance(output, Tensor):
        raise TypeError(f"encoder: gave {type(output).__name__}, has to give a tensor")
    return output


class _Replayed:
    """An encoder that starts from the buffers of its first call whenever it is called again, and then leaves its own as they are."""

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self.buffers: dict[str, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.buffers is None:
            self.buffers = {name: buffer.clone() for name, buffer in self.encoder.named_buffers()}
            return self.encoder(x)
        return torch.func.functional_call(self.encoder, {name: buffer.clone() for name, buffer in self.buffers.items()}, x)


class _Projection:
    """The projected norms of one chunk. When the backward pass computes it again, the directions are those of the first time."""

    def __init__(self, encoder, num_projections: int, generator: torch.Generator | None):
        self.encoder, self.count, self.generator = encoder, num_projections, generator
        self.directions: Tensor | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[0] == 0:
            return _no_norms(self.encoder, x)
        rows, output = self._rows_transformed(x) if transformed() else self._rows(x)
        norms = torch.stack([_squared_norms(row) for row in rows]).sum(0)
        return norms * (math.prod(output.shape[1:]) / self.count), output

    def _rows(self, x):
        differentiated = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            output = _encode(self.encoder, x)
            rows = [
                torch.autograd.grad(output, x, v, create_graph=differentiated, retain_graph=differentiated or i + 1 < self.count)[0]
                for i, v in enumerate(self._draw(output))
            ]
        return rows, output if differentiated else output.detach()

    def _rows_transformed(self, x):
        # torch.compile and torch.func see through this one; it does not take an encoder that changes its buffers.
        vjp = cast("Callable[..., tuple[Tensor, Callable]]", torch.func.vjp)
        output, pull_back = vjp(lambda x: _encode(self.encoder, x), x)
        return [pull_back(v)[0] for v in self._draw(output)], output

    def _draw(self, output) -> Tensor:
        if self.directions is None:
            shape = (self.count, output.shape[0], math.prod(output.shape[1:]))
            device = output.device if self.generator is None else self.generator.device
            normals = torch.randn(shape, dtype=accumulation_dtype(output.dtype), device=device, generator=self.generator).to(output.device)
            units = nn.functional.normalize(normals, dim=2)
            self.directions = units.to(output.dtype).view(self.count, *output.shape)
        return self.directions
