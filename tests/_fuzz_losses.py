"""Cases of sampling, the KL, the losses of reconstruction and their sums."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from _fuzz import LAYOUTS, Draw, Size, Trial, widened
from _fuzz_bounds import ELEMENTS, any_shape, as_tuple, largest, loss_weights, reduced, size_of_argument
from _helpers import TOLERANCES, lay_out
from test_logistic_mixture import Case as MixtureCase
from test_logistic_mixture import size_of_gradients
from test_reconstruction import FORMS, form_shape
from torch import Tensor

from fastvae import functional as FV
from fastvae.ops._results import REDUCTIONS
from fastvae.reference import latent as latent_reference

# A kernel's exponential is 0 where it would be below the smallest normal float32, which is what this adds to a bound.
SMALLEST = torch.finfo(torch.float32).tiny / TOLERANCES[torch.float32]["atol"]
SCALAR_REDUCTIONS = ("batchmean", "sum", "mean")

# Sampling and the KL.


def latent(draw: Draw) -> Trial:
    name = draw.choice(("reparameterize", "kl_normal", "reparameterize_kl", "reparameterize_kl"))
    samples, learns, clamp = name != "kl_normal", name != "reparameterize", draw.choice(((-30.0, 20.0), (-30.0, 20.0), (-0.5, 0.5), None))
    shape = any_shape(draw)
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
        lambda module, t: as_tuple(getattr(module, name)(**t, **options)),
        tensors | noise,
        leaves,
        lambda wide, _, incoming: _latent_sizes(wide, incoming, samples, learns, options, draw.dtype),
        draw.extreme,
        oracle=oracle,
        # The derivative of torch.clamp at NaN is 0.
        by_operator=draw.extreme,
    )


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


def _latent_sizes(wide, incoming, samples, learns, options, dtype) -> dict[str, Size]:
    low, high = options["logvar_clamp"] or (-math.inf, math.inf)
    mu, logvar = wide["mu"], wide["logvar"].clamp(low, high)
    # Huge noise makes it large again.
    shape, sizes, sigma = mu.shape, {}, torch.exp(0.5 * logvar) + SMALLEST
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
    difference, precision = logvar - prior_logvar, torch.exp(-prior_logvar) + SMALLEST
    delta, magnitude = (mu - prior_mu).abs(), 1.0 + difference.abs()
    # exp multiplies the rounding of the difference by the difference.
    elements = 0.5 * (delta.square() * precision + latent_reference.variance_divergence(difference) * magnitude)
    reduction, free_bits = options["reduction"], options["free_bits"]
    sizes[f"output {int(samples)}"] = Size(reduced(elements + free_bits, reduction))
    weight = loss_weights(flowing[0], shape, reduction)
    excess = 0.5 * (torch.expm1(difference).abs() + (torch.exp(difference) * difference.abs()).nan_to_num(0.0, math.inf))
    by_mu, by_logvar = by_mu + weight * delta * precision, by_logvar + weight * excess
    sizes |= {"gradient of mu": Size(by_mu), "gradient of logvar": Size(by_logvar)}
    if "prior_mu" in wide:
        sizes["gradient of prior_mu"] = size_of_argument(weight * delta * precision, wide["prior_mu"], dtype)
        sizes["gradient of prior_logvar"] = size_of_argument(
            weight * (excess + 0.5 * delta.square() * precision), wide["prior_logvar"], dtype
        )
    return sizes


# Reconstruction losses.


def reconstruction(draw: Draw) -> Trial:
    name = draw.choice(("binary_cross_entropy_with_logits", "binary_cross_entropy", "mse_loss", "gaussian_nll"))
    shape, options = any_shape(draw), {"reduction": draw.choice(tuple(REDUCTIONS)), "grad_scale": draw.choice((1.0, 1.0, 0.25, -3.0))}
    tensors = {"input": _predictions(draw, name, shape), "target": _target(draw, name, shape)}
    leaves = ["input"]
    if name.startswith("binary"):
        if draw.chance(0.4):
            tensors["weight"] = draw.uniform(*form_shape(draw.choice(FORMS), shape)) + 0.5
        if name.endswith("logits") and draw.chance(0.4):
            tensors["pos_weight"] = draw.uniform(*form_shape(draw.choice(FORMS), shape)) + 0.5
    if name == "gaussian_nll":
        logvar = draw.values(*form_shape(draw.choice(FORMS), shape))
        # Beyond that its exponential leaves the range of float64 too, and there is no oracle.
        tensors["logvar"] = logvar.clamp(-200.0, 200.0) if logvar.dtype == torch.float64 else logvar
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
        # The gradient of a probability has torch's least denominator, which the derivative of the clamped logarithms has not.
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
    flow = loss_weights(incoming, x.shape, options["reduction"]) * weight
    scaled = options["reduction"] in SCALAR_REDUCTIONS and incoming != options["grad_scale"]
    # A gradient that the forward pass wrote is rounded once more where another one comes in than was expected.
    roundings = 2 if scaled and tensors["input"].element_size() > 2 else 1
    sizes = {
        "output 0": Size(reduced(elements * weight, options["reduction"])),
        "gradient of input": Size(flow * by_input, roundings=roundings),
        "gradient of target": Size(flow * by_target),
    }
    if by_logvar is not None:
        sizes["gradient of logvar"] = size_of_argument(flow * by_logvar, wide["logvar"], tensors["input"].dtype)
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
    error, precision = (x - t).abs() + image, torch.exp(-wide["logvar"]) + SMALLEST
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
    else:
        posteriors = {name: tensors[name] for name in ("mu", "logvar")}
        options["free_bits"] = _free_bits(draw, posteriors, (-30.0, 20.0))
        # Above what any of these posteriors has, below it, and none: rounding decides nothing.
        options["capacity"] = None if draw.extreme else draw.choice((None, None, 1e5, 0.0))

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
            {"logvar_clamp": (-30.0, 20.0), "free_bits": options.get("free_bits", 0.0), "reduction": options["reduction"]},
            draw.dtype,
        )
        parts = of_loss["output 0"].sums, of_kl["output 0"].sums
        return {
            "output 0": Size(parts[0] + options["beta"] * (parts[1] + (options.get("capacity") or 0.0) * max(shape[0], 1))),
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
        size = size_of_gradients(wide["input"].nan_to_num(), replace(case, spread=max(case.spread, largest(wide["input"]))))
        if draw.extreme:
            # The loss is a sum of logits and log scales, which are small beside the rest where they are not extreme.
            size += min(8.0 * case.channels * largest(wide["input"]), 1e150) ** 2
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
