"""The calls of operators that tools/offline_table.py compiles: which kernels they launch, for which dtypes and GPUs."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastvae import ops
from fastvae.kernels import codebook, group_norm, jacobian, latent, logistic_mixture, reconstruction, rms_norm, snake
from fastvae.kernels._launch import Machine
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.jacobian import ACTIVATIONS
from fastvae.ops.reconstruction import LIKELIHOODS
from fastvae.ops.rms_norm import EPS_MODES

# Name: what Triton compiles for, and the multiprocessors of such a GPU (A100, H100 and H200, B200, MI300X).
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), Machine("sm_80", 108)),
    "sm_90": (GPUTarget("cuda", 90, 32), Machine("sm_90", 132)),
    "sm_100": (GPUTarget("cuda", 100, 32), Machine("sm_100", 148)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Machine("gfx942", 304)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Samples of a batch, features of each, draws of each. A tensor of them fills every machine many times over.
BATCH, FEATURES, DRAWS = 4096, 4096, 4
FULL, ODD = (BATCH, FEATURES), (BATCH - 1, FEATURES - 1)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without data: launchers look at shapes, strides and dtypes alone."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Case:
    """``call(dtype)`` calls a launcher; ``kernels`` are what it launches, in their order.

    Variants of a kernel that others stand for are compiled for one target, to see that they compile.
    """

    name: str
    kernels: tuple[str, ...]
    call: Callable[[torch.dtype], object]
    dtypes: tuple[str, ...] = ("float32",)
    targets: tuple[str, ...] = tuple(TARGETS)


def latent_forward(reduction="batchmean", free_bits=0.0, noise="seed", samples=None, layout="contiguous", prior=False, kl=True, shape=FULL):
    def call(dtype):
        mu, logvar = _pair(dtype, layout, shape)
        priors = [empty(shape[1], dtype=dtype).expand(shape)] * 2 if prior else [None, None]
        draws = shape if samples is None else (samples, *shape)
        eps = empty(*draws, dtype=dtype) if noise == "eps" else None
        seed = empty(dtype=torch.int64) if noise == "seed" else None
        limits = -30.0, 20.0
        return latent._forward(
            ops.latent.forward.arguments(mu, logvar, *priors, eps, seed, samples, kl, REDUCTIONS[reduction], free_bits, *limits, False)
        )

    return call


def latent_backward(reduction="batchmean", active=False, noise="seed", samples=None, layout="contiguous", prior=False, kl=True, shape=FULL):
    def call(dtype):
        mu, logvar = _pair(dtype, layout, shape)
        priors = [empty(shape[1], dtype=dtype).expand(shape)] * 2 if prior else [None, None]
        draws = shape if samples is None else (samples, *shape)
        grad_z = empty(*draws, dtype=dtype) if noise else None
        grad_kl = _reduced(dtype, reduction) if kl else None
        eps = empty(*draws, dtype=dtype) if noise == "eps" else None
        seed = empty(dtype=torch.int64) if noise == "seed" else None
        mask = empty(shape[1] if active else 0, dtype=torch.bool)
        limits = -30.0, 20.0
        return latent._backward(
            ops.latent.backward.arguments(grad_z, grad_kl, mu, logvar, *priors, eps, seed, mask, samples, REDUCTIONS[reduction], *limits)
        )

    return call


def _pair(dtype, layout, shape):
    """mu and logvar, each on its own or both as halves of an encoder's output."""
    if layout == "chunks":
        return empty(shape[0], 2 * shape[1], dtype=dtype).chunk(2, 1)
    return empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)


def _reduced(dtype, reduction):
    shape = {"none": (BATCH, FEATURES), "sample": (BATCH,)}.get(reduction, ())
    return empty(*shape, dtype=dtype if reduction == "none" else torch.float32)


def loss_forward(likelihood, reduction="mean", target=None, grad=True, weight=None, pos_weight=None, logvar=None, batch=BATCH):
    def call(dtype):
        input, targets, *shared = _loss_operands(dtype, target, weight, pos_weight, logvar, batch)
        return reconstruction._forward(
            ops.reconstruction.forward.arguments(input, targets, *shared, LIKELIHOODS[likelihood], REDUCTIONS[reduction], 1.0, grad)
        )

    return call


def loss_backward(likelihood, reduction="mean", target=None, target_gradient=False, logvar=None):
    def call(dtype):
        operands = _loss_operands(dtype, target, None, None, logvar, BATCH)
        numbers = LIKELIHOODS[likelihood], REDUCTIONS[reduction], target_gradient
        return reconstruction._backward(ops.reconstruction.backward.arguments(_reduced(dtype, reduction), *operands, *numbers))

    return call


def mixture_forward(reduction="batchmean", target=torch.uint8, grad=True, mixtures=10, channels=3, positions=1024):
    def call(dtype):
        arguments = _mixture_operands(dtype, target, mixtures, channels, positions)
        return logistic_mixture._forward(ops.logistic_mixture.forward.arguments(*arguments, mixtures, REDUCTIONS[reduction], 1.0, grad))

    return call


def mixture_backward(reduction="sample", target=torch.uint8):
    def call(dtype):
        input, image = _mixture_operands(dtype, target, 10, 3, 1024)
        grad_output = empty(*{"none": (BATCH, 1024), "sample": (BATCH,)}[reduction], dtype=dtype if reduction == "none" else torch.float32)
        return logistic_mixture._backward(ops.logistic_mixture.backward.arguments(grad_output, input, image, 10, REDUCTIONS[reduction]))

    return call


def mixture_backward_(dtype):
    operands = _mixture_operands(dtype, torch.uint8, 10, 3, 1024)
    logistic_mixture._backward_(
        ops.logistic_mixture.backward_.arguments(empty(*operands[0].shape, dtype=dtype), empty(), 1.0, *operands, 10, REDUCTIONS["mean"])
    )


def _mixture_operands(dtype, target, mixtures, channels, positions):
    parameters = ops.logistic_mixture.parameters_per_position(mixtures, channels)
    return empty(BATCH, parameters, positions, dtype=dtype), empty(BATCH, channels, positions, dtype=target or dtype)


def _loss_operands(dtype, target, weight, pos_weight, logvar, batch):
    """Rows are split among programs where ``batch`` is 1; a shared operand has the shape given, in the dtype of the input."""
    features = BATCH * FEATURES // batch
    shared = [None if shape is None else empty(*shape, dtype=dtype) for shape in (weight, pos_weight, logvar)]
    return empty(batch, features, dtype=dtype), empty(batch, features, dtype=target or dtype), *shared


def loss_backward_(dtype):
    operands = _loss_operands(dtype, None, None, None, None, BATCH)
    numbers = LIKELIHOODS["bce_with_logits"], REDUCTIONS["mean"]
    return reconstruction._backward_(
        ops.reconstruction.backward_.arguments(
            empty(BATCH, FEATURES, dtype=dtype), empty(0, dtype=dtype), empty(), 1.0, *operands, *numbers
        )
    )


def rescale_(dtype):
    return reconstruction._rescale_(ops.reconstruction.rescale_.arguments(empty(BATCH, FEATURES, dtype=dtype), empty(), 1.0))


def penalty_forward(reduction="batchmean", grads=False, sizes=(BATCH, FEATURES, FEATURES)):
    """``sizes``: samples, units, inputs."""

    def call(dtype):
        hidden, weight = empty(*sizes[:2], dtype=dtype), empty(*sizes[1:], dtype=dtype)
        return jacobian._forward(
            ops.jacobian.forward.arguments(hidden, weight, ACTIVATIONS["sigmoid"].number, 0.0, REDUCTIONS[reduction], 1.0, grads, grads)
        )

    return call


def penalty_backward(reduction="batchmean", activation="sigmoid", weight_gradient=True):
    def call(dtype):
        hidden, weight, norms = empty(*FULL, dtype=dtype), empty(FEATURES, FEATURES, dtype=dtype), empty(FEATURES)
        numbers = ACTIVATIONS[activation].number, 1.0, REDUCTIONS[reduction]
        return jacobian._backward(
            ops.jacobian.backward.arguments(_reduced(dtype, reduction), hidden, weight, norms, *numbers, True, weight_gradient)
        )

    return call


def gram(reduce=False, batched=False, with_grad=True):
    """Matrices of 64 rows and 256 columns, in float32 whatever the dtype of the encoder."""

    def call(dtype):
        left = empty(*(BATCH, 64, 256) if batched else (64, 256))
        inner, outer, product = empty(BATCH, 256), empty(BATCH, 64), empty(BATCH * 64, 256)
        if reduce:
            return jacobian._gram_reduce(ops.jacobian.gram_reduce.arguments(left, inner, outer, product, with_grad))
        return jacobian._gram_scale(ops.jacobian.gram_scale.arguments(left, inner, outer))

    return call


# Inputs of GroupNorm: groups that are read in pieces, small groups and the largest that fit on chip, and an input without positions.
PIECES, WHOLE, HALF, LARGE, FLAT, GROUPS = (16, 256, 64, 64), (256, 512, 8, 16), (64, 512, 16, 32), (64, 512, 32, 32), (256, 65536), 32


def normalise(shape=PIECES, last=False, activation="silu", affine=True):
    def call(dtype):
        parameters = _parameters(shape, dtype, affine)
        return group_norm._forward(
            ops.group_norm.forward.arguments(_image(shape, dtype, last), GROUPS, *parameters, 1e-5, NORM_ACTIVATIONS[activation])
        )

    return call


def normalise_backward(shape=PIECES, last=False, activation="silu", affine=True):
    def call(dtype):
        images = _image(shape, dtype, last), _image(shape, dtype, last)
        statistics = [empty(shape[0], GROUPS, dtype=torch.float64)] * 2
        return group_norm._backward(
            ops.group_norm.backward.arguments(
                *images, *statistics, *_parameters(shape, dtype, affine), GROUPS, NORM_ACTIVATIONS[activation]
            )
        )

    return call


# Inputs of RMS norms: the first feature map of Wan's decoder, a usual one, the most channels on chip in either layout, and more than those.
VIDEO, IMAGE, MOST, MOST_LAST, TILES, TILES_LAST = (
    (4, 96, 17, 60, 104), (8, 512, 64, 64), (8, 1024, 32, 32), (8, 4096, 32, 32), (8, 2048, 32, 32), (8, 8192, 32, 32),
)  # fmt: skip


def rms_normalise(shape=IMAGE, last=False, parameters=("weight", "bias"), eps_mode="add", activation="silu", by_sample=False):
    def call(dtype):
        operands = _image(shape, dtype, last), *_rms_parameters(shape, dtype, parameters, by_sample)
        return rms_norm._forward(ops.rms_norm.forward.arguments(*operands, 1e-6, EPS_MODES[eps_mode], NORM_ACTIVATIONS[activation]))

    return call


def rms_normalise_backward(shape=IMAGE, last=False, parameters=("weight", "bias"), eps_mode="add", activation="silu", by_sample=False):
    def call(dtype):
        images, rrms = (_image(shape, dtype, last), _image(shape, dtype, last)), empty(shape[0], *shape[2:])
        operands = *images, rrms, *_rms_parameters(shape, dtype, parameters, by_sample)
        return rms_norm._backward(ops.rms_norm.backward.arguments(*operands, 1e-6, EPS_MODES[eps_mode], NORM_ACTIVATIONS[activation]))

    return call


def _rms_parameters(shape, dtype, parameters, by_sample):
    sizes = shape[:2] if by_sample else shape[1:2]
    return [empty(*sizes, dtype=dtype) if name in parameters else None for name in ("weight", "bias")]


def _image(shape, dtype, last):
    return empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1) if last else empty(*shape, dtype=dtype)


def _parameters(shape, dtype, affine):
    return [empty(shape[1], dtype=dtype)] * 2 if affine else [None, None]


# Waveforms of an audio autoencoder, where there are many samples and where there are many channels.
WAVES, WIDE_WAVES = (8, 128, 24000), (8, 1024, 3072)


def snake_activation(shape=WAVES, last=False):
    def call(dtype):
        return snake._forward(ops.snake.forward.arguments(_image(shape, dtype, last), empty(shape[1]), empty(shape[1])))

    return call


def snake_gradients(shape=WAVES, last=False):
    def call(dtype):
        images = _image(shape, dtype, last), _image(shape, dtype, last)
        return snake._backward(ops.snake.backward.arguments(*images, empty(shape[1]), empty(shape[1])))

    return call


# Vectors of a codebook's training step, and codes.
VECTORS, CODES = 1 << 16, 1024


def nearest_code(dim, vectors=VECTORS, codes=CODES):
    def call(dtype):
        return codebook._nearest(ops.codebook.nearest.arguments(empty(1, vectors, dim, dtype=dtype), empty(1, codes, dim), False))

    return call


def quantize(reduction="mean", dim=64):
    def call(dtype):
        return codebook._quantize(
            ops.codebook.quantize.arguments(empty(1, VECTORS, dim, dtype=dtype), empty(1, CODES, dim), 64, REDUCTIONS[reduction], 1.25)
        )

    return call


def quantize_backward(reduction="mean", rotation=False, dim=64):
    def call(dtype):
        x, codes, indices = empty(1, VECTORS, dim, dtype=dtype), empty(1, CODES, dim), empty(1, VECTORS, dtype=torch.int64)
        grad_loss = empty(*{"none": x.shape, "sample": (64,)}.get(reduction, ()), dtype=dtype if reduction == "none" else torch.float32)
        return codebook._backward(
            ops.codebook.quantize_backward.arguments(x, grad_loss, x, codes, indices, 64, REDUCTIONS[reduction], 1.0, 0.25, rotation, True)
        )

    return call


def moving_averages(dtype):
    """From the vectors on; the state is float32 in any case."""
    codes = empty(1, CODES, 64)
    counts, sums = codebook._sums(
        ops.codebook.sums.arguments(empty(1, VECTORS, 64, dtype=dtype), empty(1, VECTORS, dtype=torch.int64), CODES)
    )
    return codebook._ema_(ops.codebook.ema_.arguments(codes, empty(1, CODES), codes, counts, sums, 0.99, 1e-5))


ALL, BRIEF, ONE = tuple(DTYPES), ("float32", "bfloat16"), ("sm_90",)
FORWARD, ROWS, COLUMNS, BACKWARD = (f"latent_{part}_kernel" for part in ("forward", "rows", "columns", "backward"))
LOSS, LOSS_ROWS, LOSS_BACKWARD, RESCALE = (f"reconstruction_{part}_kernel" for part in ("forward", "rows", "backward", "rescale"))
MIXTURE = "logistic_mixture_kernel"
UNITS, WEIGHT, PENALTY = (f"jacobian_{part}_kernel" for part in ("units", "weight", "penalty"))
GRAM_SCALE, GRAM_REDUCE = "jacobian_gram_scale_kernel", "jacobian_gram_reduce_kernel"
SEARCH = tuple(f"codebook_{part}_kernel" for part in ("measure", "pack_codes", "pack_rows", "screen", "recheck"))
GATHER, VQ_BACKWARD, FINITE, PARTS, SUMS, COUNTS, EMA = (
    f"codebook_{part}_kernel" for part in ("gather", "backward", "finite_rows", "parts", "sums", "counts", "ema")
)
WIDE, HALVES = ("float32",), ("bfloat16", "float16")
MOMENTS, COMBINE_MOMENTS, NORM, NORM_WHOLE, NORM_SUMS, COMBINE_NORM_SUMS, NORM_PARAMETERS, NORM_BACKWARD, NORM_BACKWARD_WHOLE = (
    f"group_norm_{part}_kernel"
    for part in (
        "moments", "combine_moments", "forward", "forward_group",
        "gradient_sums", "combine_gradients", "parameter_gradients", "backward", "backward_group",
    )
)  # fmt: skip
RMS, RMS_TILES, RMS_BACKWARD, RMS_BACKWARD_TILES, RMS_PARAMETERS = (
    f"rms_norm_{part}_kernel" for part in ("forward", "forward_tiles", "backward", "backward_tiles", "parameter_gradients")
)
NORM_IN_PIECES, NORM_BACKWARD_IN_PIECES = (MOMENTS, COMBINE_MOMENTS, NORM), (NORM_SUMS, COMBINE_NORM_SUMS, NORM_BACKWARD)
SNAKE, SNAKE_BACKWARD, SNAKE_PARAMETERS = (f"snake_{part}_kernel" for part in ("forward", "backward", "parameter_gradients"))

CASES = (
    Case("sample and KL", (FORWARD,), latent_forward(), ALL),
    Case("sample and KL, chunks", (FORWARD,), latent_forward(layout="chunks"), BRIEF),
    Case("sample and KL, odd size", (FORWARD,), latent_forward(shape=ODD)),
    Case("sample and KL, prior", (FORWARD,), latent_forward(prior=True)),
    Case("sample and KL, given noise", (FORWARD,), latent_forward(noise="eps")),
    Case("sample", (FORWARD,), latent_forward(kl=False), WIDE, ONE),
    Case("several samples and KL", (FORWARD,), latent_forward(samples=DRAWS)),
    Case("several samples and KL, odd size", (FORWARD,), latent_forward(samples=DRAWS, shape=ODD)),
    Case("KL elementwise", (FORWARD,), latent_forward("none", noise=None), WIDE, ONE),
    Case("KL elementwise, free bits", (COLUMNS, FORWARD), latent_forward("none", free_bits=0.5, noise=None), WIDE, ONE),
    Case("KL by sample", (ROWS,), latent_forward("sample", noise=None), ALL),
    Case("KL of one long sample", (ROWS,), latent_forward("sample", noise=None, shape=(1, BATCH * FEATURES))),
    Case("KL by sample, prior, free bits", (COLUMNS, ROWS), latent_forward("sample", free_bits=0.5, noise=None, prior=True), WIDE, ONE),
    Case("sample and KL, free bits", (COLUMNS, FORWARD), latent_forward(free_bits=0.5), ALL),
    Case("gradients of sample and KL", (BACKWARD,), latent_backward(), ALL),
    Case("gradients of sample and KL, chunks", (BACKWARD,), latent_backward(layout="chunks"), BRIEF),
    Case("gradients of sample and KL, prior", (BACKWARD,), latent_backward(prior=True)),
    Case("gradients of sample and KL by sample, free bits", (BACKWARD,), latent_backward("sample", active=True), WIDE, ONE),
    Case("gradients of a given noise's sample", (BACKWARD,), latent_backward(noise="eps", kl=False), WIDE, ONE),
    Case("gradients of several samples", (BACKWARD,), latent_backward(samples=DRAWS, kl=False)),
    Case("gradients of several samples and KL, odd size", (BACKWARD,), latent_backward(samples=DRAWS, shape=ODD), WIDE, ONE),
    Case("gradients of the KL", (BACKWARD,), latent_backward(noise=None), WIDE, ONE),
    Case("gradients of the KL elementwise, prior", (BACKWARD,), latent_backward("none", noise=None, prior=True), WIDE, ONE),
    Case("BCE from logits", (LOSS,), loss_forward("bce_with_logits"), ALL),
    Case("BCE from logits, uint8", (LOSS,), loss_forward("bce_with_logits", target=torch.uint8), ALL),
    Case("BCE from logits, weights", (LOSS,), loss_forward("bce_with_logits", weight=(1, FEATURES), pos_weight=FULL)),
    Case("BCE from logits, other weights", (LOSS,), loss_forward("bce_with_logits", weight=(1, 1), pos_weight=(BATCH, 1)), WIDE, ONE),
    Case("BCE from logits, value alone", (LOSS,), loss_forward("bce_with_logits", grad=False), WIDE, ONE),
    Case("BCE from logits, elementwise", (LOSS,), loss_forward("bce_with_logits", "none", grad=False), WIDE, ONE),
    Case("BCE", (LOSS,), loss_forward("bce"), BRIEF),
    Case("MSE", (LOSS,), loss_forward("mse"), BRIEF),
    Case("MSE, uint8", (LOSS,), loss_forward("mse", target=torch.uint8), BRIEF),
    Case("Gaussian, one variance", (LOSS,), loss_forward("gaussian", "batchmean", logvar=(1, 1)), BRIEF),
    Case("Gaussian, a variance a feature", (LOSS,), loss_forward("gaussian", "batchmean", logvar=(1, FEATURES)), WIDE, ONE),
    Case("Gaussian, a variance an element", (LOSS,), loss_forward("gaussian", "batchmean", logvar=FULL), BRIEF),
    Case("BCE from logits by sample", (LOSS_ROWS,), loss_forward("bce_with_logits", "sample", grad=False), ALL),
    Case("BCE from logits by sample, uint8", (LOSS_ROWS,), loss_forward("bce_with_logits", "sample", torch.uint8, grad=False)),
    Case("BCE from logits of one long sample", (LOSS_ROWS,), loss_forward("bce_with_logits", "sample", grad=False, batch=1)),
    Case("gradients of BCE from logits by sample", (LOSS_BACKWARD,), loss_backward("bce_with_logits", "sample"), ALL),
    Case("gradients of BCE from logits", (LOSS_BACKWARD,), loss_backward("bce_with_logits", target_gradient=True)),
    Case("gradients of Gaussian elementwise", (LOSS_BACKWARD,), loss_backward("gaussian", "none", logvar=(1, 1))),
    Case("gradients of BCE from logits in place", (LOSS_BACKWARD,), loss_backward_, ALL),
    Case("rescale in place", (RESCALE,), rescale_, ALL),
    Case("mixture of logistics", (MIXTURE,), mixture_forward(), ALL),
    Case("mixture of logistics by sample", (MIXTURE,), mixture_forward("sample", grad=False)),
    Case("mixture of logistics elementwise, floating target", (MIXTURE,), mixture_forward("none", None, grad=False), WIDE, ONE),
    Case("one logistic of grey images", (MIXTURE,), mixture_forward(mixtures=1, channels=1), WIDE, ONE),
    Case("gradients of a mixture of logistics by sample", (MIXTURE,), mixture_backward()),
    Case("gradients of a mixture of logistics elementwise", (MIXTURE,), mixture_backward("none"), WIDE, ONE),
    Case("gradients of a mixture of logistics in place", (MIXTURE,), mixture_backward_, WIDE, ONE),
    Case("penalty", (UNITS, WEIGHT), penalty_forward(), ALL),
    Case("penalty with its gradients", (UNITS, WEIGHT, UNITS), penalty_forward(grads=True), BRIEF),
    Case("penalty of few units", (UNITS, WEIGHT), penalty_forward(sizes=(BATCH, 16, BATCH * FEATURES // 16))),
    Case("penalty by sample", (WEIGHT, PENALTY), penalty_forward("sample"), ALL),
    Case("penalty of few samples", (WEIGHT, PENALTY), penalty_forward("sample", sizes=(16, BATCH * FEATURES // 16, 16))),
    Case("penalty elementwise", (WEIGHT, PENALTY), penalty_forward("none"), WIDE, ONE),
    Case("gradients of the penalty", (UNITS, WEIGHT), penalty_backward(), ALL),
    Case("gradients of the penalty by sample, GELU", (UNITS, WEIGHT), penalty_backward("sample", "gelu"), ALL),
    Case("gradients of the penalty elementwise", (UNITS, WEIGHT), penalty_backward("none"), WIDE, ONE),
    *(
        Case(f"gradient of the hidden values, {name}", (UNITS,), penalty_backward(activation=name, weight_gradient=False), WIDE, ONE)
        for name in ACTIVATIONS
    ),
    Case("Gram form, scaled", (GRAM_SCALE,), gram(), WIDE),
    Case("Gram form, scaled, a matrix a sample", (GRAM_SCALE,), gram(batched=True), WIDE, ONE),
    Case("Gram form, reduced", (GRAM_REDUCE,), gram(reduce=True), WIDE),
    Case("Gram form, reduced, a matrix a sample", (GRAM_REDUCE,), gram(reduce=True, batched=True), WIDE),
    Case("Gram form, value alone", (GRAM_REDUCE,), gram(reduce=True, with_grad=False), WIDE, ONE),
    Case("GroupNorm, SiLU", NORM_IN_PIECES, normalise()),
    Case("GroupNorm, SiLU, 16 bits", NORM_IN_PIECES, normalise(), HALVES, ONE),
    Case("GroupNorm, SiLU, channels last", NORM_IN_PIECES, normalise(last=True), ALL),
    Case("GroupNorm, channels last", NORM_IN_PIECES, normalise(last=True, activation="none", affine=False), WIDE, ONE),
    Case("GroupNorm, ReLU, channels last", NORM_IN_PIECES, normalise(last=True, activation="relu"), WIDE, ONE),
    Case("GroupNorm, GELU, channels last", NORM_IN_PIECES, normalise(last=True, activation="gelu"), WIDE, ONE),
    Case("GroupNorm, SiLU, small groups", (NORM_WHOLE,), normalise(WHOLE), ALL),
    Case("GroupNorm, SiLU, small groups, channels last", (NORM_WHOLE,), normalise(WHOLE, last=True), ALL),
    Case("GroupNorm, SiLU, groups of 8,192", (NORM_WHOLE,), normalise(HALF), BRIEF),
    Case("GroupNorm, SiLU, groups of 16,384", (NORM_WHOLE,), normalise(LARGE), ALL),
    Case("GroupNorm, SiLU, groups of 16,384, channels last", (NORM_WHOLE,), normalise(LARGE, last=True), ALL),
    Case("GroupNorm, GELU, groups of 16,384", (NORM_WHOLE,), normalise(LARGE, activation="gelu"), WIDE, ONE),
    Case("GroupNorm of one position", (NORM_WHOLE,), normalise(FLAT, activation="none", affine=False), WIDE, ONE),
    Case("gradients of GroupNorm, SiLU", (*NORM_BACKWARD_IN_PIECES, NORM_PARAMETERS), normalise_backward()),
    Case("gradients of GroupNorm, SiLU, 16 bits", (*NORM_BACKWARD_IN_PIECES, NORM_PARAMETERS), normalise_backward(), HALVES, ONE),
    Case("gradients of GroupNorm, SiLU, channels last", (*NORM_BACKWARD_IN_PIECES, NORM_PARAMETERS), normalise_backward(last=True), ALL),
    Case(
        "gradients of GroupNorm, channels last",
        NORM_BACKWARD_IN_PIECES,
        normalise_backward(last=True, activation="none", affine=False),
        WIDE,
        ONE,
    ),
    Case("gradients of GroupNorm, SiLU, small groups", (NORM_BACKWARD_WHOLE, NORM_PARAMETERS), normalise_backward(WHOLE), ALL),
    Case(
        "gradients of GroupNorm, SiLU, small groups, channels last",
        (NORM_BACKWARD_WHOLE, NORM_PARAMETERS),
        normalise_backward(WHOLE, last=True),
        ALL,
    ),
    Case("gradients of GroupNorm, SiLU, groups of 8,192", (NORM_BACKWARD_WHOLE, NORM_PARAMETERS), normalise_backward(HALF), BRIEF),
    Case("gradients of GroupNorm, SiLU, groups of 16,384", (NORM_BACKWARD_WHOLE, NORM_PARAMETERS), normalise_backward(LARGE), HALVES),
    Case(
        "gradients of GroupNorm, SiLU, groups of 8,192, channels last",
        (NORM_BACKWARD_WHOLE, NORM_PARAMETERS),
        normalise_backward(HALF, last=True),
        ALL,
    ),
    Case(
        "gradients of GroupNorm, ReLU, channels last",
        (*NORM_BACKWARD_IN_PIECES, NORM_PARAMETERS),
        normalise_backward(last=True, activation="relu"),
        WIDE,
        ONE,
    ),
    Case(
        "gradients of GroupNorm, GELU, channels last",
        (*NORM_BACKWARD_IN_PIECES, NORM_PARAMETERS),
        normalise_backward(last=True, activation="gelu"),
        WIDE,
        ONE,
    ),
    Case(
        "gradients of GroupNorm, GELU, groups of 16,384",
        (NORM_BACKWARD_WHOLE, NORM_PARAMETERS),
        normalise_backward(LARGE, activation="gelu"),
        ("bfloat16",),
    ),
    Case(
        "gradients of GroupNorm, GELU, groups of 8,192, channels last",
        (NORM_BACKWARD_WHOLE, NORM_PARAMETERS),
        normalise_backward(HALF, last=True, activation="gelu"),
        WIDE,
    ),
    Case(
        "gradients of GroupNorm of one position",
        (NORM_BACKWARD_WHOLE,),
        normalise_backward(FLAT, activation="none", affine=False),
        WIDE,
        ONE,
    ),
    Case("RMS norm, SiLU", (RMS,), rms_normalise(), ALL),
    Case("RMS norm, SiLU, channels last", (RMS,), rms_normalise(last=True), ALL),
    Case("RMS norm, SiLU, video", (RMS,), rms_normalise(VIDEO), BRIEF),
    Case("RMS norm, SiLU, video, channels last", (RMS,), rms_normalise(VIDEO, last=True), BRIEF),
    Case("bounded RMS norm, SiLU, video", (RMS,), rms_normalise(VIDEO, False, ("weight",), "clamp"), BRIEF, ONE),
    Case("RMS norm, a parameter a sample", (RMS,), rms_normalise(last=True, activation="none", by_sample=True), BRIEF, ONE),
    Case("RMS norm, ReLU", (RMS,), rms_normalise(activation="relu"), WIDE, ONE),
    Case("RMS norm, GELU, video", (RMS,), rms_normalise(VIDEO, activation="gelu"), WIDE, ONE),
    Case("RMS norm, SiLU, 1,024 channels", (RMS,), rms_normalise(MOST), BRIEF),
    Case("RMS norm, SiLU, 4,096 channels, channels last", (RMS,), rms_normalise(MOST_LAST, last=True), BRIEF),
    Case("RMS norm, SiLU, in tiles", (RMS_TILES,), rms_normalise(TILES), ALL),
    Case("RMS norm, SiLU, in tiles, channels last", (RMS_TILES,), rms_normalise(TILES_LAST, last=True), BRIEF),
    Case("gradients of RMS norm, SiLU", (RMS_BACKWARD, *[RMS_PARAMETERS] * 2), rms_normalise_backward(), ALL),
    Case("gradients of RMS norm, SiLU, channels last", (RMS_BACKWARD, *[RMS_PARAMETERS] * 2), rms_normalise_backward(last=True), ALL),
    Case("gradients of RMS norm, SiLU, video", (RMS_BACKWARD, *[RMS_PARAMETERS] * 2), rms_normalise_backward(VIDEO), BRIEF),
    Case(
        "gradients of RMS norm, SiLU, video, channels last",
        (RMS_BACKWARD, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(VIDEO, last=True),
        BRIEF,
    ),
    Case(
        "gradients of bounded RMS norm, SiLU, video",
        (RMS_BACKWARD, RMS_PARAMETERS),
        rms_normalise_backward(VIDEO, False, ("weight",), "clamp"),
        BRIEF,
        ONE,
    ),
    Case(
        "gradients of RMS norm, a parameter a sample",
        (RMS_BACKWARD, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(last=True, activation="none", by_sample=True),
        BRIEF,
        ONE,
    ),
    Case("gradients of RMS norm, SiLU, 1,024 channels", (RMS_BACKWARD, *[RMS_PARAMETERS] * 2), rms_normalise_backward(MOST), BRIEF),
    Case(
        "gradients of RMS norm, SiLU, 4,096 channels, channels last",
        (RMS_BACKWARD, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(MOST_LAST, last=True),
        BRIEF,
    ),
    Case("gradients of RMS norm, ReLU", (RMS_BACKWARD, *[RMS_PARAMETERS] * 2), rms_normalise_backward(activation="relu"), WIDE, ONE),
    Case(
        "gradients of RMS norm, GELU, 1,024 channels",
        (RMS_BACKWARD, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(MOST, activation="gelu"),
        WIDE,
    ),
    Case(
        "gradients of RMS norm, GELU, 4,096 channels, channels last",
        (RMS_BACKWARD, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(MOST_LAST, last=True, activation="gelu"),
        WIDE,
    ),
    Case(
        "gradients of RMS norm, GELU, in tiles",
        (RMS_BACKWARD_TILES, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(TILES, activation="gelu"),
        WIDE,
        ONE,
    ),
    Case("gradients of RMS norm, SiLU, in tiles", (RMS_BACKWARD_TILES, *[RMS_PARAMETERS] * 2), rms_normalise_backward(TILES), ALL),
    Case(
        "gradients of RMS norm, SiLU, in tiles, channels last",
        (RMS_BACKWARD_TILES, *[RMS_PARAMETERS] * 2),
        rms_normalise_backward(TILES_LAST, last=True),
        BRIEF,
    ),
    Case("quantize", (*SEARCH, GATHER), quantize(), ALL),
    Case("quantize, elementwise", (*SEARCH, GATHER), quantize("none", 100), WIDE, ONE),
    Case("quantize by sample", (*SEARCH, GATHER), quantize("sample", 32), WIDE, ONE),
    Case("nearest of long vectors", SEARCH, nearest_code(256, 1 << 14, 8192)),
    Case("nearest of short vectors", SEARCH, nearest_code(8)),
    Case("nearest of numbers", SEARCH, nearest_code(1), WIDE, ONE),
    Case("gradients of quantize", (VQ_BACKWARD, PARTS, SUMS), quantize_backward(), ALL),
    Case("gradients of quantize, rotated, by sample", (VQ_BACKWARD, PARTS, SUMS), quantize_backward("sample", True)),
    Case("gradients of quantize, elementwise", (VQ_BACKWARD, PARTS, SUMS), quantize_backward("none", dim=100), WIDE, ONE),
    Case("moving averages", (FINITE, PARTS, SUMS, COUNTS, EMA), moving_averages, ALL),
    Case("snake", (SNAKE,), snake_activation(), ALL),
    Case("snake, channels last", (SNAKE,), snake_activation(last=True), ALL),
    Case("snake, many channels", (SNAKE,), snake_activation(WIDE_WAVES), BRIEF, ONE),
    Case("gradients of snake", (SNAKE_BACKWARD, SNAKE_PARAMETERS), snake_gradients(), ALL),
    Case("gradients of snake, channels last", (SNAKE_BACKWARD, SNAKE_PARAMETERS), snake_gradients(last=True), ALL),
    Case("gradients of snake, many channels", (SNAKE_BACKWARD, SNAKE_PARAMETERS), snake_gradients(WIDE_WAVES), BRIEF, ONE),
)
