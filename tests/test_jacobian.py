"""The contractive penalty and the operators of the Gram form against torch.func in float64: values, gradients, limits."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from _helpers import (
    LAYOUTS,
    TOLERANCES,
    Place,
    Recorder,
    Source,
    accumulated,
    assert_close,
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
from hypothesis import example, given
from hypothesis import strategies as st

import fastvae
from fastvae import functional as FV
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.jacobian import ACTIVATIONS
from fastvae.reference import jacobian as reference

OPERATOR = "jacobian_forward"
GRAM = "jacobian_gram"
EPILOGUES = "jacobian_gram_scale", "jacobian_gram_reduce"
SCALAR_REDUCTIONS = ("batchmean", "sum", "mean")

# The activation itself, and another value of its parameter than the default.
FUNCTIONS = {
    "identity": lambda a, alpha: a,
    "sigmoid": lambda a, alpha: a.sigmoid(),
    "tanh": lambda a, alpha: a.tanh(),
    "relu": lambda a, alpha: a.relu(),
    "leaky_relu": lambda a, alpha: F.leaky_relu(a, alpha),
    "elu": lambda a, alpha: F.elu(a, alpha),
    "softplus": lambda a, alpha: F.softplus(a, alpha),
    "silu": lambda a, alpha: F.silu(a),
    "gelu": lambda a, alpha: F.gelu(a),
    "gelu_tanh": lambda a, alpha: F.gelu(a, approximate="tanh"),
}
OTHER_ALPHAS = {"leaky_relu": 0.3, "elu": 0.7, "softplus": 2.5}
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def hidden_values(source: Source, activation: str, *shape: int, layout: str = "contiguous") -> torch.Tensor:
    """What a layer with this activation gives; the pre-activation where the penalty takes that."""
    a = source.normal(*shape, dtype=torch.float64)
    values = a if ACTIVATIONS[activation].from_preactivation else FUNCTIONS[activation](a, ACTIVATIONS[activation].alpha)
    return lay_out(values.to(source.dtype), layout)


@dataclass(frozen=True)
class Case:
    activation: str
    batch: int
    units: int
    inputs: int
    reduction: str = "batchmean"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    factor: float = 1.0
    wanted: tuple[bool, bool] = (True, True)
    seed: int = 0


sizes = st.sampled_from((0, 1, 2, 3, 7, 20, 31, 33, 64, 130))
cases = st.builds(
    Case,
    activation=st.sampled_from(tuple(ACTIVATIONS)),
    batch=sizes,
    units=sizes,
    inputs=st.sampled_from((0, 1, 5, 511, 512, 513, 1100)),
    reduction=st.sampled_from(tuple(REDUCTIONS)),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    factor=st.sampled_from((1.0, 2.0, -0.5)),
    wanted=st.sampled_from(((True, True), (True, False), (False, True))),
    seed=st.integers(0, 2**31),
)


def check(device: str, dtype: torch.dtype, case: Case) -> None:
    source = Source(device, dtype, case.seed)
    hidden = hidden_values(source, case.activation, case.batch, case.units, layout=case.layout).to(device)
    weight = source.normal(case.units, case.inputs, layout=case.layout)
    tensors = [leaf(t) if wanted else t for t, wanted in zip((hidden, weight), case.wanted, strict=True)]
    wide = [wide_leaf(hidden), wide_leaf(weight)]
    penalty = FV.contractive_penalty(*tensors, case.activation, case.reduction)
    oracle = reference.contractive_penalty(*wide, case.activation, case.reduction)
    magnitude = max(float(oracle.detach().abs().max()), 1.0) if oracle.numel() else 0.0
    assert_close(penalty, oracle, accumulated(dtype, case.reduction), magnitude=magnitude)

    cotangent = lay_out(case.factor * source.normal(*penalty.shape, dtype=penalty.dtype).abs().add(0.5), case.grad_layout)
    learners = [t for t in tensors if t.requires_grad]
    actual = torch.autograd.grad(penalty, learners, cotangent)
    expected = torch.autograd.grad(oracle, wide, cotangent.double())
    for gradient, oracle_gradient in zip(actual, [g for g, wanted in zip(expected, case.wanted, strict=True) if wanted], strict=True):
        magnitude = float(oracle_gradient.abs().max()) if oracle_gradient.numel() else 0.0
        assert_close(gradient, oracle_gradient, dtype, magnitude=magnitude, roundings=2)


@each_place_and_dtype(OPERATOR)
@given(case=cases)
@example(case=Case("sigmoid", 128, 256, 784))
@example(case=Case("sigmoid", 0, 20, 5, reduction="sample"))
@example(case=Case("tanh", 5, 0, 7, reduction="mean"))
@example(case=Case("gelu", 3, 33, 0))
def test_matches_float64(place, dtype, case):
    check(place.device, dtype, case)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (63, 41, 401), (1, 1023, 17)], ids=str)
def test_odd_sizes(place, dtype, sizes):
    check(place.device, dtype, Case("sigmoid", *sizes))


@each_place_and_dtype(OPERATOR)
@each_activation
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_activation_and_reduction(place, dtype, activation, reduction):
    case = Case(activation, 41, 70, 33, reduction=reduction)
    check(place.device, dtype, case)
    check(place.device, dtype, replace(case, layout="sliced", grad_layout="expanded", factor=3.0))


@each_activation
@pytest.mark.parametrize("default", [True, False], ids=["default", "other"])
def test_the_oracle_is_the_norm_of_torch_s_jacobian(activation, default):
    """``torch.func.jacrev`` of the layer, in float64."""
    source = Source("cpu", torch.float64)
    weight, bias, x = leaf(source.normal(9, 5)), source.normal(9), source.normal(6, 5)
    alpha = ACTIVATIONS[activation].alpha if default else OTHER_ALPHAS.get(activation, 0.0)

    def layer(sample):
        return FUNCTIONS[activation](weight @ sample + bias, alpha)

    expected = torch.func.vmap(torch.func.jacrev(layer))(x).square().sum((1, 2))
    a = x @ weight.T + bias
    hidden = a if ACTIVATIONS[activation].from_preactivation else FUNCTIONS[activation](a, alpha)
    given_alpha = alpha if ACTIVATIONS[activation].has_parameter else None
    ours = reference.contractive_penalty(hidden, weight, activation, "sample", alpha=given_alpha)
    fused = FV.contractive_penalty(hidden, weight, activation, "sample", alpha=given_alpha)
    for penalty in (ours, fused):
        torch.testing.assert_close(penalty, expected)
        gradient, expected_gradient = (torch.autograd.grad(p.sum(), weight, retain_graph=True)[0] for p in (penalty, expected))
        torch.testing.assert_close(gradient, expected_gradient)


@each_place(OPERATOR, dtype=torch.float64)
@each_activation
@pytest.mark.parametrize("reduction", ["batchmean", "sample", "none"])
def test_gradcheck(place, activation, reduction):
    source = Source(place.device, torch.float64, seed=3)
    # The output of a rectifier is 0 where its derivative jumps.
    hidden = source.normal(4, 5) if activation == "relu" else hidden_values(source, activation, 4, 5)
    hidden, weight = leaf(hidden), leaf(source.normal(5, 3))
    assert torch.autograd.gradcheck(lambda h, w: FV.contractive_penalty(h, w, activation, reduction), [hidden, weight])


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_empty_batch_has_no_penalty_whatever_the_weights(place, reduction, value):
    hidden, weight = torch.empty(0, 5, device=place.device), torch.full((5, 3), value, device=place.device)
    assert not FV.contractive_penalty(hidden, weight, "sigmoid", reduction).any()


@each_place(OPERATOR)
@each_activation
def test_far_from_zero(place, activation):
    """Values at which an exponential overflows, underflows or cancels."""
    a = torch.tensor([-120.0, -30.0, -9.0, -1e-3, -1e-6, 0.0, 1e-6, 1e-3, 9.0, 30.0, 120.0], device=place.device)
    hidden = a if ACTIVATIONS[activation].from_preactivation else FUNCTIONS[activation](a, ACTIVATIONS[activation].alpha)
    hidden, weight = leaf(hidden.unsqueeze(0)), torch.ones(a.numel(), 1, device=place.device)
    wide = wide_leaf(hidden)
    ours = FV.contractive_penalty(hidden, weight, activation, "none")
    oracle = reference.contractive_penalty(wide, weight.double(), activation, "none")
    assert_close(ours, oracle, torch.float32)
    ours.sum().backward()
    oracle.sum().backward()
    assert_close(hidden.grad, wide.grad, torch.float32)


@each_place(OPERATOR)
@pytest.mark.parametrize("grad_scale", [1.0, 0.1, -3.0])
@pytest.mark.parametrize("incoming", [1.0, 0.1, 7.0, 0.0])
def test_the_result_is_right_whatever_comes_in(place, grad_scale, incoming):
    source = Source(place.device)
    tensors = [leaf(source.uniform(20, 40)), leaf(source.normal(40, 30))]
    plain = torch.autograd.grad(reference.contractive_penalty(*tensors), tensors, torch.tensor(incoming, device=place.device))
    penalty = FV.contractive_penalty(*tensors, grad_scale=grad_scale)
    torch.testing.assert_close(penalty, reference.contractive_penalty(*tensors))
    for ours, expected in zip(torch.autograd.grad(incoming * penalty, tensors), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@each_place(OPERATOR)
@pytest.mark.parametrize("incoming", [1.0, 0.5])
def test_a_retained_graph_gives_the_same_gradient_again(place, incoming):
    source = Source(place.device)
    tensors = [leaf(source.uniform(20, 40)), leaf(source.normal(40, 30))]
    loss = incoming * FV.contractive_penalty(*tensors)
    once = torch.autograd.grad(incoming * reference.contractive_penalty(*tensors), tensors)
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for tensor, gradient in zip(tensors, once, strict=True):
            torch.testing.assert_close(tensor.grad, times * gradient, rtol=1e-5, atol=1e-6)


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_hidden_values_and_a_float32_weight(place, dtype):
    """As under autocast."""
    source = Source(place.device)
    hidden, weight = leaf(source.uniform(12, 33, dtype=dtype)), leaf(source.normal(33, 20))
    wide = [wide_leaf(hidden), wide_leaf(weight)]
    penalty, oracle = FV.contractive_penalty(hidden, weight), reference.contractive_penalty(*wide)
    assert_close(penalty, oracle, torch.float32, magnitude=float(oracle.detach()))
    penalty.backward()
    oracle.backward()
    assert_close(hidden.grad, wide[0].grad, dtype)
    assert_close(weight.grad, wide[1].grad, torch.float32, magnitude=float(wide[1].grad.abs().max()))


@each_place(OPERATOR)
@each_activation
@pytest.mark.parametrize("poisoned", ["hidden", "weight"])
def test_nan_in_nan_out(place, activation, poisoned):
    source = Source(place.device)
    tensors = {"hidden": hidden_values(source, activation, 9, 40).to(place.device), "weight": source.normal(40, 30)}
    tensors[poisoned][3, 7] = math.nan
    leaves = [leaf(t) for t in tensors.values()]
    for reduction in REDUCTIONS:
        assert FV.contractive_penalty(*leaves, activation, reduction).isnan().any()
    if poisoned == "hidden":
        rows = FV.contractive_penalty(*leaves, activation, "sample").isnan()
        assert rows.nonzero().flatten().tolist() == [3]
    FV.contractive_penalty(*leaves, activation, "sample").sum().backward()
    assert leaves[list(tensors).index(poisoned)].grad[3, 7].isnan()
    assert leaves[0].grad[4, 6].isfinite()
    assert leaves[1].grad[6].isfinite().all()


def run_once(place) -> list[torch.Tensor]:
    source = Source(place.device)
    tensors, results = [leaf(source.uniform(300, 100)), leaf(source.normal(100, 1000))], []
    for reduction in REDUCTIONS:
        penalty = FV.contractive_penalty(*tensors, reduction=reduction)
        results += [penalty, *torch.autograd.grad(penalty.sum(), tensors)]
    return results


@each_place(OPERATOR)
def test_two_runs_agree_bitwise(place):
    assert all(torch.equal(a, b) for a, b in zip(run_once(place), run_once(place), strict=True))


@pytest.mark.parametrize("place", compiled_places(OPERATOR), ids=str)
def test_the_number_of_threads_changes_no_bit(place):
    runs = []
    for count in (1, 3):
        with threads(count):
            runs.append(run_once(place))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_activation
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_each_instruction_set(instruction_set, activation, dtype):
    for case in (Case(activation, 41, 70, 1033), Case(activation, 5, 33, 7, reduction="none", layout="sliced")):
        check("cpu", dtype, case)
        assert fastvae._C.last_instruction_set("jacobian") == compiled_path("jacobian", instruction_set)


@pytest.mark.parametrize("place", [p for p in places(OPERATOR) if p.backend != "reference"], ids=str)
def test_one_operator_does_it(place):
    """No squared weight, no product beside it."""
    source = Source(place.device)
    tensors = [leaf(source.uniform(20, 40)), leaf(source.normal(40, 300))]
    with Recorder() as ran:
        FV.contractive_penalty(*tensors).backward()
    ours = [op for op in ran.operators if op.namespace == "fastvae"]
    assert {op._overloadname for op in ours} == {place.backend}
    assert not any("pow" in str(op) or "mul" in str(op) for op in ran.operators)


def symmetric(source: Source, size: int) -> torch.Tensor:
    matrix = source.normal(size, size)
    return matrix + matrix.T


@each_place(*EPILOGUES)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", [(5, 6, 7), (3, 64, 130), (1, 1, 1), (0, 3, 4), (2, 3, 64)], ids=str)
def test_epilogues_of_the_gram_form(place, batched, shape):
    """In float32; in float64 the gradient checks see them. Other dtypes do not come here."""
    dtype = torch.float32
    batch, rows, columns = shape
    source = Source(place.device, dtype)
    left = source.normal(*(shape if batched else shape[1:]))
    inner, outer, product = source.normal(batch, columns), source.normal(batch, rows), source.normal(batch * rows, columns)
    scaled = OPERATORS["jacobian_gram_scale"].overloads[place.backend](left, inner, outer)
    dots, grad_inner, grad_left = OPERATORS["jacobian_gram_reduce"].overloads[place.backend](left, inner, outer, product, True)
    wide_left, wide_inner, wide_outer = (wide_leaf(t) for t in (left, inner, outer))
    oracle = wide_outer[:, :, None] * wide_left * wide_inner[:, None, :]
    assert_close(scaled, oracle.detach().flatten(0, 1), dtype)
    total = (oracle * product.double().view(shape)).sum()
    expected = torch.autograd.grad(total, [wide_left, wide_inner])
    wide_dots = (wide_left * wide_inner[:, None, :] * product.double().view(shape)).sum(2)
    for actual, wanted in ((dots, wide_dots), (grad_left, expected[0]), (grad_inner, expected[1])):
        assert_close(actual, wanted.detach(), dtype, magnitude=100.0)


# Beyond what the C++ kernels scale at a time, in samples and in one of them; beyond the parts that have sums of their own.
GRAM_SHAPES = [
    *((5, 6, 7), (3, 64, 130), (1, 1, 1), (40, 64, 130), (3, 400, 350), (200, 30, 100), (17, 3, 1100)),
    *((0, 3, 4), (2, 0, 4), (2, 3, 0)),
]


def gram_operands(source: Source, batched: bool, shape: tuple[int, int, int]) -> list[torch.Tensor]:
    """Near 1 in size, each product too."""
    batch, rows, columns = shape
    left = source.normal(*(shape if batched else shape[1:]))
    gram = symmetric(source, columns) / max(columns, 1)
    return [left / max(rows, 1) ** 0.5, source.uniform(batch, columns), source.uniform(batch, rows), gram]


def check_norms(place: Place, dtype: torch.dtype, batched: bool, weighted: bool, shape: tuple[int, int, int]) -> None:
    """Against float64, and against autograd."""
    source = Source(place.device, dtype)
    operands = gram_operands(source, batched, shape)
    weights = source.normal(shape[0]) if weighted else None
    norms, *grads = OPERATORS[GRAM].overloads[place.backend](*operands, weights, True)
    left, inner, outer, gram = wide = [wide_leaf(t) for t in operands]
    scaled = outer[:, :, None] * left * inner[:, None, :]
    expected = (scaled * (scaled @ gram)).sum((1, 2))
    expected_grads = torch.autograd.grad(expected, wide, torch.ones_like(expected) if weights is None else weights.double())
    alone, *nothing = OPERATORS[GRAM].overloads[place.backend](*operands, weights, False)
    for actual, oracle in ((norms, expected.detach()), (alone, expected.detach()), *zip(grads, expected_grads, strict=True)):
        assert_close(actual, oracle, dtype, magnitude=float(shape[0]))
    assert all(t.numel() == 0 for t in nothing)


each_norm = pytest.mark.parametrize(("batched", "weighted"), list(itertools.product([False, True], repeat=2)), ids=str)


@each_place(GRAM)
@each_norm
@pytest.mark.parametrize("shape", GRAM_SHAPES, ids=str)
def test_norms_of_scaled_matrices(place, batched, weighted, shape):
    check_norms(place, torch.float32, batched, weighted, shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_norm
def test_norms_on_each_instruction_set(instruction_set, batched, weighted, dtype):
    for shape in ((40, 64, 130), (3, 400, 350), (17, 3, 1100), (1, 1, 1)):
        check_norms(Place("cpu", "cpp"), dtype, batched, weighted, shape)
        assert fastvae._C.last_instruction_set("jacobian") == compiled_path("jacobian", instruction_set)


@each_place(GRAM)
def test_norms_of_operands_in_any_layout(place):
    source = Source(place.device)
    operands = gram_operands(source, True, (5, 6, 7))
    weights = source.normal(1).expand(5)
    strided = [t.mT.contiguous().mT for t in operands]
    results = [OPERATORS[GRAM].overloads[place.backend](*t, w, True) for t, w in ((operands, weights.contiguous()), (strided, weights))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@each_place(GRAM)
def test_norms_of_a_sample_with_nan(place):
    left, inner, outer, gram = gram_operands(Source(place.device), False, (5, 6, 7))
    inner[2, 3] = torch.nan
    norms, *_ = OPERATORS[GRAM].overloads[place.backend](left, inner, outer, gram, None, True)
    assert norms.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("place", compiled_places(GRAM), ids=str)
@pytest.mark.parametrize("shape", [(40, 64, 130), (3, 400, 350), (200, 30, 100), (5, 6, 7), (3, 60, 700)], ids=str)
def test_norms_do_not_depend_on_the_threads(place, shape):
    operands = gram_operands(Source(place.device), False, shape)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(OPERATORS[GRAM].overloads[place.backend](*operands, None, True))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


H, W = torch.rand(4, 3), torch.rand(3, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FV.contractive_penalty([1.0], W), TypeError, "hidden: got list, takes a tensor"),
        (lambda: FV.contractive_penalty(H, W.long()), TypeError, "weight: got torch.int64, takes"),
        (lambda: FV.contractive_penalty(H[0], W), ValueError, r"hidden: got shape \(3,\), takes \(batch, units\)"),
        (lambda: FV.contractive_penalty(H, W.T), ValueError, r"weight: got shape \(5, 3\), takes \(units, inputs\) with"),
        (lambda: FV.contractive_penalty(H, W.double()), TypeError, "weight: got torch.float64"),
        (lambda: FV.contractive_penalty(H.double(), W), TypeError, "weight: got torch.float32"),
        (lambda: FV.contractive_penalty(H, W.to("meta")), ValueError, "weight: got a tensor on meta"),
        (lambda: FV.contractive_penalty(H, W, "mish"), ValueError, "activation: got 'mish', takes one of 'identity', 'sigmoid'"),
        (lambda: FV.contractive_penalty(H, W, reduction="avg"), ValueError, "reduction: got 'avg', takes"),
        (lambda: FV.contractive_penalty(H, W, alpha=0.1), ValueError, "alpha: got 0.1, takes None: 'sigmoid' has no parameter"),
        (lambda: FV.contractive_penalty(H, W, "elu", alpha=math.inf), ValueError, "alpha: got inf, takes a finite number"),
        (lambda: FV.contractive_penalty(H, W, grad_scale=0), ValueError, "grad_scale: got 0, takes a finite number other than 0"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
