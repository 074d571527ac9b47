"""Calls of every family's public functions, forward and backward, for tests that ask the same of all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from _helpers import Place, Source, lay_out, places
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._backend import ON_EVERY_DEVICE


@dataclass(frozen=True)
class Call:
    """``function(**tensors)`` for the tensors of ``make(source, rows)``; an int64 ``seed`` among them decides what is drawn.

    Args:
        operators: what it needs of a backend.
        leaves: the tensors whose gradients are taken.
        workspace: bytes of memory, for a byte of its tensors, that a backend may use beside what it returns.
        by_library: whether torch's matrix product takes part, the order of whose sums is not ours.
    """

    name: str
    operators: tuple[str, ...]
    make: Callable[[Source, int], dict[str, Tensor]]
    function: Callable[..., tuple[Tensor, ...]]
    leaves: tuple[str, ...] = ()
    workspace: float = 0.05
    by_library: bool = False

    def tensors(self, device: str, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Those that gradients are taken of are leaves."""
        made = self.make(Source(device, dtype, seed), rows)
        return {name: tensor.requires_grad_(name in self.leaves) for name, tensor in made.items()}

    def results(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs and the gradients, which flow in as numbers that differ from element to element."""
        outputs = self.function(**tensors)
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        if self.leaves:
            differentiable = [output for output in outputs if output.requires_grad]
            incoming = [incoming_gradient(output) for output in differentiable]
            gradients = torch.autograd.grad(differentiable, [tensors[name] for name in self.leaves], incoming)
            results |= {f"gradient of {name}": gradient for name, gradient in zip(self.leaves, gradients, strict=True)}
        return results

    def __str__(self) -> str:
        return self.name


def incoming_gradient(output: Tensor) -> Tensor:
    """1 for a scalar, so that a gradient that the forward pass wrote serves; else eighths, exact in every dtype."""
    if output.ndim == 0:
        return torch.ones_like(output)
    numbers = torch.arange(output.numel(), dtype=torch.int32, device=output.device)
    return numbers.remainder_(15).sub_(7).to(output.dtype).div_(8).view(output.shape)


def seed_of(source: Source) -> Tensor:
    return torch.randint(2**40, (), generator=source.generator).to(source.device)


def posterior(source, rows):
    return {"mu": source.normal(rows, 20), "logvar": source.normal(rows, 20)}


def drawn_posterior(source, rows):
    return {**posterior(source, rows), "seed": seed_of(source)}


def posterior_and_prior(source, rows):
    return {**drawn_posterior(source, rows), "prior_mu": source.normal(20), "prior_logvar": source.normal(20)}


def logits_and_image(source, rows):
    return {"input": source.normal(rows, 37), "target": source.image(rows, 37)}


def probabilities(source, rows):
    return {"input": source.uniform(rows, 37), "target": source.uniform(rows, 37)}


def prediction(source, rows):
    return {"input": source.normal(rows, 37), "target": source.normal(rows, 37), "logvar": source.normal(1)}


def feature_map(source, rows, size, layout):
    return {"input": lay_out(source.normal(rows, 16, size, size), layout), "weight": source.normal(16), "bias": source.normal(16)}


def layer(source, rows):
    return {"hidden": source.uniform(rows, 33), "weight": source.normal(33, 50)}


def encoder(source, rows):
    return {"x": source.normal(rows, 30), "lower": source.normal(24, 30), "upper": source.normal(10, 24)}


def vectors(source, rows):
    return {"x": source.normal(rows, 16), "codebook": source.normal(100, 16)}


def vectors_and_averages(source, rows):
    indices = torch.randint(100, (rows,), generator=source.generator).to(source.device)
    return {**vectors(source, rows), "indices": indices, "ema_count": source.uniform(100), "ema_sum": source.normal(100, 16)}


class _Penalised(nn.Module):
    """The Jacobian's norm of a small encoder, as a module: ``functional_call`` gives it its weights."""

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(30, 24, bias=False, device="meta"), nn.Tanh(), nn.Linear(24, 10, bias=False, device="meta"))
        self.encoder = nn.Sequential(*layers)

    def forward(self, x):
        return FV.jacobian_frobenius(self.encoder, x, method="gram", reduction="sample")


def gram(x, lower, upper):
    weights = {"encoder.0.weight": lower, "encoder.2.weight": upper}
    return (torch.func.functional_call(_Penalised(), weights, (x,)),)


def move_codes(x, codebook, indices, ema_count, ema_sum):
    """Of copies: what is given stays as it is."""
    moved = codebook.clone(), ema_count.clone(), ema_sum.clone()
    return FV.codebook_ema_update_(*moved, x, indices), *moved


LATENT, LOSS = ("latent_forward", "latent_backward"), ("reconstruction_forward", "reconstruction_backward")
NORM, PENALTY = ("group_norm_forward", "group_norm_backward"), ("jacobian_forward", "jacobian_backward")
GRAM = ("jacobian_gram", "jacobian_gram_scale", "jacobian_gram_reduce")
QUANTIZE, MOVE = ("codebook_quantize", "codebook_quantize_backward"), ("codebook_sums", "codebook_ema_")

CALLS = (
    Call("sample and KL", LATENT, drawn_posterior, FV.reparameterize_kl, ("mu", "logvar")),
    Call(
        "sample and KL, prior, free bits", LATENT, posterior_and_prior,
        lambda **tensors: FV.reparameterize_kl(**tensors, free_bits=0.4), ("mu", "logvar", "prior_mu", "prior_logvar"), workspace=1.5,
    ),
    Call(
        "several samples", LATENT, drawn_posterior,
        lambda **tensors: (FV.reparameterize(**tensors, num_samples=3),), ("mu", "logvar"),
    ),
    Call("KL by sample", LATENT, posterior, lambda **tensors: (FV.kl_normal(**tensors, reduction="sample"),), ("mu", "logvar")),
    Call("BCE from logits, uint8", LOSS, logits_and_image, lambda **t: (FV.binary_cross_entropy_with_logits(**t),), ("input",)),
    Call("BCE by sample", LOSS, probabilities, lambda **t: (FV.binary_cross_entropy(**t, reduction="sample"),), ("input", "target")),
    Call("MSE elementwise", LOSS, probabilities, lambda **t: (FV.mse_loss(**t, reduction="none"),), ("input",)),
    Call("Gaussian", LOSS, prediction, lambda **t: (FV.gaussian_nll(**t),), ("input", "logvar")),
    Call(
        "GroupNorm and SiLU in pieces", NORM, lambda source, rows: feature_map(source, rows, 32, "contiguous"),
        lambda **t: (FV.group_norm_silu(**t, num_groups=4),), ("input", "weight", "bias"), workspace=0.2,
    ),
    Call(
        "GroupNorm and SiLU, channels last", NORM, lambda source, rows: feature_map(source, rows, 32, "channels_last"),
        lambda **t: (FV.group_norm_silu(**t, num_groups=4),), ("input", "weight", "bias"), workspace=0.2,
    ),
    Call(
        "GroupNorm and SiLU of small groups", NORM, lambda source, rows: feature_map(source, rows, 7, "contiguous"),
        lambda **t: (FV.group_norm_silu(**t, num_groups=4),), ("input", "weight", "bias"), workspace=0.2,
    ),
    Call("contractive penalty", PENALTY, layer, lambda **t: (FV.contractive_penalty(**t),), ("hidden", "weight"), workspace=0.2),
    Call(
        "contractive penalty by sample", PENALTY, layer,
        lambda **t: (FV.contractive_penalty(**t, activation="tanh", reduction="sample"),), ("hidden", "weight"), workspace=0.2,
    ),
    Call("gram", GRAM, encoder, gram, ("x", "lower", "upper"), workspace=10.0, by_library=True),
    Call("nearest codes", ("codebook_nearest",), vectors, lambda **t: FV.vq_nearest(**t, return_distance=True), workspace=1.0),
    Call("vector quantization", QUANTIZE, vectors, lambda **t: FV.vector_quantize(**t), ("x", "codebook"), workspace=1.0),
    Call(
        "vector quantization, rotation", QUANTIZE, vectors,
        lambda **t: FV.vector_quantize(**t, gradient="rotation", reduction="sample"), ("x", "codebook"), workspace=1.0,
    ),
    Call("moving averages of a codebook", MOVE, vectors_and_averages, move_codes, workspace=1.0),
)  # fmt: skip


def calls_on(device: str, compiled: bool = False) -> list[tuple[Call, Place]]:
    """Every call with every backend that serves it on ``device``; those of plain PyTorch are not among the ``compiled``."""
    served = [(call, place) for call in CALLS for place in places(*call.operators) if place.device == device]
    return [(call, place) for call, place in served if not (compiled and place.backend in ON_EVERY_DEVICE)]
