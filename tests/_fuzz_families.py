"""The cases of differential fuzzing: for each family of public functions, how a :class:`Draw` makes a :class:`Trial`."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from _fuzz import LAYOUTS, Draw, Size, Trial, widened
from _helpers import TOLERANCES, lay_out
from test_codebook import assert_nearest, assert_nearest_in_float64
from test_group_norm import arrange, is_near_kink
from test_jacobian import FUNCTIONS as ACTIVATION_FUNCTIONS
from test_logistic_mixture import Case as MixtureCase
from test_logistic_mixture import size_of_gradients
from test_reconstruction import FORMS, form_shape
from test_rms_norm import is_near_bound
from test_rms_norm import oracle as rms_oracle
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae import reference
from fastvae.functional.codebook import GRADIENTS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.jacobian import ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES
from fastvae.reference import latent as latent_reference
from fastvae.reference._reduce import expand_gradient, reduce_elements
from fastvae.reference.jacobian import derivatives

ELEMENTS = 400
# Its part in a bound is the smallest normal float32.
SMALLEST_SIGMA = torch.finfo(torch.float32).tiny / TOLERANCES[torch.float32]["atol"]
SCALAR_REDUCTIONS = ("batchmean", "sum", "mean")


def _weights(incoming: Tensor, shape: torch.Size, reduction: str) -> Tensor:
    """The absolute gradient of each element of a loss."""
    return expand_gradient(incoming.double(), shape, REDUCTIONS[reduction]).abs()


def _reduced(elements: Tensor, reduction: str) -> Tensor:
    return reduce_elements(elements, REDUCTIONS[reduction], torch.float64)


def _of_argument(full: Tensor, argument: Tensor) -> Size:
    """The size of the gradient of an argument that was broadcast: torch rounds each term to the dtype of the argument, and the sum."""
    if argument.shape == full.shape:
        return Size(full)
    summed = full.sum_to_size(argument.shape)
    return Size(summed, summed, 2)


def _shape(draw: Draw) -> tuple[int, ...]:
    return draw.sizes(draw.choice((0, 1, 2, 2, 3, 4)), draw.choice((20, ELEMENTS, ELEMENTS, 4 * ELEMENTS)))


# Sampling and the KL.


def latent(draw: Draw) -> Trial:
    name = draw.choice(("reparameterize", "kl_normal", "reparameterize_kl", "reparameterize_kl"))
    samples, learns, clamp = name != "kl_normal", name != "reparameterize", draw.choice(((-30.0, 20.0), (-30.0, 20.0), (-0.5, 0.5), None))
    shape = _shape(draw)
    tensors = {"mu": draw.values(*shape), "logvar": draw.values(*shape)}
    options = {"logvar_clamp": clamp}
    if learns:
        prior = draw.choice((None, None, shape, shape[1:], ()))
        if prior is not None:
            tensors |= {"prior_mu": draw.values(*prior), "prior_logvar": draw.values(*prior)}
        options |= {"reduction": draw.choice(tuple(REDUCTIONS)), "free_bits": _free_bits(draw, tensors, clamp)}
    noise = {}
    if samples:
        options["num_samples"] = draw.choice((None, None, 1, 3))
        sample_shape = shape if options["num_samples"] is None else (options["num_samples"], *shape)
        noise = {"eps": draw.values(*sample_shape)} if draw.chance(0.4) else {"seed": torch.tensor(draw.random.getrandbits(62))}
    leaves = (*tensors, "eps") if "eps" in noise and draw.chance(0.3) else tuple(tensors)

    def oracle(tensors):
        """The noise of the backend stands in for the seed's: how near the backends are to each other is a test of its own."""
        wide = widened(tensors)
        if "seed" in wide:
            zeros = torch.zeros(shape)
            wide["eps"] = FV.reparameterize(zeros, zeros, num_samples=options["num_samples"], seed=wide.pop("seed")).double()
        return wide

    return Trial(
        lambda module, t: _tuple(getattr(module, name)(**t, **options)),
        tensors | noise,
        leaves,
        lambda wide, _, incoming: _latent_sizes(wide, incoming, samples, learns, options),
        draw.extreme,
        oracle=oracle,
        # The derivative of torch.clamp at NaN is 0.
        by_operator=draw.extreme,
    )


def _tuple(outputs) -> tuple[Tensor, ...]:
    return tuple(outputs) if isinstance(outputs, tuple) else (outputs,)


def _free_bits(draw: Draw, tensors: dict[str, Tensor], clamp) -> float:
    """0, or a number that is clearly above or below the KL of each dimension, so that rounding does not decide which count."""
    if draw.extreme or draw.chance(0.6) or tensors["mu"].ndim == 0:
        return 0.0
    means = latent_reference.kl_normal(*widened(tensors).values(), reduction="none", logvar_clamp=clamp).mean(0).flatten().sort().values
    gaps = means.diff()
    if gaps.numel() == 0 or not gaps.max() > 1e-2 * means.max():
        return 0.0
    gap, where = gaps.max(0)
    return float(means[where] + gap / 2)


def _latent_sizes(wide, incoming, samples, learns, options) -> dict[str, Size]:
    low, high = options["logvar_clamp"] or (-math.inf, math.inf)
    mu, logvar = wide["mu"], wide["logvar"].clamp(low, high)
    # A kernel's exponential is 0 where it would be below the smallest normal number, which huge noise makes large again.
    shape, sizes, sigma = mu.shape, {}, torch.exp(0.5 * logvar) + SMALLEST_SIGMA
    by_mu, by_logvar = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    flowing = list(incoming)
    if samples:
        eps = wide["eps"].abs()
        sizes["output 0"] = Size(mu.abs() + sigma * eps)
        flow = flowing.pop(0).double().abs()
        sizes["gradient of eps"] = Size(flow * sigma)
        by_sample, by_noise = (flow, flow * eps) if options["num_samples"] is None else (flow.sum(0), (flow * eps).sum(0))
        by_mu, by_logvar = by_sample, 0.5 * sigma * by_noise
    if not learns:
        return sizes | {"gradient of mu": Size(by_mu), "gradient of logvar": Size(by_logvar)}
    prior_mu = wide.get("prior_mu", torch.zeros((), dtype=torch.float64))
    prior_logvar = wide.get("prior_logvar", torch.zeros((), dtype=torch.float64)).clamp(low, high)
    difference, precision = logvar - prior_logvar, torch.exp(-prior_logvar)
    delta, magnitude = (mu - prior_mu).abs(), 1.0 + difference.abs()
    # exp multiplies the rounding of the difference by the difference.
    elements = 0.5 * (delta.square() * precision + latent_reference.variance_divergence(difference) * magnitude)
    reduction, free_bits = options["reduction"], options["free_bits"]
    sizes[f"output {int(samples)}"] = Size(_reduced(elements + free_bits, reduction))
    weight = _weights(flowing[0], shape, reduction)
    excess = 0.5 * torch.expm1(difference).abs() * magnitude
    by_mu, by_logvar = by_mu + weight * delta * precision, by_logvar + weight * excess
    sizes |= {"gradient of mu": Size(by_mu), "gradient of logvar": Size(by_logvar)}
    if "prior_mu" in wide:
        sizes["gradient of prior_mu"] = _of_argument(weight * delta * precision, wide["prior_mu"])
        sizes["gradient of prior_logvar"] = _of_argument(weight * (excess + 0.5 * delta.square() * precision), wide["prior_logvar"])
    return sizes


# Reconstruction losses.


def reconstruction(draw: Draw) -> Trial:
    name = draw.choice(("binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "gaussian_nll"))
    shape, options = _shape(draw), {"reduction": draw.choice(tuple(REDUCTIONS)), "grad_scale": draw.choice((1.0, 1.0, 0.25, -3.0))}
    tensors = {"input": _predictions(draw, name, shape), "target": _target(draw, name, shape)}
    leaves = ["input"]
    if name.startswith("binary"):
        if draw.chance(0.4):
            tensors["weight"] = draw.uniform(*form_shape(draw.choice(FORMS), shape)) + 0.5
        if name.endswith("logits") and draw.chance(0.4):
            tensors["pos_weight"] = draw.uniform(*form_shape(draw.choice(FORMS), shape)) + 0.5
    if name == "gaussian_nll":
        tensors["logvar"] = draw.values(*form_shape(draw.choice(FORMS), shape))
        leaves.append("logvar")
    if tensors["target"].is_floating_point() and draw.chance(0.3):
        leaves.append("target")
    return Trial(
        lambda module, t: (getattr(module, name)(**t, **options),),
        tensors,
        tuple(leaves),
        lambda wide, _, incoming: _loss_sizes(name, wide, tensors, incoming[0], options),
        draw.extreme,
        oracle=_floating,
        # Its gradient has torch's least denominator, which the derivative of the clamped logarithms has not.
        by_operator=name == "binary_cross_entropy",
    )


def _floating(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64, images too: a reference that took them as they are would round 1 / 255 where the tensors beside them are not float64."""
    return widened(tensors) | ({"target": tensors["target"].double() / 255} if tensors["target"].dtype == torch.uint8 else {})


def _predictions(draw: Draw, name: str, shape) -> Tensor:
    if name != "binary_cross_entropy":
        return draw.values(*shape)
    if not draw.extreme:
        return draw.uniform(*shape) * 0.98 + 0.01
    ends = draw.uniform(*shape)
    limits = torch.finfo(draw.dtype)
    numbers = torch.tensor([0.0, 1.0, limits.tiny, 1.0 - limits.eps, 0.5, float("nan") if draw.chance(0.3) else 0.25], dtype=draw.dtype)
    return torch.where(draw.uniform(*shape) < 0.3, numbers[torch.randint(6, shape, generator=draw.generator)], ends)


def _target(draw: Draw, name: str, shape) -> Tensor:
    if draw.chance(0.3):
        return draw.image(*shape)
    dtype = draw.choice((draw.dtype, draw.dtype, torch.float32, torch.bfloat16, torch.float16))
    if name in ("mse_loss", "gaussian_nll"):
        return draw.values(*shape, dtype=dtype)
    return draw.uniform(*shape, dtype=dtype)


def _loss_sizes(name: str, wide, tensors, incoming, options) -> dict[str, Size]:
    """Sizes of the loss and of its gradients with respect to input, target and logvar."""
    x, t = wide["input"], wide["target"]
    # A target of 8 bits is rounded where it is divided by 255.
    image = t if tensors["target"].dtype == torch.uint8 else torch.zeros((), dtype=torch.float64)
    weight = wide.get("weight", torch.ones((), dtype=torch.float64)).abs()
    elements, by_input, by_target, by_logvar = _ELEMENT_SIZES[name](x, t, image, wide)
    flow = _weights(incoming, x.shape, options["reduction"]) * weight
    scaled = options["reduction"] in SCALAR_REDUCTIONS and incoming != options["grad_scale"]
    # A gradient that the forward pass wrote is rounded once more where another one comes in than was expected.
    roundings = 2 if scaled and tensors["input"].element_size() > 2 else 1
    sizes = {
        "output 0": Size(_reduced(elements * weight, options["reduction"])),
        "gradient of input": Size(flow * by_input, roundings=roundings),
        "gradient of target": Size(flow * by_target),
    }
    if by_logvar is not None:
        sizes["gradient of logvar"] = _of_argument(flow * by_logvar, wide["logvar"])
        sizes["gradient of logvar"].roundings = 2
    return sizes


def _logits_sizes(x, t, image, wide):
    rest = (1.0 - t).abs() + torch.where((image > 0) & (image < 1), image, 0.0)
    excess = (wide["pos_weight"] - 1.0).abs() if "pos_weight" in wide else 0.0
    factor = 1.0 + excess * t.abs()
    # The gradient is the difference of numbers up to 1, also where it is next to 0.
    return rest * x.abs() + factor * F.softplus(-x), 1.0 + factor + t.abs(), excess * F.softplus(-x) + x.abs(), None


def _probability_sizes(x, t, image, wide):
    one, zero = torch.log(x).clamp(min=-100.0).abs(), torch.log1p(-x).clamp(min=-100.0).abs()
    elements = t.abs() * (1.0 + one) + (1.0 - t).abs() * (1.0 + zero) + image * (one + zero)
    return elements, ((x - t).abs() + image) / ((1.0 - x) * x).clamp(min=1e-12), 2.0 + one + zero, None


def _square_sizes(x, t, image, wide):
    error = (x - t).abs() + image
    return error * error, 2.0 * error, 2.0 * error, None


def _gaussian_sizes(x, t, image, wide):
    error, precision = (x - t).abs() + image, torch.exp(-wide["logvar"])
    scaled = error * error * precision
    # exp multiplies the rounding of its argument, and a kernel that takes 2^x rounds the argument.
    grown = 1.0 + 0.1 * wide["logvar"].abs()
    return (
        0.92 + 0.5 * (wide["logvar"].abs() + scaled * grown),
        error * precision * grown,
        error * precision * grown,
        0.5 * (1.0 + scaled * grown),
    )


_ELEMENT_SIZES = {
    "binary_cross_entropy_with_logits": _logits_sizes,
    "binary_cross_entropy": _probability_sizes,
    "mse_loss": _square_sizes,
    "gaussian_nll": _gaussian_sizes,
}
_LIKELIHOODS = {"bernoulli_logits": "binary_cross_entropy_with_logits", "bernoulli": "binary_cross_entropy", "gaussian": "gaussian_nll"}


def elbo(draw: Draw) -> Trial:
    """``elbo_loss`` and ``vae_loss``: sums of the two families above."""
    tutorial = draw.chance(0.25)
    likelihood = "bernoulli" if tutorial else draw.choice(tuple(_LIKELIHOODS))
    loss = _LIKELIHOODS[likelihood]
    shape = draw.sizes(draw.choice((1, 2, 3)), ELEMENTS)
    posterior = shape[:1] + draw.sizes(1, 40)
    tensors = {
        "recon": _predictions(draw, loss, shape),
        "target": _target(draw, loss, shape),
        "mu": draw.values(*posterior),
        "logvar": draw.values(*posterior),
    }
    options = {"beta": draw.choice((1.0, 4.0, 0.0)), "reduction": draw.choice(("batchmean", "sum", "sample")), "likelihood": likelihood}
    if tutorial:
        options = {"beta": 1.0, "reduction": "sum", "likelihood": likelihood}

    def call(module, t):
        if tutorial:
            return module.vae_loss(t["target"], t["recon"], t["mu"], t["logvar"])
        return tuple(module.elbo_loss(**t, **options))

    def sizes(wide, _, incoming):
        """The first incoming gradient reaches both parts."""
        # Both parts have its shape.
        total, recon, kl = (g.double().abs() for g in incoming)
        renamed = {"input": wide["recon"], "target": wide["target"], "logvar": torch.zeros((), dtype=torch.float64)}
        of_loss = _loss_sizes(
            loss, renamed, {"input": tensors["recon"], "target": tensors["target"]}, total + recon, options | {"grad_scale": 1.0}
        )
        of_kl = _latent_sizes(
            {name: wide[name] for name in ("mu", "logvar")},
            [options["beta"] * total + kl],
            False,
            True,
            {"logvar_clamp": (-30.0, 20.0), "free_bits": 0.0, "reduction": options["reduction"]},
        )
        parts = of_loss["output 0"].sums, of_kl["output 0"].sums
        return {
            "output 0": Size(parts[0] + options["beta"] * parts[1]),
            "output 1": Size(parts[0]),
            "output 2": Size(parts[1]),
            "gradient of recon": Size(of_loss["gradient of input"].sums, roundings=2),
            "gradient of mu": of_kl["gradient of mu"],
            "gradient of logvar": of_kl["gradient of logvar"],
        }

    return Trial(
        call,
        tensors,
        ("recon", "mu", "logvar"),
        sizes,
        draw.extreme,
        oracle=_floating,
        by_operator=draw.extreme or likelihood == "bernoulli",
    )


def logistic_mixture(draw: Draw) -> Trial:
    case = MixtureCase(
        mixtures=draw.choice((1, 2, 3, 5)),
        channels=draw.choice((1, 1, 2, 3)),
        batch=draw.choice((0, 1, 2, 3)),
        spatial=draw.choice(((), (1,), (3,), (17,), (33,), (2, 5))),
        reduction=draw.choice(tuple(REDUCTIONS)),
        target_dtype=draw.choice((torch.uint8, torch.uint8, torch.float32, draw.dtype)),
        spread=draw.choice((0.1, 1.0, 3.0)),
    )
    input = draw.values(*case.shape) if draw.extreme else draw.normal(*case.shape) * case.spread
    target = _levels(draw, case)
    options = {"num_mixtures": case.mixtures, "reduction": case.reduction, "grad_scale": draw.choice((1.0, 0.25))}

    def sizes(wide, oracle, incoming):
        size = size_of_gradients(wide["input"].nan_to_num(), replace(case, spread=max(case.spread, _largest(wide["input"]))))
        if draw.extreme:
            # The loss is a sum of logits and log scales, which are small beside the rest where they are not extreme.
            size += min(8.0 * case.channels * _largest(wide["input"]), 1e150) ** 2
        flow = max(1.0, float(incoming[0].abs().max())) if incoming[0].numel() else 1.0
        scaled = case.reduction in SCALAR_REDUCTIONS and incoming[0].ndim == 0 and incoming[0] != options["grad_scale"]
        roundings = 2 if scaled and input.element_size() > 2 else 1
        return {"output 0": Size(math.sqrt(size)), "gradient of input": Size(size * flow, roundings=roundings)}

    return Trial(
        lambda module, t: (module.logistic_mixture_nll(**t, **options),),
        {"input": input, "target": target}, ("input",), sizes, draw.extreme,
        oracle=lambda tensors: tensors | {"input": tensors["input"].detach().double()}, by_operator=draw.extreme,
    )  # fmt: skip


def _levels(draw: Draw, case: MixtureCase) -> Tensor:
    image = draw.image(case.batch, case.channels, *case.spatial)
    return image if case.target_dtype == torch.uint8 else lay_out((image.double() / 255).to(case.target_dtype), draw.choice(LAYOUTS))


# Jacobians.


def contractive(draw: Draw) -> Trial:
    activation, reduction = draw.choice(tuple(ACTIVATIONS)), draw.choice(tuple(REDUCTIONS))
    batch, units = draw.sizes(2, ELEMENTS)
    inputs = draw.choice((1, 5, 16, 33, 70))
    if draw.extreme:
        hidden = draw.values(batch, units)
        # No layer gives what its activation does not.
        hidden = hidden.abs() if activation in ("relu", "softplus") else hidden
    else:
        a = draw.normal(batch, units, layout=False).double()
        if not ACTIVATIONS[activation].from_preactivation:
            a = ACTIVATION_FUNCTIONS[activation](a, ACTIVATIONS[activation].alpha)
        hidden = lay_out(a.to(draw.dtype), draw.choice(LAYOUTS))
    tensors = {"hidden": hidden, "weight": draw.values(units, inputs)}
    options = {"activation": activation, "reduction": reduction, "grad_scale": draw.choice((1.0, 0.5))}

    def sizes(wide, oracle, incoming):
        """The slopes of sigmoid and its like are differences of numbers up to 1, and so are their derivatives."""
        # In float64 such a difference is rounded too: 1 + tanh(u) is 0 for a large negative u.
        slope, change = (t.abs() + 1e-13 for t in derivatives(wide["hidden"], activation, ACTIVATIONS[activation].alpha))
        flow, norms = _weights(incoming[0], slope.shape, reduction), wide["weight"].square().sum(1)
        of_weight = 4.0 * (flow * slope * (1.0 + slope)).sum(0)[:, None] * wide["weight"].abs()
        return {
            "output 0": Size(_reduced(2.0 * norms * slope * (1.0 + slope), reduction)),
            "gradient of hidden": Size(2.0 * flow * norms * (slope * (1.0 + change) + change), roundings=2),
            "gradient of weight": Size(of_weight, roundings=2),
        }

    return Trial(
        lambda module, t: (module.contractive_penalty(**t, **options),), tensors, ("hidden", "weight"), sizes, draw.extreme,
        by_operator=draw.extreme,
    )  # fmt: skip


class _Encoder(nn.Module):
    """Layers whose weights are given with the call, as autograd's tensors."""

    def __init__(self, weights: list[Tensor], activations: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential()
        for weight, activation in zip(weights, activations, strict=True):
            linear = nn.Linear(1, 1, bias=False)
            del linear.weight
            linear.weight, linear.in_features, linear.out_features = weight, weight.shape[1], weight.shape[0]
            self.layers.append(linear).append(activation)


def jacobian(draw: Draw) -> Trial:
    """An MLP; in float64, where the norm and its gradients are known to the last digits, or the norm alone in float32."""
    dtype = draw.choice((torch.float64, torch.float64, torch.float32))
    widths = [draw.choice((1, 2, 3, 7, 8, 17, 33)) for _ in range(draw.choice((2, 3, 3, 4)))]
    batch = draw.choice((0, 1, 2, 5, 17))
    weights = {
        f"weight {i}": draw.normal(rows, columns, dtype=dtype, layout=False) / math.sqrt(columns)
        for i, (columns, rows) in enumerate(itertools.pairwise(widths))
    }
    activations = [draw.choice((nn.Sigmoid, nn.Tanh, nn.SiLU, nn.Softplus, nn.Identity))() for _ in weights]
    tensors = {"x": draw.normal(batch, widths[0], dtype=dtype)} | weights
    options = {"reduction": draw.choice(("batchmean", "sum", "sample")), "with_output": draw.chance(0.3)}
    if draw.chance(0.2):
        options["chunk_size"] = draw.choice((1, 2, 5))
    method = draw.choice(("auto", "auto", "autograd", "closed_form" if len(weights) == 1 else "gram"))

    def call(module, t):
        encoder = _Encoder([t[name] for name in weights], activations).layers
        return _tuple(module.jacobian_frobenius(encoder, t["x"], method=method if module is FV else "autograd", **options))

    def sizes(wide, oracle, incoming):
        """Each of the products of a chain of layers rounds, and the norm adds squares of their sums: bounded by the sums of absolutes."""
        chain = torch.eye(widths[0], dtype=torch.float64)
        for weight in weights:
            chain = wide[weight].abs() @ chain
        size = (1.0 + float(chain.square().sum())) * 4.0 * len(weights)
        flow = max((float(g.abs().max()) for g in incoming if g.numel()), default=0.0)
        scale = size * (1.0 + flow) * max(batch, 1) * (1.0 + max((float(w.abs().max()) for w in wide.values() if w.numel()), default=0.0))
        return {name: Size(scale) for name in oracle}

    method_is_known = FV.explain_jacobian_method(_Encoder(list(weights.values()), activations).layers, tensors["x"]).method
    assert method_is_known == ("closed_form" if len(weights) == 1 else "gram")
    leaves = tuple(tensors) if dtype == torch.float64 else ()
    return Trial(call, tensors, leaves, sizes, extreme=False)


# Normalisations.


def _feature_map(draw: Draw) -> tuple[tuple[int, ...], int]:
    """A shape, and groups that divide its channels."""
    groups, width = draw.choice((1, 1, 2, 3, 8)), draw.choice((1, 2, 3, 4, 8, 17))
    batch = 0 if draw.chance(0.02) else draw.choice((1, 1, 2, 3))
    positions = draw.sizes(draw.choice((0, 1, 2, 2, 3)), max(1, 3 * ELEMENTS // (groups * width * max(batch, 1))))
    return (batch, groups * width, *positions), groups


def _map_values(draw: Draw, shape) -> Tensor:
    values = draw.values(*shape, layout=False) if draw.extreme else draw.normal(*shape, layout=False)
    if not draw.extreme and draw.chance(0.15):
        values = values + draw.choice((10.0, -100.0))
    layout = draw.choice(("contiguous", "contiguous", "last", "last", "permuted", "sliced", "offset"))
    return arrange(values, layout)


def _largest(tensor: Tensor) -> float:
    """The largest finite absolute value."""
    return float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).max()) if tensor.numel() else 0.0


def group_norm(draw: Draw) -> Trial | None:
    shape, groups = _feature_map(draw)
    tensors = {"input": _map_values(draw, shape)}
    if draw.chance(0.6):
        dtype = draw.choice((draw.dtype, torch.float32 if draw.dtype != torch.float64 else torch.float64))
        tensors |= {"weight": draw.normal(shape[1], dtype=dtype), "bias": draw.normal(shape[1], dtype=dtype)}
    options = {"num_groups": groups, "activation": draw.choice(tuple(NORM_ACTIVATIONS)), "eps": draw.choice((1e-5, 1e-3, 1e-6))}

    def call(module, t):
        return (module.group_norm_silu(**t, **options),)

    def sizes(wide, oracle, incoming):
        """As in the tests of the family: what the normalisation cancels, and what the gradient of its input does."""
        width = math.prod(shape[1:]) / groups
        variance = wide["input"].reshape(shape[0], groups, -1).var(2, correction=0) if wide["input"].numel() else torch.ones(1)
        rstd = 1.0 / (float(variance.nan_to_num(0.0, 0.0, 0.0).min()) + options["eps"]) ** 0.5
        # A mean that is large beside the deviations costs digits of them.
        shifted = 1.0 + _largest(wide["input"]) * rstd * 2.0**-10
        if draw.extreme:
            # One element may be all of a group: its projection is as large as the number of elements, and cancels.
            shifted *= 1.0 + width
        return _norm_sizes(wide, oracle, incoming, rstd * shifted, (shape[0] * math.prod(shape[2:])), draw.dtype)

    trial = Trial(call, tensors, tuple(tensors), sizes, draw.extreme)
    return _without_kink(trial, draw, options, call)


def _norm_sizes(wide, oracle, incoming, rstd: float, terms: int, dtype: torch.dtype) -> dict[str, Size]:
    factors = math.prod(1.0 + _largest(t) for name, t in wide.items() if name not in ("input", "bias", "shift"))
    flow = max((_largest(g) for g in incoming), default=0.0)
    size = {"output 0": 1.0 + _largest(oracle["output 0"])}
    size["gradient of input"] = max(4.0 * rstd * factors * flow, _largest(oracle["gradient of input"]))
    normal = 4.0 + (_largest(wide["input"]) * rstd if rstd < 1.0 else 0.0)
    for name in wide.keys() - {"input"}:
        size[f"gradient of {name}"] = terms**0.5 * normal * factors * max(flow, 1.0)
    return {name: Size(value, value) for name, value in size.items()}


def _without_kink(trial: Trial, draw: Draw, options: dict, call) -> Trial | None:
    """None where rounding decides on which side of 0 some input of a ReLU is."""
    if options["activation"] != "relu" or draw.extreme:
        return trial if options["activation"] != "relu" else None
    chosen = options["activation"]
    options["activation"] = "none"
    (u,) = call(reference, widened(trial.tensors))
    options["activation"] = chosen
    return None if u.numel() and is_near_kink(u) else trial


def rms_norm(draw: Draw) -> Trial | None:
    shape, _ = _feature_map(draw)
    names = [name for name in ("weight", "bias", "scale", "shift") if draw.chance(0.4)]
    dtype = draw.choice((draw.dtype, torch.float32 if draw.dtype != torch.float64 else torch.float64))
    parameters = {
        name: draw.normal(*(shape[1:2] if name in ("weight", "bias") else shape[:2]), dtype=dtype, layout=False) for name in names
    }
    tensors = {"input": _map_values(draw, shape)} | parameters
    options = {
        "activation": draw.choice(tuple(NORM_ACTIVATIONS)),
        "eps_mode": draw.choice(tuple(EPS_MODES)), "eps": draw.choice((1e-12, 1e-6, 2.0)),
    }  # fmt: skip

    def call(module, t):
        return (module.rms_norm_silu(**t, **options),)

    if options["eps_mode"] == "clamp" and is_near_bound(tensors["input"].double(), options["eps"]):
        return None

    def sizes(wide, oracle, incoming):
        if wide["input"].numel() == 0:
            return {}
        normal = rms_oracle(wide["input"], eps=options["eps"], eps_mode=options["eps_mode"], activation="none").abs()
        rrms = _largest(normal / wide["input"].abs().clamp(min=1e-300))
        return _norm_sizes(wide, oracle, incoming, rrms, shape[0] * math.prod(shape[2:]), draw.dtype)

    return _without_kink(Trial(call, tensors, tuple(tensors), sizes, draw.extreme), draw, options, call)


def norm_act_conv(draw: Draw) -> Trial | None:
    dims = draw.choice((1, 2, 2, 3))
    groups, width, out = draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 8)), draw.choice((1, 3, 8))
    positions = tuple(draw.choice((3, 4, 5, 7, 8)) if dims < 3 else draw.choice((3, 4)) for _ in range(dims))
    channels, batch = groups * width, draw.choice((0, 1, 1, 2)) if draw.chance(0.1) else draw.choice((1, 2))
    kernel = tuple(draw.choice((1, 3)) for _ in range(dims))
    tensors = {
        "input": arrange(draw.normal(batch, channels, *positions, layout=False), draw.choice(("contiguous", "last", "permuted", "sliced")))
    }
    if draw.chance(0.7):
        tensors |= {"norm_weight": draw.normal(channels), "norm_bias": draw.normal(channels)}
    # torch's own convolution refuses the gradient of some weights that are not contiguous.
    tensors["weight"] = draw.normal(out, channels, *kernel, layout=False) / math.sqrt(channels * math.prod(kernel))
    if draw.chance(0.5):
        tensors["bias"] = draw.normal(out)
    options = {
        "num_groups": groups, "activation": draw.choice(("silu", "none", "gelu")), "padding": draw.choice((0, 1, "same", "valid")),
        "stride": 1, "dilation": 1,
    }  # fmt: skip
    if options["padding"] != "same":
        options["stride"] = draw.choice((1, 1, 2))

    def call(module, t):
        given = {"norm_weight": None, "norm_bias": None} | t
        return (module.norm_act_conv(**given, **options),)

    def sizes(wide, oracle, incoming):
        """Bounds of the sums by the sums of absolute values; the input of the convolution is rounded to its dtype."""
        x, weight = wide["input"], wide["weight"]
        variance = x.reshape(batch, groups, -1).var(2, correction=0) if x.numel() else torch.ones(1)
        rstd = 1.0 / (float(variance.min()) + 1e-5) ** 0.5
        gain = 1.0 + _largest(wide.get("norm_weight", torch.ones(1)))
        normal = (1.0 + math.sqrt(width * math.prod(positions))) * gain + _largest(wide.get("norm_bias", torch.zeros(1)))
        flow, taps = max((_largest(g) for g in incoming), default=0.0), math.prod(kernel)
        of_weight = float(weight.abs().flatten(1).sum(1).max())
        through = flow * float(weight.abs().sum())
        terms = batch * math.prod(positions) * taps
        size = {
            "output 0": normal * of_weight + _largest(wide.get("bias", torch.zeros(1))),
            "gradient of input": 8.0 * rstd * gain * through * normal,
            "gradient of norm_weight": terms * through * normal,
            "gradient of norm_bias": terms * through,
            "gradient of weight": terms * flow * normal,
            "gradient of bias": terms * flow,
        }
        return {name: Size(value, value) for name, value in size.items()}

    return Trial(call, tensors, tuple(tensors), sizes, extreme=False)


def snake(draw: Draw) -> Trial:
    shape, _ = _feature_map(draw)
    scale = draw.choice((1e-3, 1.0, 1.0, 100.0))
    tensors = {"input": _map_values(draw, shape) * scale, "alpha": draw.uniform(shape[1]) + 0.5}
    if draw.chance(0.5):
        tensors["beta"] = draw.uniform(shape[1]) + 0.5

    def sizes(wide, oracle, incoming):
        """The phase has the rounding error of the product of frequency and input."""
        phase = 4.0 + 4.0 * wide["input"].abs()
        flow = incoming[0].double().abs()
        magnitude = 4.0 + 4.0 * _largest(wide["input"])
        through = magnitude * 4.0 * _largest(flow)
        terms = shape[0] * math.prod(shape[2:])
        shared = terms**0.5 * magnitude * through
        sizes = {"output 0": Size(phase, phase), "gradient of input": Size(4.0 * phase * flow, 4.0 * phase * flow)}
        return sizes | {f"gradient of {name}": Size(shared, shared) for name in ("alpha", "beta")}

    return Trial(lambda module, t: (module.snake(**t),), tensors, tuple(tensors), sizes, draw.extreme)


# Codebooks.


def _vectors(draw: Draw, rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    values = draw.normal(rows, dim, dtype=dtype)
    if draw.extreme and values.numel():
        values = values.contiguous()
        values[draw.random.randrange(rows), draw.random.randrange(dim)] = draw.choice((float("nan"), float("inf"), -float("inf"), 0.0))
    return values


def _codes(draw: Draw, x: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Any, near one another, several times the same, or some of the vectors: what a search has to tell apart."""
    kind, dim = draw.choice(("any", "any", "near", "twice", "vectors", "grid")), x.shape[1]
    codes = torch.randn(count, dim, generator=draw.generator, dtype=torch.float64)
    if kind == "near":
        codes = codes[:1] + 1e-6 * codes
    elif kind == "twice":
        codes = codes[torch.arange(count) // 2]
    elif kind == "vectors" and x.shape[0]:
        codes = x.double().nan_to_num(0.0, 0.0, 0.0)[torch.arange(count) % x.shape[0]]
    elif kind == "grid":
        codes = codes.round()
    return lay_out(codes.to(dtype), draw.choice(LAYOUTS))


def _search(draw: Draw) -> tuple[Tensor, Tensor]:
    rows, dim, count = (
        draw.choice((0, 1, 2, 7, 16, 33, 64)),
        draw.choice((1, 2, 3, 4, 5, 8, 9, 16, 17, 33)),
        draw.choice((1, 2, 3, 7, 16, 33, 65)),
    )
    if draw.extreme and rows == 0:
        rows = 3
    code_dtype = draw.dtype if draw.dtype == torch.float64 else draw.choice((draw.dtype, torch.float32))
    x = _vectors(draw, rows, dim, draw.dtype)
    return x, _codes(draw, x, count, code_dtype)


def _wrong_index(x: Tensor, codebook: Tensor, indices: Tensor) -> str | None:
    """Exact arithmetic decides where float64 does not agree; the fallback rounds as float64 does."""
    finite = torch.isfinite(x).all(-1)
    if bool(indices[~finite].any()):
        return f"vectors that are not finite have the indices {indices[~finite].tolist()}, not 0"
    try:
        assert_nearest(x[finite], codebook, indices[finite])
    except AssertionError:
        try:
            assert_nearest_in_float64(x[finite], codebook, indices[finite])
        except AssertionError as error:
            return f"a nearer code exists: {error}"
    return None


def nearest(draw: Draw) -> Trial:
    x, codebook = _search(draw)

    def check(tensors, actual):
        return _wrong_index(tensors["x"], tensors["codebook"], actual["output 0"])

    def sizes(wide, oracle, incoming):
        return {"output 1": Size(oracle["output 1"].nan_to_num(0.0, 0.0, 0.0))}

    return Trial(
        lambda module, t: module.vq_nearest(t["x"], t["codebook"], return_distance=True),
        {"x": x, "codebook": codebook}, (), sizes, draw.extreme,
        skip=("output 0",), check=check,
    )  # fmt: skip


def quantize(draw: Draw) -> Trial | None:
    # Vectors that are not finite are a matter of the search.
    draw.extreme = False
    x, codebook = _search(draw)
    options = {
        "commitment_cost": draw.choice((0.25, 0.0, 1.0)),
        "codebook_cost": draw.choice((1.0, 0.0, 0.5)),
        "gradient": draw.choice(GRADIENTS),
        "reduction": draw.choice(tuple(REDUCTIONS)),
    }
    if not _is_clear(x, codebook):
        return None

    def sizes(wide, oracle, incoming):
        x, codes = wide["x"], wide["codebook"][oracle["output 1"]]
        error, costs = (x - codes).abs(), options["commitment_cost"] + options["codebook_cost"]
        flow, by_loss = incoming[0].double().abs(), _weights(incoming[1], x.shape, options["reduction"])
        through = flow
        if options["gradient"] == "rotation":
            # Two reflections, each of which adds a projection of the whole row.
            scale = codes.norm(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
            through = scale * 8.0 * flow.norm(dim=1, keepdim=True) * (1.0 + _condition(x, codes))
        pull = 2.0 * by_loss * error
        shared = torch.zeros_like(wide["codebook"]).index_add_(0, oracle["output 1"], options["codebook_cost"] * pull)
        return {
            "output 0": Size(0.0),
            "output 2": Size(_reduced(costs * error.square(), options["reduction"])),
            "gradient of x": Size(through + options["commitment_cost"] * pull),
            "gradient of codebook": Size(shared),
        }

    return Trial(
        lambda module, t: tuple(module.vector_quantize(**t, **options)),
        {"x": x, "codebook": codebook},
        ("x", "codebook"),
        sizes,
        draw.extreme,
    )


def _condition(x: Tensor, codes: Tensor) -> Tensor:
    """How much the halfway vector of a rotation magnifies rounding: without bound where vector and code are opposite."""
    units = [t / t.norm(dim=1, keepdim=True).clamp(min=1e-300) for t in (x, codes)]
    return 4.0 / (units[0] + units[1]).norm(dim=1, keepdim=True).clamp(min=1e-6)


def _is_clear(x: Tensor, codebook: Tensor) -> bool:
    """Whether float64 tells the nearest code of each vector from all different ones, so that all searches find the same index."""
    finite = x.double()[torch.isfinite(x).all(-1)]
    if finite.shape[0] == 0 or codebook.shape[0] == 1:
        return True
    distances = (finite[:, None] - codebook.double()).square().sum(-1)
    least, index = distances.min(1, keepdim=True)
    same = (codebook[index[:, 0]][:, None] == codebook).all(-1)
    return bool((same | (distances - least > 1e-12 * distances)).all())


def residual(draw: Draw) -> Trial:
    """The definition rounds codes and what is left of a vector to its dtype, so the oracle is the reference's operator in that dtype."""
    rows, dim = draw.choice((0, 1, 2, 7, 17, 33)), draw.choice((1, 2, 3, 5, 8, 17))
    steps, count = draw.choice((1, 2, 3, 5)), draw.choice((1, 2, 7, 16, 33))
    codebooks = draw.normal(steps, count, dim, layout=False) * 0.5 ** torch.arange(steps).to(draw.dtype)[:, None, None]
    tensors = {"x": draw.normal(rows, dim), "codebooks": lay_out(codebooks, draw.choice(("contiguous", "permuted", "sliced", "offset")))}
    if draw.chance(0.4):
        tensors["mask"] = torch.rand(rows, generator=draw.generator) < 0.6
    options = {"commitment_cost": draw.choice((0.25, 1.0)), "codebook_cost": draw.choice((0.0, 0.7))}

    def call(module, t):
        return tuple(module.residual_quantize(t["x"], t["codebooks"], mask=t.get("mask"), **options))

    def sizes(wide, oracle, incoming):
        """Both round once, from sums in another order."""
        return {name: Size(max(1.0, _largest(t)), max(1.0, _largest(t)) if t.dtype.itemsize > 2 else 0.0, 2) for name, t in oracle.items()}

    return Trial(call, tensors, ("x", "codebooks"), sizes, extreme=False, oracle=lambda tensors: tensors, by_operator=True)


def moving_average(draw: Draw) -> Trial:
    x, codebook = _search(draw)
    count = codebook.shape[0]
    state = torch.float64 if draw.dtype == torch.float64 else torch.float32
    codebook = codebook.to(state)
    indices = torch.randint(-1, count, x.shape[:1], generator=draw.generator)
    tensors = {
        "codebook": codebook, "ema_count": draw.uniform(count, dtype=state) * 3.0, "ema_sum": draw.normal(*codebook.shape, dtype=state),
        "x": x, "indices": indices,
    }  # fmt: skip
    # An expanded tensor cannot be written to.
    tensors = {name: t.contiguous() for name, t in tensors.items()}
    options = {"decay": draw.choice((0.99, 0.5, 0.0, 1.0)), "eps": draw.choice((1e-5, 1e-2))}

    def call(module, t):
        moved = [t[name].clone() for name in ("codebook", "ema_count", "ema_sum")]
        return module.codebook_ema_update_(*moved, t["x"], t["indices"], **options), *moved

    def sizes(wide, oracle, incoming):
        kept = (indices >= 0) & torch.isfinite(x).all(-1)
        sums = torch.zeros_like(wide["codebook"]).index_add_(0, indices[kept], wide["x"][kept].abs())
        moved = options["decay"] * wide["ema_sum"].abs() + (1.0 - options["decay"]) * sums
        n = oracle["output 2"]
        total = n.sum()
        smoothed = (n + options["eps"]) / (total + count * options["eps"]) * total
        # Where a code is all but empty its count is the difference of rounded numbers.
        return {
            "output 1": Size(torch.where(smoothed[:, None] > 0, 4.0 * moved / smoothed[:, None], wide["codebook"].abs())),
            "output 2": Size(n.abs() + count),
            "output 3": Size(moved),
        }

    return Trial(call, tensors, (), sizes, draw.extreme)


def binary_entropy(draw: Draw) -> Trial:
    rows, dim = draw.choice((0, 1, 2, 7, 17, 40)), draw.choice((1, 2, 3, 4, 5, 7, 8))
    x = draw.values(rows, dim)
    tensors = {"x": x}
    if draw.chance(0.3):
        tensors["mask"] = torch.rand(rows, generator=draw.generator) < 0.6
    inv_temperature = draw.choice((0.0, 0.4, 1.0, 5.0, 100.0))

    def sizes(wide, oracle, incoming):
        """The bounds of the tests of the family."""
        largest = {name: max(_largest(t), 1.0) for name, t in oracle.items()}
        flow = max((_largest(g) for g in incoming), default=0.0)
        gradient = max(largest.get("gradient of x", 1.0), 4.0 * inv_temperature * flow)
        return {name: Size(size) for name, size in largest.items()} | {"gradient of x": Size(gradient, gradient)}

    return Trial(
        lambda module, t: module.binary_code_entropy(t["x"], inv_temperature, mask=t.get("mask")), tensors, ("x",), sizes, draw.extreme,
        backends=("fallback",), by_operator=draw.extreme,
    )  # fmt: skip


# Each with its share of the cases of a run, and the public functions that it calls.
FAMILIES: dict[str, tuple[Callable[[Draw], Trial | None], int, tuple[str, ...]]] = {
    "latent": (latent, 5, ("reparameterize", "kl_normal", "reparameterize_kl")),
    "reconstruction": (reconstruction, 5, ("binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "gaussian_nll")),
    "elbo": (elbo, 2, ("elbo_loss", "vae_loss")),
    "logistic_mixture": (logistic_mixture, 1, ("logistic_mixture_nll",)),
    "contractive_penalty": (contractive, 2, ("contractive_penalty",)),
    "jacobian_frobenius": (jacobian, 1, ("jacobian_frobenius", "explain_jacobian_method")),
    "group_norm": (group_norm, 2, ("group_norm_silu",)),
    "rms_norm": (rms_norm, 2, ("rms_norm_silu",)),
    "norm_act_conv": (norm_act_conv, 1, ("norm_act_conv",)),
    "snake": (snake, 2, ("snake",)),
    "nearest": (nearest, 2, ("vq_nearest",)),
    "quantize": (quantize, 2, ("vector_quantize",)),
    "residual_quantize": (residual, 1, ("residual_quantize",)),
    "moving_average": (moving_average, 2, ("codebook_ema_update_",)),
    "binary_entropy": (binary_entropy, 1, ("binary_code_entropy",)),
}
