"""The reconstruction losses and the ELBO against float64: values, gradients, shapes, layouts, broadcast arguments, limits."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from _helpers import (
    LAYOUTS,
    TOLERANCES,
    Recorder,
    Source,
    accumulated,
    assert_close,
    assert_gradient_close,
    compiled_path,
    compiled_places,
    each_place,
    each_place_and_dtype,
    lay_out,
    leaf,
    places,
    threads,
    wide_leaf,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch.distributions import Bernoulli, Normal, kl_divergence

import fastvae
from fastvae import _backend
from fastvae import functional as FV
from fastvae.functional._call import expected_gradient
from fastvae.functional.reconstruction import MAX_SHARED_LOGVAR
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.reconstruction import LIKELIHOODS
from fastvae.reference import reconstruction as reference

OPERATOR = "reconstruction_forward"
BOTH = ("latent_forward", OPERATOR)  # what the ELBO needs
SCALAR_REDUCTIONS = ("batchmean", "sum", "mean")
FORMS = ("scalar", "last", "suffix", "channel", "batch", "leading", "mixed", "full")

each_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)


def form_shape(form: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an argument that broadcasts to ``shape``."""
    if form == "scalar" or not shape:
        return ()
    if form == "last":
        return (*(1,) * (len(shape) - 1), shape[-1])
    if form == "suffix":
        return shape[1:]
    if form == "channel":
        return (*shape[1:2], *(1,) * (len(shape) - 2))
    if form == "batch":
        return (shape[0], *(1,) * (len(shape) - 1))
    if form == "leading":
        return (*shape[:2], *(1,) * (len(shape) - 2))
    if form == "mixed":
        return tuple(size if d % 2 == 0 else 1 for d, size in enumerate(shape))
    return shape


@dataclass(frozen=True)
class Case:
    likelihood: str
    shape: tuple[int, ...]
    reduction: str = "mean"
    target_dtype: torch.dtype | None = None
    weight: str | None = None
    pos_weight: str | None = None
    logvar: str = "full"
    shared_dtype: torch.dtype | None = None
    layout: str = "contiguous"
    target_layout: str = "contiguous"
    grad_layout: str = "contiguous"
    grad_scale: float = 1.0
    incoming: float | None = None
    target_gradient: bool = False
    seed: int = 0


shapes = st.lists(st.sampled_from((0, 1, 2, 3, 5, 20, 63, 130)), max_size=4).filter(lambda sizes: math.prod(sizes) <= 20_000).map(tuple)
cases = st.builds(
    Case,
    likelihood=st.sampled_from(tuple(LIKELIHOODS)),
    shape=shapes,
    reduction=st.sampled_from(tuple(REDUCTIONS)),
    target_dtype=st.sampled_from((None, torch.float32, torch.bfloat16, torch.float16, torch.uint8)),
    weight=st.sampled_from((None, *FORMS)),
    pos_weight=st.sampled_from((None, *FORMS)),
    logvar=st.sampled_from(FORMS),
    shared_dtype=st.sampled_from((None, torch.float32, torch.float64)),
    layout=st.sampled_from(LAYOUTS),
    target_layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    grad_scale=st.sampled_from((1.0, 0.25, -3.0)),
    incoming=st.sampled_from((None, 1.0, 0.25, -3.0, 0.0)),
    target_gradient=st.booleans(),
    seed=st.integers(0, 2**31),
)


def evaluate(module, case: Case, input, target, weight, pos_weight, logvar, **options):
    """A loss by its public name, of ``fastvae.functional`` or of the reference."""
    if case.likelihood == "bce_with_logits":
        return module.binary_cross_entropy_with_logits(input, target, weight, case.reduction, pos_weight, **options)
    if case.likelihood == "bce":
        return module.binary_cross_entropy(input, target, weight, case.reduction, **options)
    if case.likelihood == "mse":
        return module.mse_loss(input, target, case.reduction, **options)
    return module.gaussian_nll(input, target, logvar, case.reduction, **options)


def make_inputs(source: Source, case: Case):
    if case.likelihood == "bce":
        # The gradient divides by x (1 - x): near the borders, which have a test of their own, it multiplies the rounding of its numerator.
        input = lay_out(source.uniform(*case.shape) * 0.8 + 0.1, case.layout)
    else:
        input = source.normal(*case.shape, layout=case.layout)
    if case.target_dtype == torch.uint8:
        target = source.image(*case.shape, layout=case.target_layout)
    else:
        target = source.uniform(*case.shape, layout=case.target_layout, dtype=case.target_dtype)
    shared = [
        source.uniform(*form_shape(form, case.shape), dtype=case.shared_dtype) + 0.5 if form else None
        for form in (case.weight, case.pos_weight)
    ]
    logvar = source.normal(*form_shape(case.logvar, case.shape), dtype=case.shared_dtype) if case.likelihood == "gaussian" else None
    return input, target, *shared, logvar


def widen(tensor):
    if tensor is None:
        return None
    return tensor.double() / 255 if tensor.dtype == torch.uint8 else tensor.double()


def check(device: str, dtype: torch.dtype, case: Case) -> None:
    source = Source(device, dtype, case.seed)
    input, target, weight, pos_weight, logvar = make_inputs(source, case)
    differentiable_target = case.target_gradient and target.is_floating_point()
    leaves = [leaf(input), leaf(target) if differentiable_target else target, None if logvar is None else leaf(logvar)]
    wide = [wide_leaf(input), widen(target), None if logvar is None else wide_leaf(logvar.expand(input.shape))]
    if differentiable_target:
        wide[1].requires_grad_()

    loss = evaluate(FV, case, *leaves[:2], weight, pos_weight, leaves[2], grad_scale=case.grad_scale)
    oracle = evaluate(reference, case, *wide[:2], widen(weight), widen(pos_weight), wide[2])
    assert loss.device == input.device
    promoted = torch.promote_types(dtype, target.dtype) if target.is_floating_point() else dtype
    assert_close(loss, oracle, accumulated(promoted, case.reduction))

    if case.incoming is not None and case.reduction in SCALAR_REDUCTIONS:
        cotangent = torch.full_like(loss, case.incoming)
    else:
        cotangent = source.normal(*loss.shape, layout=case.grad_layout, dtype=loss.dtype)
    wanted = [i for i, t in enumerate(leaves) if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(loss, [leaves[i] for i in wanted], cotangent)
    expected = torch.autograd.grad(oracle, [wide[i] for i in wanted], cotangent.double())
    # A gradient that the forward pass wrote is rounded once more where the incoming one is not the expected, but for 16-bit ones.
    scaled = case.reduction in SCALAR_REDUCTIONS and cotangent != case.grad_scale
    scale = max(1.0, float(cotangent.abs().max())) if cotangent.numel() else 1.0
    for gradient, full_oracle in zip(gradients, expected, strict=True):
        roundings = 2 if scaled and gradient.element_size() > 2 else 1
        assert_gradient_close(gradient, full_oracle, scale=scale, roundings=roundings)


@each_place_and_dtype(OPERATOR)
@given(case=cases)
@example(case=Case("bce_with_logits", (), "sample"))
@example(case=Case("mse", (0, 5), "mean"))
@example(case=Case("bce_with_logits", (4, 3, 8, 6), "batchmean", torch.uint8, layout="channels_last", target_layout="channels_last"))
@example(case=Case("gaussian", (4, 3, 8, 6), "sum", logvar="channel", layout="channels_last"))
def test_matches_float64(place, dtype, case):
    assume(case.shared_dtype != torch.float64 or dtype == torch.float64 or case.likelihood != "gaussian")
    check(place.device, dtype, case)


@each_place_and_dtype(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("shape", [(1,), (63,), (41, 401), (513, 1), (1, 4097)], ids=str)
def test_odd_sizes(place, dtype, likelihood, shape):
    for reduction in REDUCTIONS:
        check(place.device, dtype, Case(likelihood, shape, reduction))
    check(place.device, dtype, Case(likelihood, shape, "batchmean", torch.uint8, weight="last", logvar="last"))


@each_place(OPERATOR)
@each_likelihood
def test_a_million_and_one(place, likelihood):
    check(place.device, torch.float32, Case(likelihood, (1_000_001,), "sum", torch.uint8, logvar="scalar"))


def test_the_oracle_is_torch():
    source = Source("cpu", torch.float64)
    logits, noise = source.normal(2, 30, 7)
    probabilities, target, weight = source.uniform(3, 30, 7)
    pos_weight = source.uniform(7)
    for reduction in ("none", "mean", "sum"):
        ours = reference.binary_cross_entropy_with_logits(logits, target, weight, reduction, pos_weight)
        expected = F.binary_cross_entropy_with_logits(logits, target, weight, reduction=reduction, pos_weight=pos_weight)
        torch.testing.assert_close(ours, expected)
        ours = reference.binary_cross_entropy(probabilities, target, weight, reduction)
        torch.testing.assert_close(ours, F.binary_cross_entropy(probabilities, target, weight, reduction=reduction))
        torch.testing.assert_close(reference.mse_loss(logits, target, reduction), F.mse_loss(logits, target, reduction=reduction))
        ours = reference.gaussian_nll(logits, target, noise, reduction)
        expected = F.gaussian_nll_loss(logits, target, noise.exp(), full=True, eps=1e-30, reduction=reduction)
        torch.testing.assert_close(ours, expected)
    nll = reference.gaussian_nll(logits, target, noise, "batchmean")
    torch.testing.assert_close(nll, -Normal(logits, noise.mul(0.5).exp()).log_prob(target).sum(1).mean())
    torch.testing.assert_close(reference.binary_cross_entropy_with_logits(logits, target, reduction="sample").shape, torch.Size([30]))


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_torch_nn_functional(place, reduction):
    """Values and gradients of torch's own losses, in float32 and with torch's argument order."""
    source = Source(place.device)
    logits, target, probabilities = source.normal(40, 30), source.uniform(40, 30), source.uniform(40, 30)
    weight, pos_weight = source.uniform(30), source.uniform(30)
    pairs = [
        (FV.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits, logits, (weight,), {"pos_weight": pos_weight}),
        (FV.binary_cross_entropy, F.binary_cross_entropy, probabilities, (weight,), {}),
        (FV.mse_loss, F.mse_loss, logits, (), {}),
    ]
    for ours, theirs, values, args, kwargs in pairs:
        a, b = leaf(values), leaf(values)
        loss, expected = ours(a, target, *args, reduction=reduction, **kwargs), theirs(b, target, *args, reduction=reduction, **kwargs)
        torch.testing.assert_close(loss, expected)
        (2 * loss.sum()).backward()
        (2 * expected.sum()).backward()
        torch.testing.assert_close(a.grad, b.grad)


@each_place(OPERATOR)
def test_default_reductions(place):
    source = Source(place.device)
    input, target = source.uniform(2, 6, 5)
    for loss in (FV.binary_cross_entropy_with_logits, FV.binary_cross_entropy, FV.mse_loss):
        assert torch.equal(loss(input, target), loss(input, target, reduction="mean"))
    assert torch.equal(FV.gaussian_nll(input, target, 0.0), FV.gaussian_nll(input, target, 0.0, reduction="batchmean"))


@each_place(OPERATOR)
@each_likelihood
def test_reductions_of_one_another(place, likelihood):
    case = Case(likelihood, (12, 5, 3), weight="suffix", pos_weight="last")
    inputs = make_inputs(Source(place.device), case)
    loss = {name: evaluate(FV, replace(case, reduction=name), *inputs) for name in REDUCTIONS}
    torch.testing.assert_close(loss["none"].sum((1, 2)), loss["sample"])
    torch.testing.assert_close(loss["sample"].mean(), loss["batchmean"])
    torch.testing.assert_close(loss["sample"].sum(), loss["sum"])
    torch.testing.assert_close(loss["sum"] / loss["none"].numel(), loss["mean"])


@each_place(OPERATOR, dtype=torch.float64)
@each_likelihood
@pytest.mark.parametrize("reduction", ["none", "sample", "mean"])
@pytest.mark.parametrize("with_logvar", [False, True])
def test_gradcheck(place, likelihood, reduction, with_logvar):
    """Also with a target that requires a gradient."""
    case = Case(likelihood, (3, 4), reduction, weight="last", pos_weight="batch", logvar="last")
    input, target, weight, pos_weight, logvar = make_inputs(Source(place.device, torch.float64), case)
    inputs = [leaf(input), leaf(target)]
    if with_logvar and logvar is not None:
        inputs.append(leaf(logvar))

    def function(input, target, logvar=logvar):
        return evaluate(FV, case, input, target, weight, pos_weight, logvar)

    assert torch.autograd.gradcheck(function, inputs)


@each_place(OPERATOR)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_broadcast_arguments(place, form, layout, reduction):
    shape = (4, 3, 6, 5)
    check(place.device, torch.float32, Case("bce_with_logits", shape, reduction, weight=form, pos_weight="full", layout=layout))
    check(place.device, torch.float32, Case("bce_with_logits", shape, reduction, weight="batch", pos_weight=form, layout=layout))
    check(place.device, torch.float32, Case("bce", shape, reduction, weight=form, target_layout=layout))
    check(place.device, torch.float32, Case("gaussian", shape, reduction, logvar=form, layout=layout))


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_broadcast_arguments(place, reduction, layout):
    source = Source(place.device)
    input, target = source.normal(2, 4, 6, 5, 3)
    weight, pos_weight = (source.uniform(*shape, layout=layout) for shape in ((6, 5, 3), (4, 1, 1, 1)))
    ours = FV.binary_cross_entropy_with_logits(input, target, weight, reduction, pos_weight)
    expected = FV.binary_cross_entropy_with_logits(input, target, weight.contiguous(), reduction, pos_weight.contiguous())
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@each_place(OPERATOR)
@pytest.mark.parametrize("count", [MAX_SHARED_LOGVAR, MAX_SHARED_LOGVAR + 1, 20_000])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_many_shared_log_variances(place, count, reduction):
    check(place.device, torch.float32, Case("gaussian", (3, count), reduction, logvar="last"))
    check(place.device, torch.float32, Case("gaussian", (count, 3), reduction, logvar="batch"))


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_shared_log_variance_is_summed_at_full_precision(place, dtype, reduction):
    """Its gradient is rounded once, after the sum."""
    source = Source(place.device, dtype)
    input, target = source.normal(2, 50, 400)
    for logvar in (source.normal(), source.normal(400)):
        narrow, wide = leaf(logvar), wide_leaf(logvar)
        FV.gaussian_nll(input, target, narrow, reduction).sum().backward()
        reference.gaussian_nll(input.double(), target.double(), wide, reduction).sum().backward()
        magnitude = float(wide.grad.abs().max()) if dtype.itemsize >= 4 else 0.0
        assert_close(narrow.grad, wide.grad, dtype, magnitude=magnitude)


@each_place(OPERATOR)
def test_forms_of_the_log_variance(place):
    source = Source(place.device)
    input, target = source.normal(2, 5, 3, 4, 3)
    for number in (0, 0.7, -2.0):
        ours = FV.gaussian_nll(input, target, number)
        torch.testing.assert_close(ours, FV.gaussian_nll(input, target, torch.full_like(input, number)))
    one = source.normal(1)
    torch.testing.assert_close(FV.gaussian_nll(input, target, one), FV.gaussian_nll(input, target, one.expand(input.shape)))
    # The shape says what the values are of, as in any torch expression: a vector is of the last dimension, however many channels there are.
    values = source.normal(3)
    for form in (values, values.view(3, 1, 1), values.view(1, 3, 1, 1)):
        torch.testing.assert_close(FV.gaussian_nll(input, target, form), FV.gaussian_nll(input, target, form.expand(input.shape)))


@each_place(OPERATOR)
def test_a_log_variance_that_does_not_broadcast_is_named(place):
    source = Source(place.device)
    input, target = source.normal(2, 5, 3, 4, 6)
    with pytest.raises(ValueError, match=r"^logvar: got shape \(3,\), takes one that broadcasts to that of input, \(5, 3, 4, 6\)"):
        FV.gaussian_nll(input, target, source.normal(3))


@each_place_and_dtype(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_8_bit_target_means_value_over_255(place, dtype, likelihood, layout):
    source = Source(place.device, dtype)
    case = Case(likelihood, (4, 3, 17, 9), "sum", torch.uint8, layout=layout, target_layout=layout, logvar="scalar")
    input, target, _, _, logvar = make_inputs(source, case)
    wide_target = target.to(torch.float64 if dtype == torch.float64 else torch.float32) / 255
    leaves = [leaf(input), leaf(input)]
    losses = [evaluate(FV, case, x, t, None, None, logvar) for x, t in zip(leaves, (target, wide_target), strict=True)]
    assert_close(losses[0], losses[1].double(), losses[1].dtype)
    for loss in losses:
        loss.backward()
    assert_close(leaves[0].grad, leaves[1].grad.double(), dtype, roundings=2)


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8])
def test_a_target_keeps_its_precision(place, likelihood, dtype, target_dtype):
    """A float32 target is not rounded to the dtype of 16-bit logits."""
    for reduction in ("none", "sample", "batchmean"):
        check(place.device, dtype, Case(likelihood, (33, 20), reduction, target_dtype, target_gradient=True))


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_target_that_learns(place, likelihood, reduction):
    check(place.device, torch.float32, Case(likelihood, (33, 20), reduction, weight="last", pos_weight="last", target_gradient=True))
    source = Source(place.device)
    case = Case(likelihood, (6, 5), reduction)
    input, target, _, _, logvar = make_inputs(source, case)
    target, twin = leaf(target), leaf(target)
    evaluate(FV, case, input, target, None, None, logvar).sum().backward()
    evaluate(reference, case, input, twin, None, None, logvar).sum().backward()
    torch.testing.assert_close(target.grad, twin.grad)


@each_place(OPERATOR)
def test_only_the_log_variance_learns(place):
    input, target = Source(place.device).normal(2, 20, 30)
    logvar, twin = (leaf(torch.full((), 0.3, device=place.device)) for _ in range(2))
    FV.gaussian_nll(input, target, logvar).backward()
    reference.gaussian_nll(input, target, twin).backward()
    torch.testing.assert_close(logvar.grad, twin.grad)


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("grad_scale", [1.0, 65536.0, 0.25])
def test_any_incoming_gradient(place, likelihood, grad_scale):
    """``grad_scale`` says what is expected and does not change any result."""
    case = Case(likelihood, (33, 20), "mean")
    input, target, _, _, logvar = make_inputs(Source(place.device), case)
    plain = leaf(input)
    expected_loss = evaluate(reference, case, plain, target, None, None, logvar)
    (expected,) = torch.autograd.grad(expected_loss, plain)
    for incoming in (1.0, 65536.0, 0.25, -2.0, 0.0, math.inf):
        x = leaf(input)
        loss = evaluate(FV, case, x, target, None, None, logvar, grad_scale=grad_scale)
        torch.testing.assert_close(loss, expected_loss)
        loss.backward(torch.full_like(loss, incoming))
        magnitude = float(expected.abs().max()) * (abs(incoming) if math.isfinite(incoming) else 1.0)
        torch.testing.assert_close(x.grad, expected * incoming, rtol=1e-5, atol=1e-6 * magnitude, equal_nan=True)


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_gradient_is_rounded_once(place, likelihood, dtype):
    """Whatever comes in, also where the forward pass wrote a gradient for another number."""
    input, target, _, _, logvar = make_inputs(Source(place.device, dtype), Case(likelihood, (33, 20), logvar="last"))
    for incoming in (1.0, 0.7, -3.3):
        leaves = [leaf(input)] + ([] if logvar is None else [leaf(logvar)])
        wide = [wide_leaf(t) for t in leaves]
        case = Case(likelihood, (33, 20), "sum")
        evaluate(FV, case, leaves[0], target, None, None, leaves[-1], grad_scale=2.0).mul(incoming).backward()
        evaluate(reference, case, wide[0], target.double(), None, None, wide[-1]).mul(incoming).backward()
        assert_close(leaves[0].grad, wide[0].grad, dtype, scale=4.0)


def check_written_over(device: str, backend: str, likelihood: str) -> None:
    """What a backward pass on a GPU does where the expected gradient comes in, and where another one does."""
    for dtype, form in ((torch.float32, "scalar"), (torch.float16, "last"), (torch.bfloat16, "full")):
        input, target, _, _, logvar = make_inputs(Source(device, dtype), Case(likelihood, (33, 20), logvar=form))
        logvar = None if logvar is None else logvar.view(*(1,) * (2 - logvar.ndim), *logvar.shape)
        operands, numbers = (input, target, None, None, logvar), (LIKELIHOODS[likelihood], REDUCTIONS["mean"])
        for incoming in (2.0, 0.7, math.nan):
            grad_output = torch.tensor(incoming, device=device)
            _, *written = OPERATORS["reconstruction_forward"].overloads[backend](*operands, *numbers, 2.0, True)
            OPERATORS["reconstruction_backward_"].overloads[backend](*written, grad_output, 2.0, *operands, *numbers)
            grad_input, _, grad_logvar = OPERATORS["reconstruction_backward"].overloads[backend](grad_output, *operands, *numbers, False)
            torch.testing.assert_close(written, [grad_input, grad_logvar], equal_nan=True)


@each_place("reconstruction_backward_")
@each_likelihood
def test_gradients_written_over_in_place(place, likelihood):
    check_written_over(place.device, place.backend, likelihood)


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("reduction", ["sample", "mean"])
def test_a_retained_graph_serves_every_incoming_gradient(place, likelihood, reduction):
    case = Case(likelihood, (33, 20), reduction, logvar="scalar")
    input, target, _, _, logvar = make_inputs(Source(place.device), case)
    leaves = [leaf(input)] + ([] if logvar is None else [leaf(logvar)])
    loss = evaluate(FV, case, leaves[0], target, None, None, leaves[-1])
    ones = torch.ones_like(loss)
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, ones, retain_graph=True)]
    for factor in (3.0, 1.0, -0.5, 1.0):
        again = torch.autograd.grad(loss, leaves, factor * ones, retain_graph=True)
        for a, b in zip(again, first, strict=True):
            torch.testing.assert_close(a, factor * b)


@each_place(OPERATOR)
def test_a_gradient_may_be_changed_in_place_while_the_graph_is_retained(place):
    input, target = Source(place.device).normal(2, 33, 20)
    x = leaf(input)
    loss = FV.mse_loss(x, target)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    first.mul_(5)
    (second,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(first, 5 * second)


@each_place(OPERATOR)
def test_gradients_accumulate(place):
    """Two losses on one tensor, two passes over one graph, and an intermediate that keeps its gradient."""
    input, target = Source(place.device).normal(2, 33, 20)
    x, twin = leaf(input), leaf(input)
    hidden, twin_hidden = x * 1.5, twin * 1.5
    hidden.retain_grad()
    twin_hidden.retain_grad()
    loss = FV.mse_loss(hidden, target) + FV.binary_cross_entropy_with_logits(hidden, target.abs(), reduction="batchmean")
    expected = F.mse_loss(twin_hidden, target) + F.binary_cross_entropy_with_logits(twin_hidden, target.abs(), reduction="sum") / 33
    for value in (loss, expected):
        value.backward(retain_graph=True)
        value.backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(hidden.grad, twin_hidden.grad)


@each_place(OPERATOR)
@pytest.mark.parametrize("grad_scale", [1.0, 65536.0])
def test_loss_scaling_saves_a_float16_gradient(place, grad_scale):
    """A mean over many elements has gradients that float16 flushes to zero unless they are scaled before they are rounded."""
    source = Source(place.device, torch.float16)
    logits, target = source.normal(1000, 1000), source.image(1000, 1000)
    x, wide = leaf(logits), wide_leaf(logits)
    FV.binary_cross_entropy_with_logits(x, target, grad_scale=grad_scale).backward(torch.tensor(65536.0, device=place.device))
    reference.binary_cross_entropy_with_logits(wide, target.double() / 255).mul(65536.0).backward()
    assert_close(x.grad, wide.grad, torch.float16)


@each_place(OPERATOR)
@each_likelihood
def test_the_forward_pass_writes_the_gradient_of_a_scalar(place, likelihood):
    for reduction, writes in (("mean", True), ("sum", True), ("batchmean", True), ("sample", False), ("none", False)):
        case = Case(likelihood, (33, 20), reduction)
        input, target, _, _, logvar = make_inputs(Source(place.device), case)
        loss = evaluate(FV, case, leaf(input), target, None, None, logvar)
        with Recorder() as ran:
            loss.backward(torch.ones_like(loss))
        recomputed = any(func._schema.name == "fastvae::reconstruction_backward" for func in ran.operators)
        assert recomputed != writes


@pytest.mark.parametrize("place", [place for place in places(OPERATOR) if place.device == "cpu"], ids=str)
@pytest.mark.parametrize("divisor", [4, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_training_loop_announces_its_factor_to_any_loss(place, divisor, dtype):
    """A third is rounded to the dtype of the loss before it comes in."""
    logits, target = Source(place.device, dtype).normal(33, 20), Source(place.device).image(33, 20)
    x, wide = leaf(logits), wide_leaf(logits)
    with expected_gradient(1 / divisor):
        loss = FV.binary_cross_entropy_with_logits(x, target, reduction="batchmean")
    with Recorder() as ran:
        (loss / divisor).backward()
    reference.binary_cross_entropy_with_logits(wide, target.double() / 255, reduction="batchmean").div(divisor).backward()
    assert_close(x.grad, wide.grad, dtype)
    names = {func._schema.name for func in ran.operators}
    assert names.isdisjoint({"aten::mul_", "fastvae::reconstruction_backward"})


@each_place(OPERATOR)
@each_likelihood
def test_nothing_wanted_nothing_recorded(place, likelihood):
    case = Case(likelihood, (5, 3))
    input, target, _, _, logvar = make_inputs(Source(place.device), case)
    assert not evaluate(FV, case, input, target, None, None, logvar).requires_grad
    with torch.no_grad():
        assert not evaluate(FV, case, leaf(input), target, None, None, logvar).requires_grad


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target_layout", ["contiguous", "permuted", "channels_last", "expanded"])
def test_layouts(place, likelihood, layout, target_layout):
    for reduction in REDUCTIONS:
        case = Case(likelihood, (6, 4, 5, 3), reduction, layout=layout, target_layout=target_layout, grad_layout=layout, weight="channel")
        check(place.device, torch.float32, case)


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("shape", [(4, 3, 8, 6), (2, 5, 3, 4, 6)], ids=str)
def test_elementwise_losses_keep_the_places_of_elements(place, likelihood, shape):
    case = Case(likelihood, shape, "none")
    inputs = make_inputs(Source(place.device), case)
    dense = evaluate(FV, case, *inputs)
    permuted = [None if t is None else lay_out(t, "permuted") for t in inputs]
    torch.testing.assert_close(evaluate(FV, case, *permuted), dense, rtol=0, atol=0)


@each_place(OPERATOR)
@each_likelihood
def test_a_dense_permuted_input_is_not_copied(place, likelihood):
    """The operator sees channels_last memory as it lies: no copy runs before or after it."""
    case = Case(likelihood, (4, 3, 8, 6), "mean", layout="channels_last", target_layout="channels_last")
    input, target, _, _, logvar = make_inputs(Source(place.device), case)
    input, logvar = leaf(input), None if logvar is None else lay_out(logvar, "channels_last")
    with Recorder() as ran:
        evaluate(FV, case, input, target, None, None, logvar)
    copies = {torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
    assert place.backend in _backend.ON_EVERY_DEVICE or copies.isdisjoint(ran.operators)


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 20), (20, 0)], ids=str)
def test_empty(place, likelihood, reduction, shape):
    case = Case(likelihood, shape, reduction, weight="last", pos_weight="last", logvar="last")
    input, target, weight, pos_weight, logvar = make_inputs(Source(place.device), case)
    leaves = [leaf(input)] + ([] if logvar is None else [leaf(logvar)])
    loss = evaluate(FV, case, leaves[0], target, weight, pos_weight, leaves[-1])
    assert loss.shape == {"none": shape, "sample": shape[:1]}.get(reduction, ())
    assert loss.sum() == 0
    loss.sum().backward()
    assert all((t.grad == 0).all() and t.grad.shape == t.shape for t in leaves)


@each_place_and_dtype(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zero_dimensions(place, dtype, likelihood, reduction):
    check(place.device, dtype, Case(likelihood, (), reduction, weight="scalar", pos_weight="scalar", target_gradient=True))


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_extreme_logits(place, dtype, reduction):
    """As torch in float64, also where it gives infinity (or, at infinite logits, NaN)."""
    values = [1e4, -1e4, 100.0, -100.0, 30.0, -30.0, 1e-7, 0.0]
    if reduction == "none":
        values += [math.inf, -math.inf]
    logits = torch.tensor(values, dtype=dtype, device=place.device).repeat_interleave(3)
    target = torch.tensor([0.0, 1.0, 0.3], dtype=dtype, device=place.device).repeat(len(values))
    x, wide = leaf(logits), wide_leaf(logits)
    loss = FV.binary_cross_entropy_with_logits(x, target, reduction=reduction)
    expected = F.binary_cross_entropy_with_logits(wide, target.double(), reduction=reduction)
    assert_close(loss, expected, accumulated(dtype, reduction))
    loss.sum().backward()
    expected.sum().backward()
    assert_close(x.grad, wide.grad, dtype)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_probabilities_of_zero_and_one(place, dtype, reduction):
    """Each logarithm stops at -100 and the gradient's denominator at 1e-12, as in torch."""
    tiny = torch.finfo(dtype).tiny
    probabilities = torch.tensor([0.0, 1.0, tiny, 1 - torch.finfo(dtype).eps, 0.5], dtype=dtype, device=place.device).repeat_interleave(3)
    target = torch.tensor([0.0, 1.0, 0.25], dtype=dtype, device=place.device).repeat(5)
    x, wide, wide_target = leaf(probabilities), probabilities.double(), target.double()
    loss = FV.binary_cross_entropy(x, target, reduction=reduction)
    assert_close(loss, F.binary_cross_entropy(wide, wide_target, reduction=reduction), accumulated(dtype, reduction))
    loss.sum().backward()
    assert_close(x.grad, (wide - wide_target) / ((1 - wide) * wide).clamp(min=1e-12), dtype)


@each_place(OPERATOR)
def test_the_gradient_at_zero_and_one_is_that_of_torch(place):
    probabilities = torch.tensor([0.0, 0.0, 1.0, 1.0, 1e-30, 0.5], device=place.device)
    target = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], device=place.device)
    x, twin = leaf(probabilities), leaf(probabilities)
    FV.binary_cross_entropy(x, target, reduction="sum").backward()
    F.binary_cross_entropy(twin, target, reduction="sum").backward()
    torch.testing.assert_close(x.grad, twin.grad)


@each_place(OPERATOR)
def test_the_ends_of_the_8_bit_range_are_exact(place):
    logits = torch.tensor([1e4, -1e4], device=place.device)
    target = torch.tensor([255, 0], dtype=torch.uint8, device=place.device)
    assert FV.binary_cross_entropy_with_logits(logits, target, reduction="none").tolist() == [0.0, 0.0]


@each_place(OPERATOR)
def test_a_target_outside_the_unit_interval_is_not_an_error(place):
    source = Source(place.device)
    logits, target = source.normal(2, 20, 30)
    torch.testing.assert_close(
        FV.binary_cross_entropy_with_logits(logits, 3 * target), F.binary_cross_entropy_with_logits(logits, 3 * target)
    )


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("logvar", [200.0, -200.0, 20.0, -20.0])
def test_extreme_log_variances(place, dtype, logvar):
    source = Source(place.device, dtype)
    input, target = source.normal(2, 5, 4)
    x, wide = leaf(input), wide_leaf(input)
    loss = FV.gaussian_nll(x, target, logvar, reduction="none")
    expected = reference.gaussian_nll(wide, target.double(), logvar, reduction="none")
    narrow = torch.float64 if dtype == torch.float64 else torch.float32
    assert_close(loss, expected.to(narrow).double(), dtype)
    loss.sum().backward()
    expected.sum().backward()
    assert_close(x.grad, wide.grad.to(narrow).double(), dtype)


@each_place_and_dtype(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("poisoned", ["input", "target", "weight", "pos_weight", "logvar"])
def test_nan_in_nan_out(place, dtype, likelihood, poisoned):
    case = Case(likelihood, (40, 30), "sample", weight="full", pos_weight="full")
    names = ("input", "target", "weight", "pos_weight", "logvar")
    tensors = dict(zip(names, make_inputs(Source(place.device, dtype), case), strict=True))
    read = {"bce_with_logits": names[:4], "bce": names[:3], "mse": names[:2], "gaussian": ("input", "target", "logvar")}[likelihood]
    if poisoned in read:
        tensors[poisoned][7, 11] = math.nan
    tensors["input"] = leaf(tensors["input"])
    loss = evaluate(FV, case, *tensors.values())
    assert loss.isnan().nonzero().tolist() == ([[7]] if poisoned in read else [])
    for reduction in SCALAR_REDUCTIONS:
        assert bool(evaluate(FV, replace(case, reduction=reduction), *tensors.values()).isnan()) == (poisoned in read)
    loss.sum().backward()
    assert tensors["input"].grad.isnan().nonzero().tolist() == ([[7, 11]] if poisoned in read else [])


def run_once(place, case):
    input, target, _, _, logvar = make_inputs(Source(place.device), case)
    leaves = [leaf(input)] + ([] if logvar is None else [leaf(logvar)])
    loss = evaluate(FV, case, leaves[0], target, None, None, leaves[-1])
    return [loss, *torch.autograd.grad(loss.sum(), leaves)]


@each_place(OPERATOR)
@each_likelihood
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_agree_bitwise(place, likelihood, reduction):
    case = Case(likelihood, (4, 3, 41, 401), reduction, logvar="channel", layout="channels_last")
    assert all(torch.equal(a, b) for a, b in zip(run_once(place, case), run_once(place, case), strict=True))


@pytest.mark.parametrize("place", compiled_places(OPERATOR), ids=str)
@each_likelihood
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("logvar", ["scalar", "channel", "last"])
def test_the_number_of_threads_changes_no_bit(place, likelihood, reduction, logvar):
    runs = []
    for count in (1, 2):
        with threads(count):
            runs.append(run_once(place, Case(likelihood, (4, 3, 41, 401), reduction, torch.uint8, logvar=logvar)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_likelihood
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_each_instruction_set(instruction_set, dtype, likelihood):
    for shape in ((1,), (63,), (41, 401), (7, 1, 1030)):
        for options in (
            {},
            {"reduction": "sample", "weight": "last", "pos_weight": "last"},
            {"target_dtype": torch.uint8, "logvar": "last"},
        ):
            check("cpu", dtype, Case(likelihood, shape, **options))
            assert fastvae._C.last_instruction_set("reconstruction") == compiled_path("reconstruction", instruction_set)


LOG_PROBABILITY = {
    "bernoulli_logits": lambda recon, target: Bernoulli(logits=recon, validate_args=False).log_prob(target),
    "bernoulli": lambda recon, target: Bernoulli(probs=recon, validate_args=False).log_prob(target),
    "gaussian": lambda recon, target: Normal(recon, 1.0).log_prob(target),
}


@each_place(*BOTH)
@pytest.mark.parametrize("likelihood", LOG_PROBABILITY)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
@pytest.mark.parametrize("options", [{}, {"beta": 4.0}, {"beta": 0.5, "capacity": 7.0}, {"capacity": 1e3}], ids=str)
def test_elbo_against_its_formula(place, likelihood, reduction, options):
    source = Source(place.device)
    recon, target, (mu, logvar) = source.uniform(16, 1, 8, 8), source.uniform(16, 1, 8, 8), source.normal(2, 16, 5)
    reduce = {"batchmean": lambda v: v.mean(0), "sum": lambda v: v.sum(0), "sample": lambda v: v}[reduction]
    inputs, twins = ([leaf(t) for t in (recon, mu, logvar)] for _ in range(2))
    elbo = FV.elbo_loss(inputs[0], target, *inputs[1:], likelihood=likelihood, reduction=reduction, **options)
    recon_loss = reduce(-LOG_PROBABILITY[likelihood](twins[0], target).sum((1, 2, 3)))
    kl = reduce(kl_divergence(Normal(twins[1], twins[2].mul(0.5).exp()), Normal(0.0, 1.0)).sum(1))
    count = 16 if reduction == "sum" else 1
    penalty = (kl - count * options["capacity"]).abs() if "capacity" in options else kl
    expected = recon_loss + options.get("beta", 1.0) * penalty
    for actual, wanted in zip(elbo, (expected, recon_loss, kl), strict=True):
        torch.testing.assert_close(actual, wanted)
    assert elbo.loss is elbo[0]
    elbo.loss.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(inputs, twins, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@each_place(*BOTH)
def test_elbo_takes_what_a_schedule_gives(place):
    """beta and capacity as tensors, and free bits."""
    source = Source(place.device)
    recon, target, (mu, logvar) = source.normal(16, 30), source.image(16, 30), source.normal(2, 16, 5)
    beta, capacity = torch.tensor(0.5, device=place.device), torch.tensor(7.0, device=place.device)
    ours = FV.elbo_loss(recon, target, mu, logvar, beta=beta, capacity=capacity, free_bits=0.3)
    numbers = FV.elbo_loss(recon, target, mu, logvar, beta=0.5, capacity=7.0, free_bits=0.3)
    assert torch.equal(ours.loss, numbers.loss)
    torch.testing.assert_close(ours.kl, FV.kl_normal(mu, logvar, free_bits=0.3))


@each_place(*BOTH)
def test_the_function_of_the_tutorial(place):
    source = Source(place.device)
    x, recon, (mu, log_var) = source.uniform(32, 1, 28, 28), source.uniform(32, 1, 28, 28), source.normal(2, 32, 20)
    inputs, twins = ([leaf(t) for t in (recon, mu, log_var)] for _ in range(2))
    ours = fastvae.vae_loss(x, *inputs)
    recon_loss = F.binary_cross_entropy(twins[0], x, reduction="sum")
    kl_loss = -0.5 * torch.sum(1 + twins[2] - twins[1].pow(2) - twins[2].exp())
    for actual, expected in zip(ours, (recon_loss + kl_loss, recon_loss, kl_loss), strict=True):
        torch.testing.assert_close(actual, expected)
    ours[0].backward()
    (recon_loss + kl_loss).backward()
    for a, b in zip(inputs, twins, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_tolerance_of_a_dtype_is_half_a_unit_in_its_last_place():
    for dtype in (torch.bfloat16, torch.float16):
        assert TOLERANCES[dtype]["rtol"] == pytest.approx(torch.finfo(dtype).eps / 2, rel=0.05)
