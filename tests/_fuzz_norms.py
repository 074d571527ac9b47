"""Cases of normalisations, the convolution behind one, and Snake."""

import math

import torch
import torch.nn.functional as F
from _fuzz import Draw, Size, Trial, widened
from _fuzz_bounds import ELEMENTS, largest
from test_group_norm import FUNCTIONS, arrange, is_near_kink
from test_rms_norm import is_near_bound
from test_rms_norm import oracle as rms_oracle
from torch import Tensor

from fastvae import reference
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES

# A norm without parameters has these values in their place.
NEUTRAL = {"norm_weight": 1.0, "norm_bias": 0.0}


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
        shifted = 1.0 + largest(wide["input"]) * rstd * 2.0**-10
        if draw.extreme:
            # One element may be all of a group: its projection is as large as the number of elements, and cancels.
            shifted *= 1.0 + width
        return _norm_sizes(wide, oracle, incoming, rstd * shifted, (shape[0] * math.prod(shape[2:])), draw.dtype)

    trial = Trial(call, tensors, tuple(tensors), sizes, draw.extreme)
    return _without_kink(trial, draw, options, call)


def _norm_sizes(wide, oracle, incoming, rstd: float, terms: int, dtype: torch.dtype) -> dict[str, Size]:
    factors = math.prod(1.0 + largest(t) for name, t in wide.items() if name not in ("input", "bias", "shift"))
    flow = max((largest(g) for g in incoming), default=0.0)
    size = {"output 0": 1.0 + largest(oracle["output 0"])}
    size["gradient of input"] = max(4.0 * rstd * factors * flow, largest(oracle["gradient of input"]))
    normal = 4.0 + (largest(wide["input"]) * rstd if rstd < 1.0 else 0.0)
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
    dim = draw.choice((1, 1, *range(2, len(shape)), -1))

    def call(module, t):
        """The channels are moved elsewhere and back."""
        moved = t | {"input": t["input"].movedim(1, dim)}
        return (module.rms_norm_silu(**moved, **options, dim=dim).movedim(dim, 1),)

    if options["eps_mode"] == "clamp" and is_near_bound(tensors["input"].double(), options["eps"]):
        return None

    def sizes(wide, oracle, incoming):
        if wide["input"].numel() == 0:
            return {}
        normal = rms_oracle(wide["input"], eps=options["eps"], eps_mode=options["eps_mode"], activation="none").abs()
        rrms = largest(normal / wide["input"].abs().clamp(min=1e-300))
        return _norm_sizes(wide, oracle, incoming, rrms, shape[0] * math.prod(shape[2:]), draw.dtype)

    return _without_kink(Trial(call, tensors, tuple(tensors), sizes, draw.extreme), draw, options, call)


def norm_act_conv(draw: Draw) -> Trial | None:
    dims, groups_of_convolution = draw.choice((1, 2, 2, 3)), draw.choice((1, 1, 1, 2))
    groups, width, out = draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 8)), draw.choice((1, 3, 8))
    width, out = width * groups_of_convolution, out * groups_of_convolution
    positions = tuple(draw.choice((3, 4, 5, 7, 8)) if dims < 3 else draw.choice((3, 4)) for _ in range(dims))
    channels, batch = groups * width, draw.choice((0, 1, 1, 2)) if draw.chance(0.1) else draw.choice((1, 2))
    kernel = tuple(draw.choice((1, 3)) for _ in range(dims))
    tensors = {
        "input": arrange(draw.normal(batch, channels, *positions, layout=False), draw.choice(("contiguous", "last", "permuted", "sliced")))
    }
    if draw.chance(0.7):
        tensors |= {"norm_weight": draw.normal(channels), "norm_bias": draw.normal(channels)}
    # torch's own convolution refuses the gradient of some weights that are not contiguous.
    tensors["weight"] = draw.normal(out, channels // groups_of_convolution, *kernel, layout=False) / math.sqrt(channels * math.prod(kernel))
    if draw.chance(0.5):
        tensors["bias"] = draw.normal(out)
    options = {
        "num_groups": groups, "activation": draw.choice(tuple(NORM_ACTIVATIONS)), "padding": draw.choice((0, 1, "same", "valid")),
        "stride": 1, "dilation": 1 if 3 in kernel and min(positions) < 5 else draw.choice((1, 1, 2)), "groups": groups_of_convolution,
    }  # fmt: skip
    if options["padding"] != "same":
        options["stride"] = draw.choice((1, 1, 2))

    def call(module, t):
        given = {"norm_weight": None, "norm_bias": None} | t
        return (module.norm_act_conv(**given, **options),)

    def norm(module, t):
        return (module.group_norm_silu(t["input"], groups, t.get("norm_weight"), t.get("norm_bias"), activation=options["activation"]),)

    def sizes(wide, oracle, incoming):
        return _norm_act_conv_sizes(wide, incoming[0].double().abs(), options)

    draw.extreme = False
    return _without_kink(Trial(call, tensors, tuple(tensors), sizes, extreme=False), draw, options, norm)


def _norm_act_conv_sizes(wide: dict[str, Tensor], flow: Tensor, options: dict) -> dict[str, Size]:
    """Sums of absolute values through the convolution, its two gradients and the gradient of the norm; each of them is rounded."""
    x, groups = wide["input"], options["num_groups"]
    per_channel = (1, -1) + (1,) * (x.ndim - 2)
    weight, bias = (wide.get(name, torch.full((x.shape[1],), value)).view(per_channel) for name, value in NEUTRAL.items())
    normal = F.group_norm(x, groups)
    u = (normal * weight + bias).requires_grad_()
    through = FUNCTIONS[options["activation"]](u)
    (slope,) = torch.autograd.grad(through.sum(), u)
    # Weight and bias may cancel each other, and so may the input and its mean.
    lost = slope.abs() * (_uncancelled(x, groups) * weight.abs() + bias.abs())
    # Far below 0 the error function of GELU is next to -1, to which 1 is added.
    lost = lost + (0.1 * u.detach().abs() if options["activation"] == "gelu" else 0.0)
    size, kernel = (through.detach().abs() + lost).requires_grad_(), wide["weight"].abs().requires_grad_()
    convolve = (F.conv1d, F.conv2d, F.conv3d)[x.ndim - 3]
    output = convolve(size, kernel, None, *(options[name] for name in ("stride", "padding", "dilation", "groups")))
    of_size, of_kernel = torch.autograd.grad(output, (size, kernel), flow)
    # A derivative of an activation that is next to 0 is a difference of numbers up to 1.
    scaled = of_size * (slope.abs() + 0.1)
    positions = tuple(d for d in range(x.ndim) if d != 1)
    sizes = {
        "output 0": output.detach() + wide.get("bias", torch.zeros(1)).abs().view(per_channel),
        "gradient of input": _norm_gradient_size(x, normal, scaled * weight.abs(), groups),
        "gradient of norm_weight": (scaled * normal.abs()).sum(positions),
        "gradient of norm_bias": scaled.sum(positions),
        "gradient of weight": of_kernel,
        "gradient of bias": flow.sum(positions),
    }
    return {name: Size(4.0 * size, 2.0 * size) for name, size in sizes.items()}


def _norm_gradient_size(x: Tensor, normal: Tensor, gradient: Tensor, groups: int) -> Tensor:
    """The gradient of a norm's input adds the incoming one and its two projections, which cancel; this is the size before they do."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    grouped, normal, gradient = (t.reshape(x.shape[0], groups, -1) for t in (x, normal.abs(), gradient))
    rstd = torch.rsqrt(grouped.var(2, correction=0, keepdim=True) + 1e-5)
    size = gradient + gradient.mean(2, keepdim=True) + normal * (gradient * normal).mean(2, keepdim=True)
    return (rstd * size).reshape(x.shape) * _digits_of_mean(x, groups)


def _uncancelled(x: Tensor, groups: int) -> Tensor:
    """The size of normalised elements before the mean is taken from them."""
    if x.numel() == 0:
        return torch.zeros_like(x)
    grouped = x.reshape(x.shape[0], groups, -1)
    rstd = torch.rsqrt(grouped.var(2, correction=0, keepdim=True) + 1e-5)
    return (rstd * (grouped.abs() + grouped.abs().mean(2, keepdim=True))).reshape(x.shape)


def _digits_of_mean(x: Tensor, groups: int) -> Tensor:
    """By how much rounding grows where a mean is large beside the deviations, which are differences from it."""
    if x.numel() == 0:
        return torch.ones_like(x)
    grouped = x.reshape(x.shape[0], groups, -1)
    rstd = torch.rsqrt(grouped.var(2, correction=0, keepdim=True) + 1e-5)
    return (1.0 + grouped.abs().amax(2, keepdim=True) * rstd * 2.0**-10).expand(grouped.shape).reshape(x.shape)


def snake(draw: Draw) -> Trial:
    shape, _ = _feature_map(draw)
    scale = draw.choice((1e-3, 1.0, 1.0, 100.0))
    tensors = {"input": _map_values(draw, shape) * scale, "alpha": draw.uniform(shape[1]) + 0.5}
    if draw.chance(0.5):
        tensors["beta"] = draw.uniform(shape[1]) + 0.5
    return Trial(
        lambda module, t: (module.snake(**t),),
        tensors,
        tuple(tensors),
        lambda wide, _, incoming: _snake_sizes(wide, incoming[0].double()),
        draw.extreme,
    )


def _snake_sizes(wide: dict[str, Tensor], flow: Tensor) -> dict[str, Size]:
    """The sine has the rounding error of the product of frequency and input."""
    x, per_channel = wide["input"], (1, -1) + (1,) * (wide["input"].ndim - 2)
    frequency, gain = wide["alpha"].view(per_channel), 1.0 / wide.get("beta", wide["alpha"]).view(per_channel)
    phase, positions = 1.0 + 2.0 * (frequency * x).abs(), tuple(d for d in range(x.ndim) if d != 1)
    slope = 2.0 * frequency * gain * flow.abs()
    sizes = {"output 0": Size(x.abs() + gain * phase), "gradient of input": Size(flow.abs() + slope * phase)}
    of_frequency, of_gain = 2.0 * gain * x * flow, gain.square() * flow
    sums = [(terms.abs() * phase).sum(positions) for terms in (of_frequency, of_gain)]
    if "beta" in wide:
        return sizes | {"gradient of alpha": Size(sums[0]), "gradient of beta": Size(sums[1])}
    # Both parts are rounded to the dtype of alpha before they are added.
    sine, cosine = torch.sin(frequency * x), torch.cos(frequency * x)
    parts = (of_frequency * sine * cosine).sum(positions).abs() + (of_gain * sine.square()).sum(positions).abs()
    return sizes | {"gradient of alpha": Size(sums[0] + sums[1], parts)}
