"""For models with quantizers of vector-quantize-pytorch, which need not be installed."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType

from torch import nn

# The parameters of the library's functions that the fused forward pass calls, or stands in for.
_SIGNATURES = {
    "VectorQuantize.forward": (
        "self x indices mask lens topk sample_codebook_temp freeze_codebook return_loss_breakdown codebook_transform_fn ema_update_weight "
        "accum_ema_update ema_update"
    ),
    "VectorQuantize.maybe_split_heads_from_input": "self x",
    "VectorQuantize.update_indices": "self x indices mask",
    "Codebook.forward": (
        "self x sample_codebook_temp mask freeze_codebook codebook_transform_fn ema_update_weight accum_ema_update ema_update topk "
        "update_usage"
    ),
    "Codebook.init_embed_": "self data mask",
    "Codebook.update_codebook": "self flatten embed_onehot mask ema_update_weight accum_ema_update ema_update",
    "Codebook.track_cluster_size_and_embed_avg": "self flatten embed_onehot mask ema_update_weight accum_ema_update",
    "gumbel_sample": "logits temperature stochastic straight_through dim training topk",
    "kmeans": "samples num_clusters num_iters use_cosine_sim sample_fn all_reduce_fn",
    "lens_to_mask": "lens max_length",
    "orthogonal_loss_fn": "t",
    "LossBreakdown": "commitment codebook_diversity orthogonal_reg inplace_optimize",
}
# The fused forward pass reads these attributes of a quantizer and of its codebook.
_ATTRIBUTES = (
    "_codebook accept_3d_fmap accept_image_fmap channel_last commitment_use_cross_entropy_loss commitment_weight directional_reparam "
    "freeze_codebook has_codebook_diversity_loss has_codebook_orthogonal_loss has_commitment_loss heads in_place_codebook_optimizer "
    "learnable_codebook orthogonal_reg_active_codes_only orthogonal_reg_max_codes orthogonal_reg_weight project_in project_out "
    "return_zeros_for_masked_padding rotation_trick route_gradients_to_input sync_update_v use_cosine_sim zero"
)
_CODEBOOK_ATTRIBUTES = "affine_param embed gumbel_sample initted learnable_codebook num_codebooks transform_input use_cosine_sim vq_bridge"


def patch_vector_quantize(module: nn.Module, *, report: Callable[[str], None] | None = None) -> nn.Module:
    """Lets the quantizers of vector-quantize-pytorch in a module search, gather, learn and compute gradient and loss by this package's
    operators, in place: ``VectorQuantize``, alone or in ``ResidualVQ``, ``GroupedResidualVQ``, ``HierarchicalVQ`` and their like.

    Each becomes one of a subclass with another ``forward``. Its signature and results, parameters, buffers, the names in the ``state_dict``
    and the random numbers that k-means and revival draw are those of the original. Quantized vectors and losses are equal to float32
    rounding, and indices where no two codes are equally near to within rounding. Options that need the matrix of all distances, or other
    codes for each vector, keep the original code; so do single calls with such arguments: ``indices``, ``topk``, ``codebook_transform_fn``.
    docs/vector_quantization.md lists both.

    Args:
        module: any module; it is changed. Patching it again changes nothing.
        report: called with one line for each quantizer, which has the reason where it is left alone; silent by default.

    Returns:
        ``module``.

    Raises:
        ModuleNotFoundError: where vector-quantize-pytorch is not installed.
        ValueError: where ``module`` holds no ``VectorQuantize`` of it.
    """
    library = _library()
    quantizers = {name: each for name, each in module.named_modules() if isinstance(each, library.VectorQuantize)}
    if not quantizers:
        raise ValueError(f"module: got a {type(module).__name__} without a VectorQuantize of vector-quantize-pytorch, takes one with it")
    reasons = dict(_per_call_obstacles(module))
    for name, quantizer in quantizers.items():
        reason = _obstacle(quantizer, library) or reasons.get(quantizer)
        if reason is None:
            quantizer.__class__ = _patched_class()
        if report is not None:
            shown = name or type(quantizer).__name__
            report(f"patched {shown}" if reason is None else f"left {shown}: {reason}")
    return module


def _library() -> ModuleType:
    try:
        return importlib.import_module("vector_quantize_pytorch.vector_quantize_pytorch")
    except ModuleNotFoundError as error:
        missing = f"patch_vector_quantize() needs vector-quantize-pytorch, whose {error.name} is not installed"
        raise ModuleNotFoundError(missing, name=error.name) from error


def _patched_class() -> type[nn.Module]:
    from fastvae.compat._vector_quantize import VectorQuantize

    return VectorQuantize


def _obstacle(quantizer: nn.Module, library: ModuleType) -> str | None:
    """Why a quantizer keeps its forward; None where it does not."""
    if reason := _version_obstacle(library):
        return reason
    if type(quantizer) not in (library.VectorQuantize, _patched_class()):
        return f"it is a {type(quantizer).__name__} and not a VectorQuantize"
    if "forward" in vars(quantizer):
        return "it has a forward of its own"
    missing = [name for name in _ATTRIBUTES.split() if not hasattr(quantizer, name)]
    missing = missing or [name for name in _CODEBOOK_ATTRIBUTES.split() if not hasattr(quantizer._codebook, name)]
    if missing:
        return f"it has no {missing[0]}, which that of version 1.32 has"
    from fastvae.compat._vector_quantize import option_obstacle

    return option_obstacle(quantizer)


def _version_obstacle(library: ModuleType) -> str | None:
    """Why the installed version is not one that the fused forward pass knows."""
    for path, parameters in _SIGNATURES.items():
        found: object = library
        for name in path.split("."):
            found = getattr(found, name, None)
        if not callable(found) or list(inspect.signature(found).parameters) != parameters.split():
            return f"this version of vector-quantize-pytorch has another {path} than 1.32"
    return None


def _per_call_obstacles(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The quantizers whose ResidualVQ asks each of their calls for what needs the original's code, with the reason."""
    from vector_quantize_pytorch import ResidualVQ

    for each in module.modules():
        if not isinstance(each, ResidualVQ):
            continue
        layers = list(each.layers)
        if getattr(each, "implicit_neural_codebook", False):
            yield from ((layer, "a network makes its codes for each vector (implicit_neural_codebook)") for layer in layers[1:])
        if (getattr(each, "beam_size", None) or 1) > 1:
            yield from ((layer, "beam search takes several codes of each vector (beam_size)") for layer in layers)
