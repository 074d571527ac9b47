"""The contractive penalty and the Jacobian's norm against torch.func in float64: values, gradients, methods, encoders, limits."""

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
from torch import nn

import fastvae
from fastvae import functional as FV
from fastvae.functional import _chain
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
MODULES = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "elu": lambda: nn.ELU(0.7),
    "softplus": lambda: nn.Softplus(2.5),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}

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


def mlp(sizes: tuple[int, ...], activation: str = "sigmoid", last: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), MODULES[activation]()]
    return nn.Sequential(*(layers if last else layers[:-1]))


def oracle_norms(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The squared norm of each sample's Jacobian by ``torch.autograd.functional``, which shares no code with any method."""
    rows = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda s: encoder(s.unsqueeze(0)), sample, create_graph=True)
        rows.append(jacobian.square().sum())
    return torch.stack(rows)


def compare_with_the_oracle(encoder, x, method, **options) -> None:
    """Values and gradients, of the parameters and of x, in float64."""
    encoder, x = encoder.double(), leaf(x.double())
    weights = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64, device=x.device)
    learners = [x, *encoder.parameters()]
    expected = oracle_norms(encoder, x)
    expected_gradients = torch.autograd.grad(weights @ expected, learners, allow_unused=True, materialize_grads=True)
    norms = FV.jacobian_frobenius(encoder, x, method=method, reduction="sample", **options)
    torch.testing.assert_close(norms, expected)
    gradients = torch.autograd.grad(weights @ norms, learners, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    mean = FV.jacobian_frobenius(encoder, x, method=method, **options)
    torch.testing.assert_close(mean, expected.mean())
    mean_gradients = torch.autograd.grad(3 * mean, learners, allow_unused=True, materialize_grads=True)
    expected_gradients = torch.autograd.grad(3 * oracle_norms(encoder, x).mean(), learners, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(mean_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_place(OPERATOR, dtype=torch.float64)
@each_activation
@pytest.mark.parametrize("method", ["closed_form", "gram", "auto"])
def test_one_layer(place, activation, method):
    compare_with_the_oracle(mlp((6, 9), activation).to(place.device), Source(place.device).normal(5, 6), method)


@each_place(GRAM, dtype=torch.float64)
@each_activation
@pytest.mark.parametrize("sizes", [(20, 8, 5), (3, 12, 7), (16, 9, 7, 5), (20, 6, 30, 25), (5, 9, 6, 8, 4)], ids=str)
def test_gram(place, activation, sizes):
    """Wide inputs, narrow inputs, waists: between them all orders of multiplication, see the next test."""
    compare_with_the_oracle(mlp(sizes, activation).to(place.device), Source(place.device).normal(4, sizes[0]), "gram")


@each_place(GRAM, dtype=torch.float64)
@pytest.mark.parametrize("sizes", [(20, 8, 5), (9, 7, 8, 5), (5, 9, 6, 8, 4)], ids=str)
def test_every_order_of_multiplication_gives_the_same(place, sizes, monkeypatch):
    depth = len(sizes) - 1
    orders = [(None, meet) for meet in range(1, depth + 1)] + [(g, meet) for meet in range(1, depth) for g in range(1, meet + 1)]
    for gram_at, meet in orders:
        monkeypatch.setattr(_chain, "plan", lambda *_, order=(gram_at, meet): _chain.Plan(*order, 0))
        compare_with_the_oracle(mlp(sizes).to(place.device), Source(place.device).normal(3, sizes[0]), "gram")


@each_place(GRAM, dtype=torch.float64)
def test_a_batch_of_many_chunks(place, monkeypatch):
    monkeypatch.setattr("fastvae.ops._gram_chunks.GRAM_ELEMENTS", 3 * 5 * 8)
    encoder, x = mlp((20, 8, 5)).to(place.device), Source(place.device).normal(11, 20)
    compare_with_the_oracle(encoder, x, "gram")
    compare_with_the_oracle(mlp((20, 8, 6, 5)).to(place.device), x, "gram")


@each_place(GRAM, dtype=torch.float64)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
def test_gradcheck_of_gram(place, reduction):
    encoder = mlp((6, 4, 3), "tanh").double().to(place.device)
    x = leaf(Source(place.device, torch.float64).normal(3, 6))

    def function(x, *parameters):
        named = dict(zip(dict(encoder.named_parameters()), parameters, strict=True))
        with nn.utils.stateless._reparametrize_module(encoder, named):
            return FV.jacobian_frobenius(encoder, x, method="gram", reduction=reduction)

    assert torch.autograd.gradcheck(function, [x, *encoder.parameters()])


@pytest.mark.parametrize(
    ("sizes", "gram_at", "meet"),
    [
        ((784, 256, 64), 1, 1),
        ((784, 512, 256, 32), 1, 1),
        ((8, 256, 64), None, 1),
        ((8, 256, 64, 256), None, 2),
        ((784, 512, 8, 512), 2, 2),
        ((3072, 512, 8, 512), 1, 2),
        ((784, 16, 512, 512), 1, 1),
    ],
)
def test_the_order_of_multiplication_follows_from_the_sizes(sizes, gram_at, meet):
    assert _chain.plan(sizes, 128)[:2] == (gram_at, meet)


def test_operations_of_a_plan():
    """784-256-64 for 128 samples: G once, and V G for each."""
    assert _chain.plan((784, 256, 64), 128).operations == 256 * 256 * 784 + 128 * 64 * 256 * 256
    assert _chain.plan((8, 256, 64), 10).operations == 10 * 64 * 256 * 8
    assert _chain.plan((784, 256), 128) == (None, 1, 0)
    for sizes in ((9, 8, 7, 6, 5), (5, 6, 7, 8, 9), (50, 3, 40, 2, 30)):
        chosen = _chain.plan(sizes, 1).operations
        explicit = sum(a * b * sizes[0] for a, b in itertools.pairwise(sizes[1:]))
        assert chosen <= explicit


@each_place(GRAM, dtype=torch.float64)
def test_what_an_mlp_may_hold(place):
    """Nested Sequentials, Flatten, Identity, dropout and batch-norm in evaluation mode, layers without activation, without bias."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        nn.Linear(9, 8, bias=False),
        nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.BatchNorm1d(7, affine=False)),
        nn.Identity(),
        nn.Linear(7, 5),
    ).to(place.device)
    x = Source(place.device).normal(6, 3, 4)
    encoder(x)
    compare_with_the_oracle(encoder.eval(), x, "gram")
    compare_with_the_oracle(nn.Linear(6, 3).to(place.device), Source(place.device).normal(6, 6), "closed_form")


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("encoder", ["mlp", "conv"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_autograd(place, encoder, chunk_size):
    encoder, x = (mlp((6, 5, 4)), torch.randn(5, 6)) if encoder == "mlp" else (conv_encoder(), torch.randn(5, 1, 6, 6))
    compare_with_the_oracle(encoder.to(place.device), x.to(place.device), "autograd", chunk_size=chunk_size)


def conv_encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.SiLU(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 4))


@pytest.mark.parametrize("num_projections", [1, 4])
def test_projection_is_unbiased(num_projections):
    """Over many draws, within 5 standard errors; n projections have an n-th of the variance of one, which has a closed form."""
    encoder, x, count = conv_encoder().double(), Source("cpu", torch.float64).normal(3, 1, 6, 6), 1500
    jacobians = torch.func.vmap(torch.func.jacrev(lambda s: encoder(s[None])[0]))(x).flatten(2)
    squares = torch.linalg.svdvals(jacobians).square().detach()
    exact, outputs = squares.sum(1), squares.shape[1]
    options = {"num_projections": num_projections, "reduction": "sample", "generator": torch.Generator().manual_seed(0)}
    # Each sample of a batch has directions of its own.
    with torch.no_grad():
        estimates = FV.jacobian_frobenius(encoder, x.repeat(count, 1, 1, 1), method="projection", **options).view(count, 3)
    # Of C sum_i lambda_i v_i^2, with v uniform on the sphere in C dimensions.
    variance = 2 * (outputs * squares.square().sum(1) - exact.square()) / (outputs + 2) / num_projections
    assert ((estimates.mean(0) - exact).abs() < 5 * (variance / count).sqrt()).all()
    torch.testing.assert_close(estimates.var(0), variance, rtol=0.25, atol=0)


def test_projections_of_one_output_are_exact():
    encoder, x = mlp((6, 5, 1)).double(), Source("cpu", torch.float64).normal(5, 6)
    torch.testing.assert_close(FV.jacobian_frobenius(encoder, x, method="projection"), FV.jacobian_frobenius(encoder, x))


@pytest.mark.parametrize("num_projections", [1, 3])
@pytest.mark.parametrize("chunk_size", [None, 2, 100])
def test_projection_and_its_gradients(num_projections, chunk_size):
    """Against the same directions by hand; the backward pass of a chunk, computed again, takes the directions of the forward pass."""
    encoder, x = conv_encoder().double(), leaf(Source("cpu", torch.float64).normal(5, 1, 6, 6))
    generator = torch.Generator().manual_seed(3)
    norms = FV.jacobian_frobenius(
        encoder, x, method="projection", num_projections=num_projections, generator=generator, reduction="sample", chunk_size=chunk_size
    )
    generator.manual_seed(3)
    sizes = [len(part) for part in x.split(chunk_size or 5)]
    parts = [F.normalize(torch.randn(num_projections, n, 4, generator=generator, dtype=torch.float64), dim=2) for n in sizes]
    directions = torch.cat(parts, dim=1)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda s: encoder(s[None])[0]))(x).flatten(2)
    expected = 4 / num_projections * torch.einsum("nbc,bcd->nbd", directions, jacobians).square().sum((0, 2))
    torch.testing.assert_close(norms, expected)
    learners = [x, *encoder.parameters()]
    ours = torch.autograd.grad(norms.sum(), learners, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected.sum(), learners, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_projection_is_seeded():
    encoder, x = conv_encoder(), torch.randn(4, 1, 6, 6)

    def estimate():
        return FV.jacobian_frobenius(encoder, x, method="projection")

    torch.manual_seed(1)
    first, second = estimate(), estimate()
    torch.manual_seed(1)
    assert torch.equal(estimate(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_projection_takes_dropout_and_batch_norm_in_training_mode(chunk_size):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    norms = FV.jacobian_frobenius(encoder, torch.randn(6, 6), chunk_size=chunk_size)
    norms.backward()
    assert norms > 0
    assert encoder[0].weight.grad.isfinite().all()


def test_chunks_bound_what_the_backward_pass_keeps():
    """Gram and projection keep the same however many samples a batch has, but for the input itself."""
    deep, x = mlp((40, 30, 20, 30)), torch.randn(64, 40)

    def kept(method, chunk_size):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norms = FV.jacobian_frobenius(deep, x, method=method, chunk_size=chunk_size)
        assert norms.requires_grad
        return sum(sizes.values())

    for method in ("gram", "projection"):
        assert kept(method, 8) < 0.2 * kept(method, None)


@each_place(GRAM, dtype=torch.float64)
@pytest.mark.parametrize("method", ["gram", "closed_form"])
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 64])
def test_chunks_of_exact_methods(place, method, chunk_size):
    encoder = mlp((9, 8, 5) if method == "gram" else (9, 5)).to(place.device)
    compare_with_the_oracle(encoder, Source(place.device).normal(5, 9), method, chunk_size=chunk_size)


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ["auto", "gram", "projection", "autograd"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
def test_an_empty_batch(place, method, reduction):
    encoder = mlp((6, 5, 4)).to(place.device)
    norms = FV.jacobian_frobenius(encoder, torch.empty(0, 6, device=place.device), method=method, reduction=reduction)
    assert norms.shape == ((0,) if reduction == "sample" else ())
    assert norms.sum() == 0
    norms.sum().backward()
    assert (encoder[0].weight.grad == 0).all()


@pytest.mark.parametrize(
    ("encoder", "x", "method", "reason"),
    [
        (mlp((6, 5)), torch.zeros(3, 6), "closed_form", "one linear layer"),
        (mlp((784, 256, 64)), torch.zeros(128, 784), "gram", "Gram matrix of the first layer, 5.88e+08 multiplications for 128 samples"),
        (mlp((784, 512, 8, 512)), torch.zeros(128, 784), "gram", "the Gram matrix of layers 1 to 2"),
        (mlp((3, 50, 40)), torch.zeros(8, 3), "gram", "the first layer as it is"),
        (conv_encoder(), torch.zeros(2, 1, 6, 6), "projection", "layer '0', Conv2d"),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.zeros(2, 4), "projection", "layer '1', Dropout"),
    ],
)
def test_auto_tells_what_it_picked_and_why(encoder, x, method, reason):
    explanation = FV.explain_jacobian_method(encoder, x)
    assert explanation.method == method
    assert reason in explanation.reason


class Own(nn.Module):
    def forward(self, x):
        return x.sin()


@pytest.mark.parametrize("method", ["closed_form", "gram"])
@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2)), r"layer '1', Dropout\(p=0.2.*is in training mode"),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), r"layer '1', BatchNorm1d.*is in training mode"),
        (nn.Sequential(nn.Linear(6, 5), nn.Softsign()), r"layer '1', Softsign\(\), is not one of"),
        (nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Mish())), r"layer '0.1', Mish"),
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Tanh()), r"layer '2', Tanh\(\), follows another activation"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 5)), r"layer '0', ReLU\(\), comes before"),
        (Own(), "the encoder, Own, is not one of"),
        (nn.Sequential(nn.Identity()), "the encoder has no Linear layer"),
    ],
)
def test_encoders_that_cannot_be_served(encoder, named, method):
    with pytest.raises(ValueError, match=named + r".*use method='projection'"):
        FV.jacobian_frobenius(encoder, torch.zeros(3, 6), method=method)
    assert FV.explain_jacobian_method(encoder, torch.zeros(3, 6)).method == "projection"


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.BatchNorm1d(5)])
def test_autograd_refuses_layers_in_training_mode(layer):
    encoder = nn.Sequential(nn.Linear(6, 5), layer)
    with pytest.raises(ValueError, match=rf"layer '1', {type(layer).__name__}.*use method='projection', or encoder.eval"):
        FV.jacobian_frobenius(encoder, torch.zeros(3, 6), method="autograd")
    assert FV.jacobian_frobenius(encoder.eval(), torch.zeros(3, 6), method="autograd") > 0


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
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), [1.0]), TypeError, "x: got list, takes a tensor"),
        (lambda: FV.jacobian_frobenius("mlp", W), TypeError, "encoder: got str, takes a module"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, method="best"), ValueError, "method: got 'best', takes one of 'auto'"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, reduction="none"), ValueError, "reduction: got 'none', takes one of 'batchmean'"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, num_projections=0), ValueError, "num_projections: got 0, takes an integer >= 1"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, chunk_size=0), ValueError, "chunk_size: got 0, takes an integer >= 1"),
        (lambda: FV.jacobian_frobenius(mlp((5, 4, 3)), W, method="closed_form"), ValueError, "use method='gram'"),
        (lambda: FV.jacobian_frobenius(nn.Linear(5, 4), W.view(3, 1, 5), method="gram"), ValueError, "gets an input of 3 dimensions"),
        (lambda: FV.jacobian_frobenius(lambda x: (x, x), W, method="projection"), TypeError, "encoder: gave tuple, has to give a tensor"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


ENCODERS = {
    "closed_form": lambda: (mlp((6, 5)), torch.randn(7, 6)),
    "gram": lambda: (mlp((20, 6, 4)), torch.randn(7, 20)),
    "projection": lambda: (conv_encoder(), torch.randn(7, 1, 6, 6)),
    "autograd": lambda: (conv_encoder(), torch.randn(7, 1, 6, 6)),
}


# The Gram form has a row in tests/_calls.py.
without_row = pytest.mark.parametrize("method", ["closed_form", "projection", "autograd"])


@without_row
def test_compiled_as_one_graph(method):
    torch.compiler.reset()
    encoder, x = ENCODERS[method]()
    parameters = list(encoder.parameters())

    def penalty(x):
        return FV.jacobian_frobenius(encoder, x, method=method, num_projections=2) * 2

    results = []
    for function in (torch.compile(penalty, fullgraph=True, backend="aot_eager"), penalty):
        torch.manual_seed(5)
        value = function(x)
        results.append([value, *torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@each_place(OPERATOR)
@without_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(place, method, dtype):
    encoder, x = (t.to(place.device) for t in ENCODERS[method]())
    results = []
    for enabled in (True, False):
        torch.manual_seed(2)
        with torch.autocast(place.device, dtype, enabled=enabled):
            norm = FV.jacobian_frobenius(encoder, x, method=method)
        assert norm.dtype == torch.float32
        results.append((norm, torch.autograd.grad(norm, next(encoder.parameters()))[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0.05, atol=0)
    assert F.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), dim=0) > 0.98


@each_place(GRAM)
def test_backward_under_autocast(place):
    """Of single norms, which the backward pass computes again."""
    encoder, x = (t.to(place.device) for t in ENCODERS["gram"]())
    results = []
    for enabled in (True, False):
        with torch.autocast(place.device, torch.bfloat16, enabled=enabled):
            norms = FV.jacobian_frobenius(encoder, x, method="gram", reduction="sample")
            results.append(torch.autograd.grad(norms.sum(), next(encoder.parameters()))[0])
    assert F.cosine_similarity(results[0].flatten(), results[1].flatten(), dim=0) > 0.98


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ENCODERS)
def test_a_bfloat16_model(place, method):
    encoder, x = (t.to(place.device, torch.bfloat16) for t in ENCODERS[method]())
    norm = FV.jacobian_frobenius(encoder, x, method=method)
    norm.backward()
    assert norm.dtype == torch.float32
    assert next(encoder.parameters()).grad.dtype == torch.bfloat16


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ENCODERS)
def test_no_grad(place, method):
    encoder, x = (t.to(place.device) for t in ENCODERS[method]())
    torch.manual_seed(0)
    expected = FV.jacobian_frobenius(encoder, x, method=method)
    torch.manual_seed(0)
    with torch.no_grad():
        norm = FV.jacobian_frobenius(encoder, x, method=method)
    assert not norm.requires_grad
    torch.testing.assert_close(norm, expected.detach())


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ENCODERS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_output_from_the_same_pass(place, method, chunk_size):
    encoder, x = (t.to(place.device) for t in ENCODERS[method]())
    calls = []
    if method in ("projection", "autograd"):  # the others do not call it
        encoder.register_forward_hook(lambda *_: calls.append(1))
    norm, output = FV.jacobian_frobenius(encoder, x, method=method, chunk_size=chunk_size, with_output=True)
    assert len(calls) == ((1 if chunk_size is None else 3) if method in ("projection", "autograd") else 0)
    assert norm.shape == ()
    expected = encoder(x)
    torch.testing.assert_close(output, expected)
    parameters = list(encoder.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(output.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
