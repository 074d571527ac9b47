"""The table of the public functions: each row calls one with its tensors, forward and backward, for tests that ask the same of all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from _helpers import Place, Source, lay_out, places
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae import models
from fastvae import nn as fnn
from fastvae._backend import ON_EVERY_DEVICE


@dataclass(frozen=True)
class Call:
    """A row: ``fastvae.functional.<public>(**tensors, **options)`` for the tensors of ``make(source, rows)``.

    Args:
        name: the row's name in the tests.
        public: the name of the public function.
        operators: the operators that a call may run, which a backend has to serve.
        make: builds the tensors; an int64 ``seed`` among them decides what is drawn.
        options: the arguments that are not tensors.
        leaves: the tensors whose gradients are taken.
        shared: the tensors that all samples share, such as weights; the others have a value per sample.
        activations: the tensors, and the results ("output 0"), that are in 16 bits under autocast.
        reductions: further values of the argument ``reduction``, one for each shape of the result.
        through: calls the public function where it takes more than tensors, or writes into what it is given.
        module: builds a module that wraps the function, which takes the tensors named ``module_takes``; one row of a function has it.
        is_derivative: False where the gradient is another than the derivative by design.
        workspace: bytes of memory, for a byte of its tensors, that a backend may use beside what it returns.
        by_library: whether torch's matrix product takes part, so that the order of all sums is not ours.
    """

    name: str
    public: str
    operators: tuple[str, ...]
    make: Callable[[Source, int], dict[str, Tensor]]
    options: dict[str, object] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    activations: tuple[str, ...] = ()
    reductions: tuple[str, ...] = ()
    through: Callable[..., object] | None = None
    module: Callable[[], nn.Module] | None = None
    module_takes: tuple[str, ...] = ()
    is_derivative: bool = True
    workspace: float = 0.05
    by_library: bool = False

    def function(self, **arguments) -> tuple[Tensor, ...]:
        """All outputs; an argument among ``arguments`` overrides the row's option of that name."""
        outputs = (self.through or getattr(FV, self.public))(**self.options | arguments)
        return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)

    def tensors(self, device: str, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Those that gradients are taken of are leaves."""
        made = self.make(Source(device, dtype, seed), rows)
        return {name: tensor.requires_grad_(name in self.leaves) for name, tensor in made.items()}

    def results(self, tensors: dict[str, Tensor], factor: float = 1.0, **options) -> dict[str, Tensor]:
        """The outputs and the gradients, which flow in as ``factor`` times numbers that differ from element to element."""
        return self.results_of(self.function(**tensors, **options), tensors, factor)

    def results_of(self, outputs: tuple[Tensor, ...], tensors: dict[str, Tensor], factor: float = 1.0) -> dict[str, Tensor]:
        """:meth:`results` where something else than :meth:`function` gave the outputs, such as its compiled form."""
        results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        differentiable = [output for output in outputs if output.requires_grad]
        if differentiable:
            incoming = [factor * incoming_gradient(output) for output in differentiable]
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
    return {**posterior(source, rows), "prior_mu": source.normal(20), "prior_logvar": source.normal(20)}


def drawn_posterior_and_prior(source, rows):
    return {**posterior_and_prior(source, rows), "seed": seed_of(source)}


def logits_and_image(source, rows):
    return {"input": source.normal(rows, 37), "target": source.image(rows, 37)}


def given_noise(source, rows):
    return {**posterior(source, rows), "eps": source.normal(rows, 20)}


def probabilities(source, rows):
    """The inputs stay inside (0, 1), also where they are rounded to 16 bits."""
    return {"input": source.uniform(rows, 37) * 0.9 + 0.05, "target": source.uniform(rows, 37)}


def prediction(source, rows):
    return {"input": source.normal(rows, 37), "target": source.normal(rows, 37), "logvar": source.normal(1)}


def weighted(source, rows):
    return {
        "input": source.normal(rows, 37),
        "target": source.uniform(rows, 37),
        "weight": source.uniform(37),
        "pos_weight": source.uniform(37),
    }


def prediction_with_variances(source, rows):
    return {name: source.normal(rows, 37) for name in ("input", "target", "logvar")}


def decoded(source, rows):
    return {"recon": source.normal(rows, 37), "target": source.image(rows, 37), **posterior(source, rows)}


def tutorial(source, rows):
    mu, log_var = posterior(source, rows).values()
    return {"x": source.uniform(rows, 37), "x_recon": source.uniform(rows, 37) * 0.9 + 0.05, "mu": mu, "log_var": log_var}


def mixture_and_image(source, rows):
    return {"input": source.normal(rows, 20, 5, 2) * 0.7, "target": source.image(rows, 3, 5, 2)}


def logistic_and_image(source, rows):
    return {"input": source.normal(rows, 2, 21), "target": source.image(rows, 1, 21)}


def feature_map(source, rows, size, layout):
    return {"input": lay_out(source.normal(rows, 16, size, size), layout), "weight": source.normal(16), "bias": source.normal(16)}


def modulated_map(source, rows):
    return {"input": source.normal(rows, 16, 9), "scale": source.normal(rows, 16), "shift": source.normal(rows, 16)}


def waveform(source, rows):
    return {"input": source.normal(rows, 6, 37), "alpha": source.uniform(6) + 0.5, "beta": source.uniform(6) + 0.5}


def convolved_map(source, rows):
    norm = {"norm_weight": source.normal(16), "norm_bias": source.normal(16)}
    return {"input": source.normal(rows, 16, 7, 8), **norm, "weight": source.normal(6, 16, 3, 3) / 12, "bias": source.normal(6)}


def layer(source, rows):
    return {"hidden": source.uniform(rows, 33), "weight": source.normal(33, 50)}


def encoder(source, rows):
    """So wide an input that the Gram form is the cheapest for three samples already."""
    return {"x": source.normal(rows, 60), "lower": source.normal(8, 60), "upper": source.normal(5, 8)}


def vectors(source, rows):
    return {"x": source.normal(rows, 16), "codebook": source.normal(100, 16)}


def vectors_and_codebooks(source, rows):
    return {"x": source.normal(rows, 16), "codebooks": source.normal(3, 50, 16)}


def masked_vectors_and_codebooks(source, rows):
    """Whatever the seed, the first vector counts."""
    mask = source.uniform(rows) < 0.7
    return {**vectors_and_codebooks(source, rows), "mask": mask.index_fill(0, torch.tensor([0], device=mask.device), True)}


def bits(source, rows):
    return {"x": source.normal(rows, 7)}


def bits_and_mask(source, rows):
    """Whatever the seed, the first vector counts."""
    mask = source.uniform(rows) < 0.7
    return {"x": source.normal(rows, 5), "mask": mask.index_fill(0, torch.tensor([0], device=mask.device), True)}


def vectors_and_averages(source, rows):
    indices = torch.randint(100, (rows,), generator=source.generator).to(source.device)
    return {**vectors(source, rows), "indices": indices, "ema_count": source.uniform(100), "ema_sum": source.normal(100, 16)}


class _Weighted(nn.Linear):
    """A layer that is made of its weight: what builds parameters is neither compiled nor mapped."""

    def __init__(self, weight):
        super(nn.Linear, self).__init__()
        self.out_features, self.in_features = weight.shape
        self.weight, self.bias = weight, None


def gram(x, lower, upper, reduction="sample"):
    layers = nn.Sequential(_Weighted(lower), nn.Tanh(), _Weighted(upper))
    return FV.jacobian_frobenius(layers, x, method="gram", reduction=reduction)


def move_codes(codebook, ema_count, ema_sum, x, indices):
    """Copies are moved, so that a test finds its tensors as they were."""
    moved = tuple(tensor.detach().clone() for tensor in (codebook, ema_count, ema_sum))
    return FV.codebook_ema_update_(*moved, x, indices), *moved


LATENT, LOSS = ("latent_forward", "latent_backward"), ("reconstruction_forward", "reconstruction_backward")
MIXTURE = ("logistic_mixture_forward", "logistic_mixture_backward")
NORM, PENALTY = ("group_norm_forward", "group_norm_backward"), ("jacobian_forward", "jacobian_backward")
RMS = ("rms_norm_forward", "rms_norm_backward")
SNAKE = ("snake_forward", "snake_backward")
NORM_TWICE = (*NORM, "group_norm_recompute", "group_norm_restoring_backward")
ENTROPIES = ("binary_code_entropy_forward", "binary_code_entropy_backward")
QUANTIZE, MOVE = ("codebook_quantize", "codebook_quantize_backward"), ("codebook_sums", "codebook_ema_")
RESIDUAL = ("codebook_residual_quantize", "codebook_residual_quantize_backward")

# One reduction for each shape of a result.
SHAPES = ("none", "sample", "mean")
NORMS = {"leaves": ("input", "weight", "bias"), "shared": ("weight", "bias"), "activations": ("input", "output 0"), "workspace": 0.2}

CONVOLVED = {
    "leaves": ("input", "norm_weight", "norm_bias", "weight", "bias"),
    "shared": ("norm_weight", "norm_bias", "weight", "bias"),
    "activations": ("input", "weight", "bias", "output 0"),
    # The input of the convolution, and what the library takes for it.
    "workspace": 8.0,
    "by_library": True,
}

CALLS = (
    Call(
        "sample and KL", "reparameterize_kl", LATENT, drawn_posterior, leaves=("mu", "logvar"), shared=("seed",),
        activations=("mu", "logvar", "output 0"), reductions=SHAPES,
        module=fnn.ReparameterizeKL, module_takes=("mu", "logvar"),
    ),
    Call(
        "sample and KL, prior, free bits", "reparameterize_kl", LATENT, drawn_posterior_and_prior, {"free_bits": 0.4},
        leaves=("mu", "logvar", "prior_mu", "prior_logvar"), shared=("seed", "prior_mu", "prior_logvar"),
        activations=("mu", "logvar", "prior_mu", "prior_logvar", "output 0"), reductions=SHAPES, workspace=1.5,
    ),
    Call(
        "several samples", "reparameterize", LATENT, drawn_posterior, {"num_samples": 3}, leaves=("mu", "logvar"), shared=("seed",),
        activations=("mu", "logvar", "output 0"),
        module=fnn.Reparameterize, module_takes=("mu", "logvar"),
    ),
    Call(
        "sample of given noise", "reparameterize", LATENT, given_noise, leaves=("mu", "logvar", "eps"),
        activations=("mu", "logvar", "eps", "output 0"), workspace=1.5,
    ),
    Call(
        "KL by sample", "kl_normal", LATENT, posterior, {"reduction": "sample"}, leaves=("mu", "logvar"),
        activations=("mu", "logvar"), reductions=SHAPES,
        module=lambda: models.VAE.mlp(20, (8,), 3), module_takes=("mu",),
    ),
    Call(
        "KL from a prior, free bits", "kl_normal", LATENT, posterior_and_prior, {"free_bits": 0.4},
        leaves=("mu", "logvar", "prior_mu", "prior_logvar"), shared=("prior_mu", "prior_logvar"),
        activations=("mu", "logvar", "prior_mu", "prior_logvar"), reductions=SHAPES, workspace=1.5,
    ),
    Call(
        "BCE from logits, uint8", "binary_cross_entropy_with_logits", LOSS, logits_and_image, leaves=("input",),
        activations=("input",), reductions=SHAPES,
        module=fnn.BCEWithLogitsLoss, module_takes=("input", "target"),
    ),
    Call(
        "weighted BCE from logits", "binary_cross_entropy_with_logits", LOSS, weighted, leaves=("input",),
        shared=("weight", "pos_weight"), activations=("input",), reductions=SHAPES,
    ),
    Call(
        "BCE by sample", "binary_cross_entropy", LOSS, probabilities, {"reduction": "sample"}, leaves=("input", "target"),
        activations=("input",), reductions=SHAPES,
        module=fnn.BCELoss, module_takes=("input", "target"),
    ),
    Call(
        "MSE elementwise", "mse_loss", LOSS, probabilities, {"reduction": "none"}, leaves=("input",),
        activations=("input",), reductions=SHAPES,
        module=fnn.MSELoss, module_takes=("input", "target"),
    ),
    Call(
        "Gaussian", "gaussian_nll", LOSS, prediction, leaves=("input", "logvar"), shared=("logvar",),
        activations=("input",), reductions=SHAPES,
        module=lambda: fnn.GaussianNLL(learned=True), module_takes=("input", "target"),
    ),
    Call(
        "Gaussian of learned variances", "gaussian_nll", LOSS, prediction_with_variances, {"reduction": "sample"},
        leaves=("input", "target", "logvar"), activations=("input", "logvar"), reductions=SHAPES,
    ),
    Call(
        "ELBO", "elbo_loss", LATENT + LOSS, decoded, {"beta": 2.0, "capacity": 1.0, "free_bits": 0.1}, leaves=("recon", "mu", "logvar"),
        activations=("recon", "mu", "logvar"), reductions=("sample", "batchmean"), workspace=0.2,
        module=fnn.ELBOLoss, module_takes=("recon", "target", "mu", "logvar"),
    ),
    Call(
        "loss of the tutorial", "vae_loss", LATENT + LOSS, tutorial, leaves=("x_recon", "mu", "log_var"),
        activations=("x_recon", "mu", "log_var"), workspace=0.2,
    ),
    Call(
        "mixture of logistics", "logistic_mixture_nll", MIXTURE, mixture_and_image, {"num_mixtures": 2}, leaves=("input",),
        activations=("input",), reductions=SHAPES,
        module=lambda: fnn.LogisticMixtureNLL(2), module_takes=("input", "target"),
    ),
    Call(
        "one logistic by sample", "logistic_mixture_nll", MIXTURE, logistic_and_image, {"num_mixtures": 1, "reduction": "sample"},
        leaves=("input",), activations=("input",), reductions=SHAPES,
    ),
    Call(
        "GroupNorm and SiLU in pieces", "group_norm_silu", NORM, lambda source, rows: feature_map(source, rows, 32, "contiguous"),
        {"num_groups": 4}, **NORMS,
    ),
    Call(
        "GroupNorm and SiLU, channels last", "group_norm_silu", NORM, lambda source, rows: feature_map(source, rows, 32, "channels_last"),
        {"num_groups": 4}, **NORMS,
    ),
    Call(
        "GroupNorm and SiLU of small groups", "group_norm_silu", NORM, lambda source, rows: feature_map(source, rows, 7, "contiguous"),
        {"num_groups": 4}, **NORMS,
        module=lambda: fnn.GroupNormSiLU(4, 16), module_takes=("input",),
    ),
    Call(
        "GroupNorm alone", "group_norm_silu", NORM, lambda source, rows: {"input": source.normal(rows, 16, 9)},
        {"num_groups": 4, "activation": "none"}, leaves=("input",), activations=("input", "output 0"), workspace=0.2,
    ),
    Call(
        "RMS norm and SiLU", "rms_norm_silu", RMS, lambda source, rows: feature_map(source, rows, 7, "contiguous"), **NORMS,
        module=lambda: fnn.RMSNormSiLU(16), module_takes=("input",),
    ),
    Call(
        "bounded RMS norm, channels last", "rms_norm_silu", RMS, lambda source, rows: feature_map(source, rows, 9, "channels_last"),
        {"eps_mode": "clamp", "eps": 3.9}, **NORMS,
    ),
    Call(
        "modulated RMS norm", "rms_norm_silu", RMS, modulated_map, {"activation": "none"}, leaves=("input", "scale", "shift"),
        activations=("input", "scale", "shift", "output 0"), workspace=1.0,
    ),
    Call(
        "snake", "snake", SNAKE, waveform, leaves=("input", "alpha", "beta"), shared=("alpha", "beta"), activations=("input", "output 0"),
        workspace=1.0, module=lambda: fnn.Snake(6), module_takes=("input",),
    ),
    Call(
        "norm, SiLU and convolution", "norm_act_conv", NORM_TWICE, convolved_map, {"num_groups": 4, "padding": 1}, **CONVOLVED,
        module=lambda: fnn.NormActConv2d(4, 16, 6, 3, padding=1), module_takes=("input",),
    ),
    Call(
        "norm and strided convolution", "norm_act_conv", NORM_TWICE, convolved_map,
        {"num_groups": 2, "activation": "none", "stride": (2, 1), "padding": "valid"}, **CONVOLVED,
    ),
    Call(
        "contractive penalty", "contractive_penalty", PENALTY, layer, leaves=("hidden", "weight"), shared=("weight",),
        activations=("hidden",), reductions=SHAPES, workspace=0.2,
        module=lambda: models.ContractiveAE.mlp(33, (), 5), module_takes=("hidden",),
    ),
    Call(
        "contractive penalty by sample", "contractive_penalty", PENALTY, layer, {"activation": "tanh", "reduction": "sample"},
        leaves=("hidden", "weight"), shared=("weight",), activations=("hidden",), workspace=0.2,
    ),
    Call(
        "gram", "jacobian_frobenius", ("jacobian_gram",), encoder, through=gram, leaves=("x", "lower", "upper"), shared=("lower", "upper"),
        reductions=("sample", "batchmean"), workspace=10.0, by_library=True,
        module=lambda: models.ContractiveAE.mlp(60, (8,), 5), module_takes=("x",),
    ),
    Call(
        "nearest codes", "vq_nearest", ("codebook_nearest",), vectors, {"return_distance": True}, shared=("codebook",),
        activations=("x",), workspace=1.0,
        module=lambda: fnn.VectorQuantizer(8, 16).eval(), module_takes=("x",),
    ),
    Call(
        "vector quantization", "vector_quantize", QUANTIZE, vectors, leaves=("x", "codebook"), shared=("codebook",),
        activations=("x", "output 0"), reductions=SHAPES, is_derivative=False, workspace=1.0,
        module=lambda: fnn.VectorQuantizer(8, 16, update="gradient"), module_takes=("x",),
    ),
    Call(
        "vector quantization, rotation", "vector_quantize", QUANTIZE, vectors, {"gradient": "rotation", "reduction": "sample"},
        leaves=("x", "codebook"), shared=("codebook",), activations=("x", "output 0"), is_derivative=False, workspace=1.0,
    ),
    Call(
        "residual vector quantization", "residual_quantize", RESIDUAL, vectors_and_codebooks, {"codebook_cost": 0.5},
        leaves=("x", "codebooks"), shared=("codebooks",), activations=("x", "output 0"), is_derivative=False, workspace=10.0,
        module=lambda: fnn.ResidualVectorQuantizer(3, 8, 16, update="gradient"), module_takes=("x",),
    ),
    Call(
        "residual vector quantization with a mask", "residual_quantize", RESIDUAL, masked_vectors_and_codebooks,
        leaves=("x",), shared=("codebooks",), activations=("x", "output 0"), is_derivative=False, workspace=10.0,
    ),
    Call(
        "moving averages of a codebook", "codebook_ema_update_", MOVE, vectors_and_averages, through=move_codes,
        shared=("codebook", "ema_count", "ema_sum"), activations=("x",), workspace=1.0,
        module=lambda: fnn.VectorQuantizer(8, 16), module_takes=("x",),
    ),
    Call(
        "entropies of binary codes", "binary_code_entropy", ENTROPIES, bits, {"inv_temperature": 1.5}, leaves=("x",), activations=("x",),
        workspace=20.0, by_library=True,
        module=lambda: fnn.LFQ(dim=7, codebook_size=16), module_takes=("x",),
    ),
    Call(
        "entropies of binary codes with a mask", "binary_code_entropy", ENTROPIES, bits_and_mask, leaves=("x",), activations=("x",),
        workspace=20.0, by_library=True,
    ),
)  # fmt: skip

# The entropies of binary codes are torch's products.
CALLS_OF_KERNELS = tuple(call for call in CALLS if call.operators != ENTROPIES)


def first_of_each_function(calls: Iterable[Call]) -> list[Call]:
    """The first row of each function among ``calls``, for checks that take long."""
    return list({call.public: call for call in reversed(list(calls))}.values())


def calls_on(device: str, compiled: bool = False) -> list[tuple[Call, Place]]:
    """Every call with every backend that serves it on ``device``; those of plain PyTorch are not among the ``compiled``."""
    served = [(call, place) for call in CALLS for place in places(*call.operators) if place.device == device]
    return [(call, place) for call, place in served if not (compiled and place.backend in ON_EVERY_DEVICE)]
