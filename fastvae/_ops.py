"""The operators: every schema and every shape function, and nothing else.

A backend is an overload. ``fastvae::latent_forward.cpp``, ``.cuda``, ``.triton``, ``.fallback`` and ``.reference`` share one schema and one
fake; an implementation adds itself with ``torch.library.impl`` (Python) or ``STABLE_TORCH_LIBRARY_IMPL`` (C++).
"""

import torch
from torch import Tensor

BACKENDS = ("cpp", "cuda", "triton", "fallback", "reference")

# Mirrored by csrc/common/reduction.h and by the constexprs in kernels/.
REDUCTIONS = {"none": 0, "sample": 1, "batchmean": 2, "sum": 3, "mean": 4}
LIKELIHOODS = {"bce_with_logits": 0, "bce": 1, "mse": 2, "gaussian": 3}
NORM_ACTIVATIONS = {"none": 0, "silu": 1}

OVERLOADS: dict[tuple[str, str], torch._ops.OpOverload] = {}


def _define(name: str, schema: str):
    """Defines one overload a backend for the operator ``name`` and gives them all the decorated function as their fake."""

    def register(fake):
        for backend in BACKENDS:
            qualified = f"fastvae::{name}.{backend}"
            torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
            torch.library.register_fake(qualified, fake)
            OVERLOADS[name, backend] = getattr(getattr(torch.ops.fastvae, name), backend)
        return fake

    return register


def operators() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for name, _ in OVERLOADS))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_float64(device: torch.device) -> bool:
    """Whether a device has operations on float64: the GPUs of Apple and some of Intel have none."""
    if device.type == "xpu":
        return not torch.xpu.is_available() or torch.xpu.get_device_properties(device).has_fp64
    return device.type != "mps"


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on a device that has none."""
    return torch.float64 if has_float64(device) else torch.float32


def reduced_shape(shape: torch.Size, reduction: int) -> tuple:
    if reduction == REDUCTIONS["none"]:
        return tuple(shape)
    if reduction == REDUCTIONS["sample"]:
        return tuple(shape[:1])
    return ()


def _empty_reduced(like: Tensor, reduction: int) -> Tensor:
    dtype = like.dtype if reduction == REDUCTIONS["none"] else accumulation_dtype(like.dtype)
    return like.new_empty(reduced_shape(like.shape, reduction), dtype=dtype)


def _empty_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape)


def _empty_if(condition: bool, tensor: Tensor) -> Tensor:
    """A contiguous tensor like ``tensor`` where the operator returns one, a tensor without elements where it does not."""
    return tensor.new_empty(tensor.shape if condition else (0,))


@_define(
    "latent_forward",
    "(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor? eps, Tensor? seed, SymInt? num_samples, "
    "bool with_kl, int reduction, float free_bits, float clamp_min, float clamp_max, bool keep_noise) "
    "-> (Tensor z, Tensor kl, Tensor active, Tensor noise)",
)
def latent_forward(
    mu, logvar, prior_mu, prior_logvar, eps, seed, num_samples, with_kl, reduction, free_bits, clamp_min, clamp_max, keep_noise
):
    """``z`` (no elements where neither ``eps`` nor ``seed`` is given), ``kl`` (none where not ``with_kl``), with free bits which
    dimensions are above them (bool, ``mu.shape[1:]``; none otherwise), and the noise that was drawn from ``seed`` where ``keep_noise``."""
    draws = eps is not None or seed is not None
    z_shape = (mu.shape if num_samples is None else (num_samples, *mu.shape)) if draws else (0,)
    kl = _empty_reduced(mu, reduction) if with_kl else mu.new_empty((0,), dtype=accumulation_dtype(mu.dtype))
    active_shape = mu.shape[1:] if with_kl and free_bits > 0 else (0,)
    noise = mu.new_empty(z_shape if keep_noise else (0,), dtype=accumulation_dtype(mu.dtype))
    return mu.new_empty(z_shape), kl, mu.new_empty(active_shape, dtype=torch.bool), noise


@_define(
    "latent_backward",
    "(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor? eps, Tensor? seed, "
    "Tensor active, SymInt? num_samples, int reduction, float clamp_min, float clamp_max) "
    "-> (Tensor grad_mu, Tensor grad_logvar, Tensor grad_prior_mu, Tensor grad_prior_logvar)",
)
def latent_backward(grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, eps, seed, active, num_samples, reduction, clamp_min, clamp_max):
    prior = prior_mu is not None
    return _empty_like(mu), _empty_like(mu), _empty_if(prior, mu), _empty_if(prior, mu)


@_define(
    "reconstruction_forward",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? logvar, int likelihood, int reduction, "
    "float grad_scale, bool with_grad) -> (Tensor loss, Tensor grad_input, Tensor grad_logvar)",
)
def reconstruction_forward(input, target, weight, pos_weight, logvar, likelihood, reduction, grad_scale, with_grad):
    """The loss and, where ``with_grad`` (scalar reductions only), ``grad_scale`` times its gradients."""
    with_logvar = with_grad and logvar is not None
    grad_logvar = logvar.new_empty(logvar.shape) if with_logvar else input.new_empty((0,))
    return _empty_reduced(input, reduction), _empty_if(with_grad, input), grad_logvar


@_define(
    "reconstruction_backward",
    "(Tensor grad_output, Tensor input, Tensor target, Tensor? weight, Tensor? pos_weight, Tensor? logvar, int likelihood, "
    "int reduction, bool with_target) -> (Tensor grad_input, Tensor grad_target, Tensor grad_logvar)",
)
def reconstruction_backward(grad_output, input, target, weight, pos_weight, logvar, likelihood, reduction, with_target):
    grad_logvar = input.new_empty((0,)) if logvar is None else logvar.new_empty(logvar.shape)
    return _empty_like(input), _empty_if(with_target, target), grad_logvar


# A gradient that the forward pass wrote for an incoming one of ``expected`` is brought to ``grad_output`` by one of two operators. The
# device compares the numbers, and returns early where they are the same, so that nothing waits for it.
@_define("reconstruction_rescale_", "(Tensor(a!) grad, Tensor grad_output, float expected) -> ()")
def reconstruction_rescale_(grad, grad_output, expected):
    """Multiplies ``grad`` with ``grad_output / expected``."""


@_define(
    "reconstruction_backward_",
    "(Tensor(a!) grad_input, Tensor(b!) grad_logvar, Tensor grad_output, float expected, Tensor input, Tensor target, Tensor? weight, "
    "Tensor? pos_weight, Tensor? logvar, int likelihood, int reduction) -> ()",
)
def reconstruction_backward_(
    grad_input, grad_logvar, grad_output, expected, input, target, weight, pos_weight, logvar, likelihood, reduction
):
    """Computes the gradients again: a product with a 16-bit number would be rounded twice."""


# Mirrored by csrc/common/jacobian_formulas.h and by the constexprs in kernels/.
ACTIVATIONS = {
    "identity": 0,
    "sigmoid": 1,
    "tanh": 2,
    "relu": 3,
    "leaky_relu": 4,
    "elu": 5,
    "softplus": 6,
    "silu": 7,
    "gelu": 8,
    "gelu_tanh": 9,
}


@_define(
    "jacobian_forward",
    "(Tensor hidden, Tensor weight, int activation, float alpha, int reduction, float grad_scale, bool with_grad_hidden, "
    "bool with_grad_weight) -> (Tensor penalty, Tensor squared_norms, Tensor grad_hidden, Tensor grad_weight)",
)
def jacobian_forward(hidden, weight, activation, alpha, reduction, grad_scale, with_grad_hidden, with_grad_weight):
    """The contractive penalty, the squared norms of the weight's rows and, where asked for (scalar reductions only), ``grad_scale`` times
    the gradients."""
    norms = hidden.new_empty(weight.shape[:1], dtype=accumulation_dtype(hidden.dtype))
    return _empty_reduced(hidden, reduction), norms, _empty_if(with_grad_hidden, hidden), _empty_if(with_grad_weight, weight)


@_define(
    "jacobian_backward",
    "(Tensor grad_output, Tensor hidden, Tensor weight, Tensor squared_norms, int activation, float alpha, int reduction, "
    "bool with_grad_hidden, bool with_grad_weight) -> (Tensor grad_hidden, Tensor grad_weight)",
)
def jacobian_backward(grad_output, hidden, weight, squared_norms, activation, alpha, reduction, with_grad_hidden, with_grad_weight):
    return _empty_if(with_grad_hidden, hidden), _empty_if(with_grad_weight, weight)


@_define(
    "jacobian_gram",
    "(Tensor left, Tensor inner, Tensor outer, Tensor gram, Tensor? weights, bool with_grad) "
    "-> (Tensor norms, Tensor grad_left, Tensor grad_inner, Tensor grad_outer, Tensor grad_gram)",
)
def jacobian_gram(left, inner, outer, gram, weights, with_grad):
    """For each sample <S, S ``gram``> with S = ``outer left inner``, see ``jacobian_gram_scale``, and where ``with_grad`` the gradients of
    those norms' sum, each norm times its weight where there are ``weights``; ``gram`` is symmetric, all are in the accumulation dtype."""
    return outer.new_empty(outer.shape[:1]), *(_empty_if(with_grad, t) for t in (left, inner, outer, gram))


# What jacobian_gram is made of where a backend leaves the products to torch.
@_define("jacobian_gram_scale", "(Tensor left, Tensor inner, Tensor outer) -> Tensor")
def jacobian_gram_scale(left, inner, outer):
    """``outer[b, r] left[(b,) r, k] inner[b, k]`` as the rows (b, r) of a matrix; all in the accumulation dtype."""
    return left.new_empty((outer.shape[0] * outer.shape[1], inner.shape[1]))


@_define(
    "jacobian_gram_reduce",
    "(Tensor left, Tensor inner, Tensor outer, Tensor product, bool with_grad) -> (Tensor dots, Tensor grad_inner, Tensor grad_left)",
)
def jacobian_gram_reduce(left, inner, outer, product, with_grad):
    """The scaled matrix ``outer left inner`` against ``product``, which has its shape, contracted over k, over r, and over b (not over b
    where ``left`` has a batch dimension), the factor that the result stands for left out: (dots, grad_inner, grad_left)."""
    return outer.new_empty(outer.shape), _empty_if(with_grad, inner), _empty_if(with_grad, left)


def channels_are_last(tensor: Tensor) -> bool:
    """Whether the channels (dimension 1) lie side by side and the rest is dense: ``torch.channels_last``, in any number of dimensions."""
    return not tensor.is_contiguous() and tensor.movedim(1, -1).is_contiguous()


def empty_in_layout(like: Tensor) -> Tensor:
    """An empty tensor with the channels last where those of ``like`` are, contiguous otherwise."""
    if channels_are_last(like):
        return like.new_empty(like.movedim(1, -1).shape).movedim(-1, 1)
    return like.new_empty(like.shape)


@_define(
    "group_norm_forward",
    "(Tensor input, SymInt num_groups, Tensor? weight, Tensor? bias, float eps, int activation) "
    "-> (Tensor output, Tensor mean, Tensor rstd)",
)
def group_norm_forward(input, num_groups, weight, bias, eps, activation):
    """The output in the memory layout of ``input``, and mean and 1 / standard deviation of each sample's groups, ``(batch, num_groups)``.

    Those are of :func:`widest_dtype`: float32 does not hold a large mean to within a small standard deviation.
    """
    mean, rstd = (input.new_empty((input.shape[0], num_groups), dtype=widest_dtype(input.device)) for _ in range(2))
    return empty_in_layout(input), mean, rstd


@_define(
    "group_norm_backward",
    "(Tensor grad_output, Tensor input, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, SymInt num_groups, int activation) "
    "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
)
def group_norm_backward(grad_output, input, mean, rstd, weight, bias, num_groups, activation):
    grads = (input.new_empty((0,)) if t is None else t.new_empty(t.shape) for t in (weight, bias))
    return empty_in_layout(input), *grads


@_define("codebook_nearest", "(Tensor x, Tensor codebook, bool with_distance) -> (Tensor indices, Tensor distance)")
def codebook_nearest(x, codebook, with_distance):
    """For ``x`` (heads, rows, dim) and ``codebook`` (heads, codes, dim): int64 indices (heads, rows) and, where ``with_distance``, the
    squared distances in the accumulation dtype."""
    distance = x.new_empty(x.shape[:2] if with_distance else (0,), dtype=accumulation_dtype(x.dtype))
    return x.new_empty(x.shape[:2], dtype=torch.int64), distance


@_define(
    "codebook_quantize",
    "(Tensor x, Tensor codebook, SymInt batch, int reduction, float loss_weight) -> (Tensor quantized, Tensor indices, Tensor loss)",
)
def codebook_quantize(x, codebook, batch, reduction, loss_weight):
    """The codes nearest to the rows of ``x`` in its dtype, their indices, and ``loss_weight`` times the reduced squared errors.

    ``batch`` samples share the rows of each head evenly; the loss is of ``x``'s shape for "none", (batch,) for "sample", else 0-dim."""
    dtype = x.dtype if reduction == REDUCTIONS["none"] else accumulation_dtype(x.dtype)
    shape = x.shape if reduction == REDUCTIONS["none"] else (batch,) if reduction == REDUCTIONS["sample"] else ()
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.int64), x.new_empty(shape, dtype=dtype)


@_define(
    "codebook_quantize_backward",
    "(Tensor? grad_quantized, Tensor? grad_loss, Tensor x, Tensor codebook, Tensor indices, SymInt batch, int reduction, "
    "float codebook_cost, float commitment_cost, bool rotation, bool with_codebook) -> (Tensor grad_x, Tensor grad_codebook)",
)
def codebook_quantize_backward(
    grad_quantized, grad_loss, x, codebook, indices, batch, reduction, codebook_cost, commitment_cost, rotation, with_codebook
):
    return x.new_empty(x.shape), _empty_if(with_codebook, codebook)


@_define("codebook_sums", "(Tensor x, Tensor indices, SymInt codes) -> (Tensor counts, Tensor sums)")
def codebook_sums(x, indices, codes):
    """How many rows of ``x`` (heads, rows, dim) fell on each code (int64) and their sums in the accumulation dtype, added in row order.

    A negative index leaves its row out, and so does a row with NaN or infinite values."""
    counts = x.new_empty((x.shape[0], codes), dtype=torch.int64)
    return counts, x.new_empty((x.shape[0], codes, x.shape[2]), dtype=accumulation_dtype(x.dtype))


@_define(
    "codebook_ema_",
    "(Tensor(a!) codebook, Tensor(b!) ema_count, Tensor(c!) ema_sum, Tensor counts, Tensor sums, float decay, float eps) -> ()",
)
def codebook_ema_(codebook, ema_count, ema_sum, counts, sums, decay, eps):
    """One step of the exponential moving averages, and the codebook as their quotient."""
