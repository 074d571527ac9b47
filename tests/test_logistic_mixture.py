"""The mixture of discretized logistics against float64 and against an independent formula: values, gradients, shapes, layouts, limits."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from _helpers import (
    LAYOUTS,
    Recorder,
    Source,
    accumulated,
    assert_close,
    compiled_path,
    compiled_places,
    each_place,
    each_place_and_dtype,
    leaf,
    threads,
    wide_leaf,
)

import fastvae
from fastvae import functional as FV
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.logistic_mixture import MIN_LOG_SCALE, parameters_per_position
from fastvae.reference import logistic_mixture as reference

OPERATOR = "logistic_mixture_forward"
SCALAR_REDUCTIONS = ("batchmean", "sum", "mean")


@dataclass(frozen=True)
class Case:
    mixtures: int = 3
    channels: int = 3
    batch: int = 2
    spatial: tuple[int, ...] = (3, 5)
    reduction: str = "batchmean"
    target_dtype: torch.dtype = torch.uint8
    spread: float = 1.0
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    grad_scale: float = 1.0
    incoming: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, parameters_per_position(self.mixtures, self.channels), *self.spatial


def make_inputs(source: Source, case: Case):
    """Parameters whose components cover the image, and an image with many of the lowest and highest levels."""
    input = source.normal(*case.shape).mul(case.spread)
    image = source.image(case.batch, case.channels, *case.spatial)
    open_bins = source.uniform(*image.shape, dtype=torch.float32)
    image = torch.where(open_bins < 0.15, 0, torch.where(open_bins > 0.85, 255, image)).to(torch.uint8)
    target = image if case.target_dtype == torch.uint8 else (image.double() / 255).to(case.target_dtype)
    return source._place(input, case.layout, None), source._place(target, case.layout, target.dtype)


def evaluate(module, case: Case, input, target, **options):
    return module.logistic_mixture_nll(input, target, case.mixtures, case.reduction, **options)


def size_of_gradients(input: torch.Tensor, case: Case) -> float:
    """The size of the numbers that a gradient is computed from: a mixture's weight, 1 over the least scale, and what a rounded mean is
    away from its own."""
    start, count = case.mixtures * (case.channels + (case.mixtures > 1)), case.mixtures * case.channels
    log_scales = input[:, start : start + count].double().clamp(min=MIN_LOG_SCALE)
    inverse = float(torch.exp(-log_scales).max()) if log_scales.numel() else 1.0
    return 1.0 + 4.0 * inverse * (1.0 + inverse * (2.0 + case.spread))


def check(device: str, dtype: torch.dtype, case: Case) -> None:
    source = Source(device, dtype)
    input, target = make_inputs(source, case)
    narrow, wide = leaf(input), wide_leaf(input)
    loss = evaluate(FV, case, narrow, target, grad_scale=case.grad_scale)
    oracle = evaluate(reference, case, wide, target)
    assert loss.device == input.device
    size = size_of_gradients(input, case)
    assert_close(loss, oracle, accumulated(dtype, case.reduction), scale=math.sqrt(size))
    if case.incoming is not None and case.reduction in SCALAR_REDUCTIONS:
        cotangent = torch.full_like(loss, case.incoming)
    else:
        cotangent = source.normal(*loss.shape, layout=case.grad_layout, dtype=loss.dtype)
    (gradient,) = torch.autograd.grad(loss, narrow, cotangent)
    (expected,) = torch.autograd.grad(oracle, wide, cotangent.double())
    largest = float(cotangent.abs().max()) if cotangent.numel() else 0.0
    scaled = case.reduction in SCALAR_REDUCTIONS and cotangent != case.grad_scale
    assert_close(gradient, expected, dtype, scale=size * max(1.0, largest), roundings=2 if scaled and dtype.itemsize > 2 else 1)


# Each is checked with every reduction.
CASES = [
    *(Case(mixtures, channels) for mixtures in (1, 2, 10) for channels in (1, 3)),
    *(Case(2, channels) for channels in (2, 9)),
    *(Case(2, 3, batch, spatial) for batch, spatial in ((1, (1,)), (7, ()), (3, (257,)), (2, (16, 33)))),
    # With a spread of 3 many log scales lie below the least.
    *(Case(spread=spread) for spread in (0.0, 0.1, 3.0)),
    Case(grad_layout="expanded"),
]


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(place, dtype, case):
    for reduction in REDUCTIONS:
        check(place.device, dtype, replace(case, reduction=reduction))


@each_place_and_dtype(OPERATOR)
def test_incoming_gradients_and_floating_targets(place, dtype):
    for target_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        check(place.device, dtype, Case(target_dtype=target_dtype))
    for grad_scale in (1.0, 4.0):
        for incoming in (1.0, 4.0, 0.0):
            check(place.device, dtype, Case(reduction="sum", grad_scale=grad_scale, incoming=incoming))


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize(("batch", "spatial"), [(1, (1,)), (3, (63,)), (2, (41, 401))], ids=str)
def test_odd_sizes(place, dtype, batch, spatial):
    check(place.device, dtype, Case(2, 3, batch, spatial))


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(place, layout):
    for reduction in ("none", "sample", "mean"):
        check(place.device, torch.float32, Case(2, 3, reduction=reduction, layout=layout, grad_layout=layout))


def pixelcnnpp(input, target, mixtures):
    """``discretized_mix_logistic_loss`` of PixelCNN++ for RGB images, one value a position, with the difference of the two sigmoids as it
    stands: an independent formula, which needs float64."""
    x = 2.0 * target.double().movedim(1, -1) / 255.0 - 1.0
    parameters = input.movedim(1, -1)
    logits, means, log_scales, coefficients = parameters.split([mixtures, 3 * mixtures, 3 * mixtures, 3 * mixtures], -1)
    means, log_scales, coefficients = (t.unflatten(-1, (3, mixtures)) for t in (means, log_scales.clamp(min=-7.0), coefficients.tanh()))
    red, green, _ = x.unsqueeze(-1).unbind(-2)
    means = torch.stack(
        (
            means[..., 0, :],
            means[..., 1, :] + coefficients[..., 0, :] * red,
            means[..., 2, :] + coefficients[..., 1, :] * red + coefficients[..., 2, :] * green,
        ),
        -2,
    )
    centered = x.unsqueeze(-1) - means
    above = torch.sigmoid((centered + 1 / 255) * torch.exp(-log_scales))
    below = torch.sigmoid((centered - 1 / 255) * torch.exp(-log_scales))
    probabilities = torch.where(x.unsqueeze(-1) > 0.999, 1.0, above) - torch.where(x.unsqueeze(-1) < -0.999, 0.0, below)
    return -torch.logsumexp(F.log_softmax(logits, -1) + probabilities.log().sum(-2), -1)


@each_place(OPERATOR)
def test_the_formula_of_pixelcnnpp(place):
    input, target = make_inputs(Source(place.device), Case(5, spread=0.5))
    x, twin = leaf(input), wide_leaf(input)
    loss, expected = FV.logistic_mixture_nll(x, target, 5, "none"), pixelcnnpp(twin, target, 5)
    torch.testing.assert_close(loss, expected.float())
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x.grad, twin.grad.float(), rtol=1e-4, atol=1e-4)


@each_place(OPERATOR)
@pytest.mark.parametrize("mixtures", [1, 4])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_the_probabilities_of_all_levels_sum_to_one(place, mixtures, spread):
    input = Source(place.device).normal(1, parameters_per_position(mixtures, 1), 20) * spread
    levels = torch.arange(256, dtype=torch.uint8, device=place.device).view(256, 1, 1)
    losses = FV.logistic_mixture_nll(input.expand(256, -1, -1), levels.expand(256, 1, 20), mixtures, "none")
    torch.testing.assert_close(losses.neg().exp().sum(0), torch.ones(20, device=place.device), rtol=1e-4, atol=0)


@each_place(OPERATOR)
def test_coupled_channels_sum_to_one(place):
    """Over a channel, given those before it: the loss of two channels minus that of the first alone is conditional."""
    input = Source(place.device).normal(1, parameters_per_position(1, 2), 1)
    levels = torch.arange(256, dtype=torch.uint8, device=place.device)
    image = torch.stack((torch.full_like(levels, 77), levels), 1).unsqueeze(2)
    joint = FV.logistic_mixture_nll(input.expand(256, -1, -1), image, 1, "none").neg().exp().sum()
    first = FV.logistic_mixture_nll(input[:, [0, 2]], image[:1, :1], 1, "none").neg().exp().sum()
    torch.testing.assert_close(joint, first, rtol=1e-4, atol=0)


@each_place(OPERATOR)
def test_independent_channels(place):
    """The plain discretized logistic of several channels is that of grey images of more positions."""
    source = Source(place.device)
    input, target = source.normal(2, 6, 4, 5), source.image(2, 3, 4, 5)
    together = FV.logistic_mixture_nll(input.unflatten(1, (2, 3)), target.unsqueeze(1), 1, "sample")
    apart = sum(FV.logistic_mixture_nll(input[:, [c, 3 + c]], target[:, c : c + 1], 1, "sample") for c in range(3))
    torch.testing.assert_close(together, apart)


@each_place(OPERATOR)
def test_default_options(place):
    input, target = make_inputs(Source(place.device), Case(10))
    assert torch.equal(FV.logistic_mixture_nll(input, target), FV.logistic_mixture_nll(input, target, 10, "batchmean"))


@each_place(OPERATOR)
def test_reductions_of_one_another(place):
    input, target = make_inputs(Source(place.device), Case(batch=12))
    loss = {name: FV.logistic_mixture_nll(input, target, 3, name) for name in REDUCTIONS}
    torch.testing.assert_close(loss["none"].sum((1, 2)), loss["sample"])
    torch.testing.assert_close(loss["sample"].mean(), loss["batchmean"])
    torch.testing.assert_close(loss["sample"].sum(), loss["sum"])
    torch.testing.assert_close(loss["sum"] / loss["none"].numel(), loss["mean"])


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
@pytest.mark.parametrize(("mixtures", "channels"), [(1, 1), (3, 1), (2, 3)])
def test_gradcheck(place, mixtures, channels, reduction):
    case = Case(mixtures, channels, spatial=(4,), reduction=reduction, spread=0.7)
    input, target = make_inputs(Source(place.device, torch.float64), case)
    assert torch.autograd.gradcheck(lambda x: evaluate(FV, case, x, target), leaf(input))


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_floating_target_is_its_nearest_level(place, dtype):
    """Every level survives the rounding to 16 bits, and values outside [0, 1] count as its ends."""
    image = torch.arange(256, dtype=torch.uint8, device=place.device).view(1, 1, 256)
    input = Source(place.device).normal(1, 6, 256)
    expected = FV.logistic_mixture_nll(input, image, 2, "none")
    assert torch.equal(FV.logistic_mixture_nll(input, (image.double() / 255).to(dtype), 2, "none"), expected)
    outside = torch.tensor([-1.0, 2.0, math.inf, -math.inf], dtype=dtype, device=place.device).view(1, 1, 4)
    ends = torch.tensor([0, 255, 255, 0], dtype=torch.uint8, device=place.device).view(1, 1, 4)
    losses = [FV.logistic_mixture_nll(input[..., :4], t, 2, "none") for t in (outside, ends)]
    assert torch.equal(*losses)


@each_place(OPERATOR, dtype=torch.float64)
def test_a_level_is_found_in_the_precision_of_the_loss(place):
    """0.3 in float32 times 255 is a tie in float32, and above it in float64."""
    input = Source(place.device, torch.float64).normal(1, 2, 1)
    target, level = torch.full((1, 1, 1), 0.3, device=place.device), torch.full((1, 1, 1), 77, dtype=torch.uint8, device=place.device)
    assert torch.equal(FV.logistic_mixture_nll(input, target, 1), FV.logistic_mixture_nll(input, level, 1))


@each_place_and_dtype(OPERATOR)
def test_log_scales_of_every_size(place, dtype):
    """A bin that is e^-100 of a scale wide has its probability too; below the least log scale the gradient is 0."""
    log_scales = torch.tensor([-1e4, -8.0, -7.0, -6.9, 0.0, 20.0, 60.0, 100.0, 1e4])
    means, levels = torch.tensor([-3.0, -0.9, 0.0, 1.0]), torch.tensor([0.0, 1.0, 100.0, 255.0])
    log_scale, mean, level = torch.meshgrid(log_scales, means, levels, indexing="ij")
    input = torch.stack((mean, log_scale)).view(1, 2, -1).to(place.device, dtype)
    target = level.reshape(1, 1, -1).to(place.device, torch.uint8)
    x, wide = leaf(input), wide_leaf(input)
    loss, expected = FV.logistic_mixture_nll(x, target, 1, "none"), reference.logistic_mixture_nll(wide, target, 1, "none")
    assert loss.isfinite().all()
    assert_close(loss, expected, dtype, scale=1e3)
    loss.sum().backward()
    expected.sum().backward()
    assert_close(x.grad, wide.grad, dtype, scale=4.0 * math.exp(-MIN_LOG_SCALE))
    clamped = input[:, 1] < MIN_LOG_SCALE
    assert (x.grad[:, 1][clamped] == 0).all()
    assert (x.grad[:, 1][~clamped & (target[:, 0] == 100)] != 0).all()


@each_place(OPERATOR)
def test_a_component_that_is_switched_off(place):
    """A logit of -inf takes a component out."""
    input, target = make_inputs(Source(place.device), Case(3, 1))
    off = input.clone()
    off[:, 0] = -math.inf
    kept = input[:, [1, 2, 4, 5, 7, 8]]
    x, twin = leaf(off), leaf(kept)
    loss, expected = FV.logistic_mixture_nll(x, target, 3), FV.logistic_mixture_nll(twin, target, 2)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad[:, [1, 2, 4, 5, 7, 8]], twin.grad)
    assert (x.grad[:, [0, 3, 6]] == 0).all()


@each_place(OPERATOR)
@pytest.mark.parametrize("grad_scale", [1.0, 65536.0])
def test_any_incoming_gradient(place, grad_scale):
    case = Case(reduction="mean")
    input, target = make_inputs(Source(place.device), case)
    plain = leaf(input)
    (expected,) = torch.autograd.grad(evaluate(reference, case, plain, target), plain)
    for incoming in (1.0, 65536.0, -2.0, 0.0):
        x = leaf(input)
        loss = evaluate(FV, case, x, target, grad_scale=grad_scale)
        loss.backward(torch.full_like(loss, incoming))
        torch.testing.assert_close(x.grad, expected * incoming, rtol=1e-4, atol=1e-4 * abs(incoming) * float(expected.abs().max()))


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_rounded_once(place, dtype):
    case = Case(reduction="sum", spread=0.5)
    input, target = make_inputs(Source(place.device, dtype), case)
    for incoming in (1.0, 0.7, -3.3):
        x, wide = leaf(input), wide_leaf(input)
        evaluate(FV, case, x, target, grad_scale=2.0).mul(incoming).backward()
        evaluate(reference, case, wide, target).mul(incoming).backward()
        assert_close(x.grad, wide.grad, dtype, scale=50.0)


def check_written_over(device: str, backend: str) -> None:
    """What a backward pass on a GPU does where the expected gradient comes in, and where another one does."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        input, target = make_inputs(Source(device, dtype), Case(2))
        numbers = 2, REDUCTIONS["mean"]
        for incoming in (2.0, 0.7, math.nan):
            grad_output = torch.tensor(incoming, device=device)
            _, written = OPERATORS[OPERATOR].overloads[backend](input, target, *numbers, 2.0, True)
            OPERATORS["logistic_mixture_backward_"].overloads[backend](written, grad_output, 2.0, input, target, *numbers)
            expected = OPERATORS["logistic_mixture_backward"].overloads[backend](grad_output, input, target, *numbers)
            torch.testing.assert_close(written, expected, equal_nan=True)


@each_place("logistic_mixture_backward_")
def test_a_gradient_written_over_in_place(place):
    check_written_over(place.device, place.backend)


@each_place(OPERATOR)
def test_the_forward_pass_writes_the_gradient_of_a_scalar(place):
    for reduction, writes in (("mean", True), ("sum", True), ("batchmean", True), ("sample", False), ("none", False)):
        case = Case(reduction=reduction)
        input, target = make_inputs(Source(place.device), case)
        loss = evaluate(FV, case, leaf(input), target)
        with Recorder() as ran:
            loss.backward(torch.ones_like(loss))
        assert any(func._schema.name == "fastvae::logistic_mixture_backward" for func in ran.operators) != writes


@each_place(OPERATOR)
def test_a_retained_graph_serves_every_incoming_gradient(place):
    input, target = make_inputs(Source(place.device), Case())
    x = leaf(input)
    loss = FV.logistic_mixture_nll(x, target, 3)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0].clone()
    for factor in (3.0, 1.0, -0.5):
        (again,) = torch.autograd.grad(loss, x, torch.full_like(loss, factor), retain_graph=True)
        torch.testing.assert_close(again, factor * first)


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("batch", "spatial"), [(0, (4,)), (3, (0, 2))], ids=str)
def test_empty(place, reduction, batch, spatial):
    case = Case(2, 3, batch, spatial, reduction)
    input, target = make_inputs(Source(place.device), case)
    x = leaf(input)
    loss = evaluate(FV, case, x, target)
    assert loss.shape == {"none": (batch, *spatial), "sample": (batch,)}.get(reduction, ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert x.grad.shape == x.shape


@each_place_and_dtype(OPERATOR)
def test_nan_in_nan_out(place, dtype):
    """Each parameter of two components of two channels, and the target."""
    input, image = make_inputs(Source(place.device, dtype), Case(2, 2, 3, (4,)))
    target = image.to(dtype) / 255
    for name, row in [*(("input", row) for row in range(input.shape[1])), ("target", 0), ("target", 1)]:
        tensors = {"input": input.clone(), "target": target.clone()}
        tensors[name][1, row, 2] = math.nan
        x = tensors["input"].requires_grad_()
        loss = FV.logistic_mixture_nll(x, tensors["target"], 2, "none")
        assert loss.isnan().nonzero().tolist() == [[1, 2]]
        assert FV.logistic_mixture_nll(x, tensors["target"], 2).isnan()
        loss.sum().backward()
        assert {tuple(place) for place in x.grad.isnan().nonzero()[:, [0, 2]].tolist()} == {(1, 2)}


def run_once(place, reduction):
    input, target = make_inputs(Source(place.device), Case(3, 3, 4, (41, 13), reduction))
    x = leaf(input)
    loss = FV.logistic_mixture_nll(x, target, 3, reduction)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), x)]


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_agree_bitwise(place, reduction):
    assert all(torch.equal(a, b) for a, b in zip(run_once(place, reduction), run_once(place, reduction), strict=True))


@pytest.mark.parametrize("place", compiled_places(OPERATOR), ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_number_of_threads_changes_no_bit(place, reduction):
    runs = []
    for count in (1, 2):
        with threads(count):
            runs.append(run_once(place, reduction))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_each_instruction_set(instruction_set, dtype):
    for case in (Case(), Case(10, 1, 1, (700,), "sum"), Case(1, 3, 5, (), "sample")):
        check("cpu", dtype, case)
        assert fastvae._C.last_instruction_set("logistic_mixture") == compiled_path("logistic_mixture", instruction_set)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input": torch.zeros(2, 99, 4)}, ValueError, r"^input: got shape .*99, 4\), takes .* the parameters of 10 components"),
        ({"input": torch.zeros(2, 100, 5)}, ValueError, r"^input: got shape \(2, 100, 5\), takes \(2, 100, 4\)"),
        ({"input": torch.zeros(2, 100, 4, dtype=torch.int64)}, TypeError, "^input: got torch.int64, takes"),
        ({"target": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "^target: got torch.int64, takes"),
        ({"target": torch.zeros(2)}, ValueError, r"^target: got shape \(2,\), takes \(batch, channels, ...\)"),
        ({"target": torch.zeros(2, 3, 4, requires_grad=True)}, ValueError, "^target: got a tensor that requires grad"),
        ({"num_mixtures": 0}, ValueError, "^num_mixtures: got 0, takes a positive integer"),
        ({"num_mixtures": 2.0}, ValueError, "^num_mixtures: got 2.0, takes a positive integer"),
        ({"reduction": "average"}, ValueError, "^reduction: got 'average', takes one of"),
        ({"grad_scale": 0.0}, ValueError, "^grad_scale: got 0.0"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments(arguments, error, message):
    good = {"input": torch.zeros(2, 100, 4), "target": torch.zeros(2, 3, 4, dtype=torch.uint8)}
    with pytest.raises(error, match=message):
        FV.logistic_mixture_nll(**good | arguments)
