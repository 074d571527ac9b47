"""For models of pythae, which need not be installed."""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastvae import functional as FV
from fastvae._torch_private import is_fake
from fastvae._types import Reduction
from fastvae.functional.codebook import codebook_ema_step_, codebook_sums
from fastvae.nn._forward_code import NotUnderstood, rewritten
from fastvae.ops._autograd import transformed


def patch_pythae(model: nn.Module, *, report: Callable[[str], None] | None = None) -> nn.Module:
    """Lets the losses and quantizers of a model of pythae run on this package's operators, in place.

    Replaced in a ``loss_function`` of pythae are squared errors and binary cross-entropies summed over each sample, and the KL divergence
    of a Gaussian posterior from the standard normal in closed form. Each becomes one operator, wherever it stands: in ``VAE``, ``BetaVAE``
    and ``DisentangledBetaVAE`` that is the whole loss; in the models with other terms (``BetaTCVAE``, ``FactorVAE``, ``INFOVAE_MMD``,
    ``VAMP``, ``IWAE``, ``WAE_MMD`` and so on) those stay. The code around them is pythae's, as read from its source. ``Quantizer`` and
    ``QuantizerEMA`` search their codes without the matrix of all distances, and move them by the same averages.

    Results, signatures and the ``state_dict`` are the same, noise included: samples are drawn by torch as before. What is no float32 or
    float64, for example under autocast, is computed by pythae's own expression. The fused losses have no second derivative. On a GPU a
    cross-entropy is not asserted to be of numbers in [0, 1]; on the CPU others raise torch's error as before.

    A module stays the same object with its parameters, buffers and hooks, and its class becomes a subclass of the same name. A
    ``loss_function`` or quantizer of one's own is left alone.

    Args:
        model: a model of pythae, or a module that holds one; it is changed. Patching it again changes nothing.
        report: called with one line for each ``loss_function``, for each sampling and for each quantizer, what runs on which operator or
            why nothing does; silent by default.

    Returns:
        ``model``.

    Raises:
        ValueError: where ``model`` holds no model of pythae.
    """
    found = [(name, each) for name, each in model.named_modules() if _is_of_pythae(each, "BaseAE") or _is_quantizer(each)]
    if not found:
        raise ValueError(f"model: got a {type(model).__name__}, takes a model of pythae or a module that holds one")
    for name, module in found:
        for line in _patch_quantizer(name, module) if _is_quantizer(module) else _patch_model(name, module):
            if report is not None:
                report(line)
    return model


def _is_of_pythae(module: nn.Module, *names: str) -> bool:
    return any(cls.__name__ in names and cls.__module__.startswith("pythae.models.") for cls in type(module).__mro__)


def _is_quantizer(module: nn.Module) -> bool:
    return _is_of_pythae(module, *_QUANTIZERS, "HierarchicalResidualQuantizer")


def _replace(module: nn.Module, method: str, source: str, **functions: Callable) -> None:
    module.__class__ = rewritten(type(module), source, tuple(functions.items()), method)


def _line(name: str, part: str, operators: str | None, reason: str) -> str:
    place = f"{name}.{part}".strip(".")
    return f"left {place}: {reason}" if operators is None else f"{place} runs on {operators}{reason}"


# Losses


def _mse_per_sample(input: Tensor, target: Tensor) -> Tensor:
    """Squared errors summed over the last dimension."""
    if not _is_served(input, target):
        return F.mse_loss(input, target, reduction="none").sum(dim=-1)
    return _sum_rows(FV.mse_loss, input, target)


def _bce_per_sample(input: Tensor, target: Tensor) -> Tensor:
    """The binary cross-entropy of probabilities, summed over the last dimension."""
    if not _is_served(input, target) or _has_outside(input) or _has_outside(target):
        return F.binary_cross_entropy(input, target, reduction="none").sum(dim=-1)
    return _sum_rows(FV.binary_cross_entropy, input, target)


def _kl_per_sample(mu: Tensor, log_var: Tensor) -> Tensor:
    """The KL from the standard normal, summed over the last dimension."""
    if not _is_served(mu, log_var):
        return -0.5 * torch.sum(1 + log_var - mu.pow(2) - log_var.exp(), dim=-1)
    return _sum_rows(FV.kl_normal, mu, log_var, logvar_clamp=None)


def _sum_rows(operator: Callable[..., Tensor], first: Tensor, second: Tensor, **options: Any) -> Tensor:
    return operator(first.flatten(0, -2), second.flatten(0, -2), reduction="sample", **options).view(first.shape[:-1])


def _is_served(first: Tensor, second: Tensor) -> bool:
    """Whether the operators give the dtype and shape of pythae's expressions."""
    same = first.dtype == second.dtype and first.shape == second.shape and first.device == second.device
    return same and first.dtype in (torch.float32, torch.float64) and first.ndim >= 2


def _has_outside(probabilities: Tensor) -> bool:
    """Whether torch raises for them: it looks at values on the CPU alone, and so does this, where there are values to look at."""
    looks = probabilities.device.type == "cpu" and not (torch.compiler.is_compiling() or transformed() or is_fake(probabilities))
    if not looks or probabilities.numel() == 0:
        return False
    low, high = probabilities.detach().aminmax()
    return not bool((low >= 0) & (high <= 1))


# Each expression that is replaced, in which capitals stand for any expression, and the function above that takes its place.
_TERMS = {
    "mse_loss": ("F.mse_loss(INPUT, TARGET, reduction='none').sum(dim=-1)", _mse_per_sample, ("INPUT", "TARGET")),
    "binary_cross_entropy": (
        "F.binary_cross_entropy(INPUT, TARGET, reduction='none').sum(dim=-1)",
        _bce_per_sample,
        ("INPUT", "TARGET"),
    ),
    "kl_normal": ("-0.5 * torch.sum(1 + LOGVAR - MU.pow(2) - LOGVAR.exp(), dim=-1)", _kl_per_sample, ("MU", "LOGVAR")),
}
_FUNCTIONS = {function.__name__: function for _, function, _ in _TERMS.values()}


def _matches(pattern: Any, node: Any, found: dict[str, ast.expr]) -> bool:
    """Whether ``node`` is what ``pattern`` says; ``found`` gets the expressions that stand for its capitals."""
    if isinstance(pattern, ast.Name) and pattern.id.isupper() and pattern.id != "F":
        return ast.dump(found.setdefault(pattern.id, node)) == ast.dump(node)
    if isinstance(pattern, list):
        same_length = isinstance(node, list) and len(node) == len(pattern)
        return same_length and all(_matches(each, other, found) for each, other in zip(pattern, node, strict=True))
    if isinstance(pattern, ast.AST):
        return type(node) is type(pattern) and all(
            _matches(value, getattr(node, field), found) for field, value in ast.iter_fields(pattern)
        )
    return pattern == node


class _FuseTerms(ast.NodeTransformer):
    """Puts a call of one function in the place of each expression of :data:`_TERMS`."""

    def __init__(self) -> None:
        self.operators: set[str] = set()

    def visit(self, node: ast.AST) -> ast.AST:
        node = super().visit(node)
        for operator, (pattern, function, arguments) in _TERMS.items():
            found: dict[str, ast.expr] = {}
            if isinstance(node, ast.expr) and _matches(ast.parse(pattern, mode="eval").body, node, found):
                self.operators.add(operator)
                return ast.Call(ast.Name(function.__name__, ast.Load()), [found[name] for name in arguments], [])
        return node


def _patch_model(name: str, model: nn.Module) -> Iterator[str]:
    method: Any = getattr(type(model), "loss_function", None)
    if method is None or _is_patched(method):
        return
    try:
        if "loss_function" in vars(model) or not (method.__module__ or "").startswith("pythae."):
            raise NotUnderstood("it is not pythae's")
        source, operators, others = _fused(method)
    except NotUnderstood as reason:
        yield _line(name, "loss_function", None, str(reason))
    else:
        _replace(model, "loss_function", source, **_FUNCTIONS)
        rest = f"; no operator for {', '.join(others)}" if others else ""
        yield _line(name, "loss_function", ", ".join(operators), rest)
    if _is_of_pythae(model, "VAE"):
        yield _line(name, "_sample_gauss", None, "it takes standard deviations, and reparameterize log variances")


def _is_patched(method: Any) -> bool:
    return method.__globals__.get(_kl_per_sample.__name__) is _kl_per_sample


def _code(method: Any) -> ast.FunctionDef:
    """The code of a method, whose ``F`` and ``torch`` are torch's."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise NotUnderstood("its code cannot be read") from error
    if not isinstance(function, ast.FunctionDef) or function.decorator_list or method.__closure__:
        raise NotUnderstood("it is not a plain function")
    if method.__globals__.get("F", F) is not F or method.__globals__.get("torch", torch) is not torch:
        raise NotUnderstood("its F or torch is not torch's")
    return function


def _fused(method: Callable) -> tuple[str, list[str], list[str]]:
    """The source of a ``loss_function`` with its terms replaced, the operators they run on, and what it calls besides."""
    function, fuse = _code(method), _FuseTerms()
    fuse.visit(function)
    if not fuse.operators:
        raise NotUnderstood("it has no sum of squared errors, no cross-entropy and no KL in closed form")
    calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
    others = sorted(call for call in calls if call.startswith(("F.", "torch.", "self.")))
    return ast.unparse(ast.fix_missing_locations(function)), sorted(fuse.operators), others


# Quantizers

_EPS = 1e-5


def _quantize(quantizer: Any, z: Tensor, uses_ddp: bool, reduction: Reduction) -> dict[str, Tensor]:
    """The fields of the output of a ``Quantizer``."""
    costs = {"commitment_cost": quantizer.commitment_loss_factor, "codebook_cost": quantizer.quantization_loss_factor}
    rows = z.reshape(-1, quantizer.embedding_dim)
    return _fields(z, FV.vector_quantize(rows, quantizer.embeddings.weight, reduction=reduction, **costs))


def _quantize_and_learn(quantizer: Any, z: Tensor, uses_ddp: bool, reduction: Reduction) -> dict[str, Tensor]:
    """The fields of the output of a ``QuantizerEMA``, whose codebook learns in training mode."""
    # The codebook changes before the backward pass.
    codebook = quantizer.embeddings.clone() if quantizer.training else quantizer.embeddings
    costs = {"commitment_cost": quantizer.commitment_loss_factor, "codebook_cost": 0.0}
    rows = z.reshape(-1, quantizer.embedding_dim)
    result = FV.vector_quantize(rows, codebook, reduction=reduction, **costs)
    if quantizer.training:
        _learn(quantizer, rows.detach(), result.indices, uses_ddp)
    return _fields(z, result)


def _fields(z: Tensor, result: FV.VQ) -> dict[str, Tensor]:
    # The code itself differs from this sum, which pythae returns, by its rounding and its memory layout.
    quantized = z + (result.quantized.view(z.shape) - z).detach()
    indices = result.indices.view(z.shape[:-1]).unsqueeze(1)
    return {"quantized_vector": quantized.permute(0, 3, 1, 2), "quantized_indices": indices, "loss": result.loss}


@torch.no_grad()
def _learn(quantizer: Any, rows: Tensor, indices: Tensor, uses_ddp: bool) -> None:
    counts, sums = codebook_sums(rows, indices, quantizer.embeddings)
    if uses_ddp:
        distributed.all_reduce(counts)
        distributed.all_reduce(sums)
    size = quantizer.cluster_size.clone()
    codebook_ema_step_(quantizer.embeddings, size, quantizer.ema_embed, counts, sums, decay=quantizer.decay, eps=_EPS)
    # pythae keeps the smoothed counts, of which the next step takes the average.
    total = size.sum()
    quantizer.cluster_size = (size + _EPS) / (total + quantizer.num_embeddings * _EPS) * total


# By the class of pythae, what its forward computes, and by which operators.
_QUANTIZERS = {
    "Quantizer": (_quantize, "vector_quantize"),
    "QuantizerEMA": (_quantize_and_learn, "vector_quantize, codebook_ema_update_"),
}

# The code of a patched quantizer, among the names of its module.
_FORWARD = """
def forward(self, z, uses_ddp=False):
    return ModelOutput(**quantize(self, z, uses_ddp, {reduction!r}))
"""


def _patch_quantizer(name: str, quantizer: nn.Module) -> Iterator[str]:
    name = name or type(quantizer).__name__
    forward: Any = type(quantizer).forward
    if forward.__globals__.get("quantize") in (_quantize, _quantize_and_learn):
        return
    try:
        function, operators = _QUANTIZERS.get(forward.__qualname__.split(".")[0], (None, None))
        if function is None or "forward" in vars(quantizer) or not (forward.__module__ or "").startswith("pythae."):
            raise NotUnderstood("its forward is that of neither Quantizer nor QuantizerEMA")
        reduction = _reduction(forward)
    except NotUnderstood as reason:
        yield _line(name, "", None, str(reason))
    else:
        _replace(quantizer, "forward", _FORWARD.format(reduction=reduction), quantize=function)
        yield _line(name, "", operators, "")


def _reduction(forward: Any) -> str:
    """How a quantizer reduces its losses: release 0.1.2 takes means over elements, and the code after it sums."""
    calls = (node for node in ast.walk(_code(forward)) if isinstance(node, ast.Call) and ast.unparse(node.func) == "F.mse_loss")
    found = {ast.literal_eval(keyword.value) for call in calls for keyword in call.keywords if keyword.arg == "reduction"}
    if found not in ({"sum"}, {"mean"}):
        raise NotUnderstood("its losses are neither all sums nor all means")
    return found.pop()
