"""The contractive penalty and the Gram form of an encoder's Jacobian: the operators and their autograd.Functions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastvae.ops._autograd import first_derivative_only, may_use_written, scale_written, without_autocast
from fastvae.ops._operator import Operator
from fastvae.ops._results import REDUCTIONS, accumulation_dtype, empty_if, empty_like, empty_reduced, reduction_scale


class Activation(NamedTuple):
    """An activation whose derivative the kernels know, and the module of torch that computes it.

    ``number`` is mirrored by csrc/common/jacobian_formulas.h and by the constexprs in kernels/. ``parameter`` is the attribute of
    ``module`` that holds the activation's parameter, and ``alpha`` torch's default for it. ``settings`` are attributes that a module must
    have to be this activation. Where the output does not determine the derivative, the kernels take the pre-activation
    (``from_preactivation``).
    """

    number: int
    module: type[nn.Module]
    parameter: str | None = None
    alpha: float = 0.0
    settings: tuple[tuple[str, str], ...] = ()
    from_preactivation: bool = False

    @property
    def has_parameter(self) -> bool:
        return self.parameter is not None


ACTIVATIONS = {
    "identity": Activation(0, nn.Identity),
    "sigmoid": Activation(1, nn.Sigmoid),
    "tanh": Activation(2, nn.Tanh),
    "relu": Activation(3, nn.ReLU),
    "leaky_relu": Activation(4, nn.LeakyReLU, "negative_slope", 0.01),
    "elu": Activation(5, nn.ELU, "alpha", 1.0),
    "softplus": Activation(6, nn.Softplus, "beta", 1.0),
    "silu": Activation(7, nn.SiLU, from_preactivation=True),
    "gelu": Activation(8, nn.GELU, settings=(("approximate", "none"),), from_preactivation=True),
    "gelu_tanh": Activation(9, nn.GELU, settings=(("approximate", "tanh"),), from_preactivation=True),
}
ACTIVATION_NAMES = {activation.number: name for name, activation in ACTIVATIONS.items()}


class ForwardResults(NamedTuple):
    """The gradients have no elements where they were not asked for."""

    penalty: Tensor
    squared_norms: Tensor  # of the rows of weight, in the accumulation dtype
    grad_hidden: Tensor
    grad_weight: Tensor


class ForwardArguments(NamedTuple):
    """``with_grad_hidden`` and ``with_grad_weight``, for scalar reductions only, ask for ``grad_scale`` times the gradients."""

    hidden: Tensor
    weight: Tensor
    activation: int
    alpha: float
    reduction: int
    grad_scale: float
    with_grad_hidden: bool
    with_grad_weight: bool

    def allocate(self) -> ForwardResults:
        hidden, weight = self.hidden, self.weight
        norms = hidden.new_empty(weight.shape[:1], dtype=accumulation_dtype(hidden.dtype))
        grads = empty_if(self.with_grad_hidden, hidden), empty_if(self.with_grad_weight, weight)
        return ForwardResults(empty_reduced(hidden, self.reduction), norms, *grads)


class BackwardResults(NamedTuple):
    """Neither has elements where it was not asked for."""

    grad_hidden: Tensor
    grad_weight: Tensor


class BackwardArguments(NamedTuple):
    grad_output: Tensor
    hidden: Tensor
    weight: Tensor
    squared_norms: Tensor
    activation: int
    alpha: float
    reduction: int
    with_grad_hidden: bool
    with_grad_weight: bool

    def allocate(self) -> BackwardResults:
        return BackwardResults(empty_if(self.with_grad_hidden, self.hidden), empty_if(self.with_grad_weight, self.weight))


class GramResults(NamedTuple):
    """The gradients have no elements where they were not asked for."""

    norms: Tensor  # (batch,)
    grad_left: Tensor
    grad_inner: Tensor
    grad_outer: Tensor
    grad_gram: Tensor


class GramArguments(NamedTuple):
    """For each sample <S, S ``gram``> with S = ``outer left inner`` (see :class:`GramScaleArguments`), and where ``with_grad`` the
    gradients of the sum of those norms, each norm times its weight where there are ``weights``. ``gram`` is symmetric; all tensors are in
    the accumulation dtype."""

    left: Tensor
    inner: Tensor
    outer: Tensor
    gram: Tensor
    weights: Tensor | None
    with_grad: bool

    def allocate(self) -> GramResults:
        grads = (empty_if(self.with_grad, t) for t in (self.left, self.inner, self.outer, self.gram))
        return GramResults(self.outer.new_empty(self.outer.shape[:1]), *grads)


# The next two are the steps of the Gram form between which a backend leaves the products to torch (see _gram_chunks.py).


class GramScaleArguments(NamedTuple):
    """``outer[b, r] left[(b,) r, k] inner[b, k]`` as the rows (b, r) of a matrix; all in the accumulation dtype."""

    left: Tensor
    inner: Tensor
    outer: Tensor

    def allocate(self) -> Tensor:
        return self.left.new_empty((self.outer.shape[0] * self.outer.shape[1], self.inner.shape[1]))


class GramReduceResults(NamedTuple):
    """The gradients have no elements where they were not asked for."""

    dots: Tensor  # (batch, rows)
    grad_inner: Tensor
    grad_left: Tensor


class GramReduceArguments(NamedTuple):
    """The matrix of :class:`GramScaleArguments` against ``product``, which has its shape, contracted over k, over r, and over b (not over b
    where ``left`` has a batch dimension). Each result lacks the factor that it is the gradient of."""

    left: Tensor
    inner: Tensor
    outer: Tensor
    product: Tensor
    with_grad: bool

    def allocate(self) -> GramReduceResults:
        grads = empty_if(self.with_grad, self.inner), empty_if(self.with_grad, self.left)
        return GramReduceResults(empty_like(self.outer), *grads)


forward = Operator("jacobian_forward", ForwardArguments)
backward = Operator("jacobian_backward", BackwardArguments)
gram = Operator("jacobian_gram", GramArguments)
gram_scale = Operator("jacobian_gram_scale", GramScaleArguments)
gram_reduce = Operator("jacobian_gram_reduce", GramReduceArguments)


class ContractivePenalty(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, weight, ctx.activation, ctx.alpha, ctx.reduction, ctx.grad_scale, *with_grads, ctx.backend = inputs
        _, squared_norms, grad_hidden, grad_weight = output
        ctx.mark_non_differentiable(squared_norms, grad_hidden, grad_weight)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, squared_norms, grad_hidden, grad_weight)
        ctx.written = any(with_grads)

    @staticmethod
    @first_derivative_only("fastvae.reference.jacobian")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return forward.gradients()
        hidden, weight, squared_norms, *written = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        grads = scale_written(written, grad_output, ctx.grad_scale) if ctx.written and may_use_written(grad_output) else None
        if grads is None:
            options = ctx.activation, ctx.alpha, ctx.reduction
            grads = backward.overloads[ctx.backend](grad_output, hidden, weight, squared_norms, *options, *wanted)
        return forward.gradients(hidden=grads[0] if wanted[0] else None, weight=grads[1] if wanted[1] else None)


class GramPenalty(torch.autograd.Function):
    """sum_j of |(S V W)_j|^2 for S V = ``outer left inner`` of each sample and a matrix W = ``lower`` that all samples share."""

    generate_vmap_rule = True

    @staticmethod
    def forward(left, inner, outer, lower, reduction, with_grad, backend):
        norms, *grads = gram.overloads[backend](left, inner, outer, lower @ lower.T, None, with_grad)
        if reduction != REDUCTIONS["sample"]:
            norms = norms.sum() * reduction_scale(outer.shape[:1], reduction)
        return norms, *grads

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.reduction, ctx.written, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    @first_derivative_only("fastvae.reference.jacobian")
    def backward(ctx, grad_output, *_):
        if grad_output is None:
            return (None,) * 7
        left, inner, outer, lower, *grads = ctx.saved_tensors
        factor = grad_output * reduction_scale(outer.shape[:1], ctx.reduction)
        # Autocast would round the products, which the forward pass did not do either.
        with without_autocast(left.device):
            if ctx.written:
                grads = [grad * factor for grad in grads]
            else:
                weights = factor.expand(outer.shape[0])
                _, *grads = gram.overloads[ctx.backend](left, inner, outer, lower @ lower.T, weights, True)
            *grads, grad_gram = grads
            return *grads, 2.0 * grad_gram @ lower, None, None, None
