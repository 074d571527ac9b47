"""GroupNorm and its activations against float64: values, gradients, layouts, statistics, memory."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from _helpers import (
    LAYOUTS,
    Place,
    Source,
    assert_close,
    compiled_path,
    each_place,
    each_place_and_dtype,
    kept_bytes,
    lay_out,
    leaf,
    places,
    wide_leaf,
)
from hypothesis import example, given
from hypothesis import strategies as st

import fastvae
from fastvae import functional as FV
from fastvae._backend import ON_EVERY_DEVICE
from fastvae.ops.group_norm import (
    NORM_ACTIVATIONS,
    TORCH_ACTIVATIONS,
    ForwardArguments,
    backward,
    forward,
    recompute,
    restoring_backward,
)
from fastvae.reference import group_norm as reference

OPERATOR = "group_norm_forward"
# Triton's interpreter takes seconds for what a kernel does in microseconds: it gets smaller tensors.
INTERPRETED = Place("cpu", "triton")
# So it does where the CUDA kernels are emulated.
SIMULATED = (INTERPRETED, Place("cpu", "cuda"))


# The activations as torch has them.
FUNCTIONS = {"none": lambda u: u, "silu": F.silu, "relu": F.relu, "gelu": F.gelu}


def roundings(place: Place, dtype: torch.dtype) -> int:
    """In units of a rounding to nearest: Triton's interpreter cuts a float32 off where it makes a bfloat16 of it."""
    return 2 if place == INTERPRETED and dtype == torch.bfloat16 else 1


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    groups: int
    affine: bool = True
    activation: str = "silu"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    mean: float = 0.0
    seed: int = 0


def last(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with its channels last in memory."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def arrange(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    return last(tensor) if layout == "last" else lay_out(tensor, layout)


def oracle(x, groups, weight, bias, activation, eps=1e-5):
    """torch's, in float64. It has no case for one element a group, which is 0 before the affine map."""
    normal = F.group_norm(x, groups, eps=eps) if x[0:1].numel() > groups else x * 0
    shape = (1, -1, *(1,) * (x.ndim - 2))
    u = normal if weight is None else normal * weight.view(shape) + bias.view(shape)
    return FUNCTIONS[activation](u)


def is_near_kink(u: torch.Tensor) -> bool:
    """Whether rounding decides on which side of 0 some value is: ReLU's derivative is 0 on the one side and 1 on the other."""
    size = u.detach().abs()
    return bool(((size > 0) & (size < 1e-6 * (1 + size.max()))).any())


def check(place: Place, dtype: torch.dtype, case: Case) -> None:
    source, ulps = Source(place.device, dtype, case.seed), roundings(place, dtype)
    x = leaf(arrange((source.normal(*case.shape, dtype=torch.float64) + case.mean).to(dtype), case.layout))
    parameters = [leaf(source.normal(case.shape[1])) for _ in range(2)] if case.affine else []
    weight, bias = parameters or (None, None)
    leaves, wide = [x, *parameters], [wide_leaf(t) for t in (x, *parameters)]
    if case.activation == "relu" and is_near_kink(oracle(wide[0], case.groups, *(wide[1:] or (None, None)), "none")):
        return check(place, dtype, replace(case, seed=case.seed + 1))
    y = FV.group_norm_silu(x, case.groups, weight, bias, activation=case.activation)
    stays_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    assert (y.movedim(1, -1) if stays_last else y).is_contiguous()
    assert_recomputed(place, x.detach(), [None if t is None else t.detach() for t in (weight, bias)], case, source)

    expected = oracle(wide[0], case.groups, *(wide[1:] or (None, None)), case.activation)
    # The normalisation cancels x and its mean, of some ulps each.
    scale = 1.0 + float(expected.detach().abs().max())
    assert_close(y.detach(), expected.detach(), dtype, magnitude=scale, roundings=ulps)
    incoming = arrange(source.normal(*case.shape), case.grad_layout)
    gradients = torch.autograd.grad(y, leaves, incoming)
    oracles = torch.autograd.grad(expected, wide, incoming.double())
    # What the gradient of x cancels: the incoming one, scaled, and its projections.
    rstd = 1.0 / float((wide[0].detach().reshape(case.shape[0], case.groups, -1).var(2, correction=0) + 1e-5).sqrt().min())
    largest = rstd * 4.0 * float(incoming.double().abs().max()) * (float(parameters[0].detach().abs().max()) if parameters else 1.0)
    assert_close(gradients[0], oracles[0], dtype, magnitude=max(largest, float(oracles[0].abs().max())), roundings=ulps)
    for actual, expected_gradient in zip(gradients[1:], oracles[1:], strict=True):
        terms = case.shape[0] * math.prod(case.shape[2:])
        assert_close(actual, expected_gradient, dtype, magnitude=terms**0.5 * 4.0, roundings=ulps)


def assert_recomputed(place: Place, x: torch.Tensor, parameters: list[torch.Tensor | None], case: Case, source: Source) -> None:
    """The operators give the output of the forward pass again, to the last bit: as a result in its layout, and in place of the gradient
    beside the gradients of the backward pass."""
    arguments = ForwardArguments(x, case.groups, *parameters, 1e-5, NORM_ACTIVATIONS[case.activation])
    output, mean, rstd = forward.overloads[place.backend](*arguments)
    operands = x, mean, rstd, *parameters, case.groups
    again = recompute.overloads[place.backend](torch.empty(0), *operands, *arguments[-2:])
    torch.testing.assert_close(again, output, rtol=0, atol=0, equal_nan=True)
    assert again.stride() == output.stride()
    # An expanded gradient has no memory for every element.
    gradient = arrange(source.normal(*case.shape), "contiguous" if case.grad_layout == "expanded" else case.grad_layout)
    expected = backward.overloads[place.backend](gradient, *operands, arguments.activation)
    written = restoring_backward.overloads[place.backend](gradient, *operands, *arguments[-2:])
    torch.testing.assert_close((gradient, *written), (output, *expected), rtol=0, atol=0, equal_nan=True)


shapes = st.builds(
    lambda batch, positions, groups, width: ((batch, groups * width, *positions), groups),
    st.sampled_from((1, 2, 5)),
    st.lists(st.sampled_from((1, 2, 3, 7, 16, 21)), max_size=3).filter(lambda sizes: math.prod(sizes) <= 441),
    st.sampled_from((1, 2, 3, 8, 32)),
    st.sampled_from((1, 2, 3, 5, 16)),
).filter(lambda pair: math.prod(pair[0]) <= 60_000)
cases = st.builds(
    lambda pair, **options: Case(*pair, **options),
    shapes,
    affine=st.booleans(),
    activation=st.sampled_from(tuple(NORM_ACTIVATIONS)),
    layout=st.sampled_from(("contiguous", "last", "permuted", "sliced", "offset")),
    grad_layout=st.sampled_from((*LAYOUTS, "last")),
    seed=st.integers(0, 2**31),
)


@each_place_and_dtype(OPERATOR)
@given(case=cases)
@example(case=Case((4, 32, 16, 16), 32, layout="last", grad_layout="last"))
@example(case=Case((2, 33, 7, 9), 3, layout="last"))
@example(case=Case((3, 8, 5), 8, layout="last", activation="none"))
@example(case=Case((2, 6, 3, 4, 5), 3, layout="last", grad_layout="expanded"))
@example(case=Case((2, 64, 1, 1), 8))
@example(case=Case((5, 20), 4))
@example(case=Case((3, 1, 1, 1), 1))
@example(case=Case((2, 32, 9, 8), 8, activation="relu", layout="last", grad_layout="last"))
@example(case=Case((2, 32, 9, 8), 8, activation="gelu"))
@example(case=Case((2, 33, 7, 9), 3, activation="gelu", layout="last"))
def test_matches_float64(place, dtype, case):
    check(place, dtype, case)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((1, 3, 301, 299), 3), ((1, 3, 301, 299), 1), ((3, 520, 9, 9), 40), ((1, 700, 64), 7), ((2, 77, 9, 9), 7)],
    ids=str,
)
def test_odd_sizes(place, dtype, layout, shape, groups):
    """Groups that several items share, rows wider than the kernels' columns, and rows of odd length."""
    if place in SIMULATED:
        shape = (*shape[:2], *(min(length, 61) for length in shape[2:]))
    check(place, dtype, Case(shape, groups, layout=layout, grad_layout=layout))


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("parameters", ["sliced", "expanded", "offset"])
def test_parameters_in_every_layout(place, layout, parameters):
    """As they come out of a table of the parameters of several layers."""
    source = Source(place.device)
    x, incoming = (arrange(source.normal(2, 6, 5, 4), layout) for _ in range(2))
    weight, bias = (leaf(source.normal(6, layout=parameters)) for _ in range(2))
    dense = [leaf(t.detach().contiguous()) for t in (x, weight, bias)]
    results = []
    for leaves in ([leaf(x), weight, bias], dense):
        y = FV.group_norm_silu(leaves[0], 3, *leaves[1:])
        results.append((y.detach(), *torch.autograd.grad(y, leaves, incoming)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(results[0][0], oracle(x.double(), 3, weight.double(), bias.double(), "silu").float())


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("mean", [1e2, 1e4, -1e4])
def test_a_large_mean_with_a_small_variance(place, layout, mean):
    """E[x^2] - E[x]^2 would lose all digits of the variance, and a mean in float32 an error of 5e-4 standard deviations."""
    length = 20 if place in SIMULATED else 40
    check(place, torch.float32, Case((2, 24, length, length), 6, layout=layout, mean=mean))


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("where", [0, 5, -1])
def test_an_outlier_does_not_spoil_the_statistics(place, layout, where):
    length = 60 if place in SIMULATED else 150
    x = Source(place.device).normal(1, 4, length, length)
    x.view(4, -1)[:, where] = 1e6
    y = FV.group_norm_silu(arrange(x, layout), 2, activation="none")
    expected = F.group_norm(x.double(), 2)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=2e-6)


@each_place(OPERATOR)
def test_weight_gradients_of_a_million_elements(place):
    """131072 terms a sum: the error is that of the terms' rounding, which grows with the root of their number, and not that of the sum."""
    source, length = Source(place.device), 64 if place in SIMULATED else 256
    x, incoming = (last(source.normal(2, 8, length, length)) for _ in range(2))
    parameters = [leaf(source.normal(8)) for _ in range(2)]
    gradients = torch.autograd.grad(FV.group_norm_silu(x, 4, *parameters), parameters, incoming)
    wide = [wide_leaf(p) for p in parameters]
    expected = torch.autograd.grad(oracle(x.double(), 4, *wide, "silu"), wide, incoming.double())
    for actual, exact in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=4e-7 * (2 * length**2) ** 0.5)


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("activation", NORM_ACTIVATIONS)
def test_gradcheck(place, layout, affine, activation):
    source = Source(place.device, torch.float64)
    x = leaf(arrange(source.normal(2, 6, 3, 2), layout))
    parameters = [leaf(source.normal(6)) for _ in range(2)] if affine else []

    def function(x, *parameters):
        return FV.group_norm_silu(x, 3, *parameters, activation=activation)

    assert torch.autograd.gradcheck(function, [x, *parameters])


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("only", ["weight", "bias", "both"])
def test_float32_parameters_with_16_bit_input(place, dtype, only):
    """As under autocast: the output has the dtype of the input, each gradient that of its argument."""
    source = Source(place.device, dtype)
    x = leaf(last(source.normal(2, 12, 5, 5)))
    parameters = {name: leaf(source.normal(12, dtype=torch.float32)) for name in ("weight", "bias") if only in (name, "both")}
    y = FV.group_norm_silu(x, 4, **parameters)
    assert y.dtype == dtype
    incoming = source.normal(*x.shape)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], incoming)
    wide = {name: wide_leaf(p) for name, p in parameters.items()}
    ones = torch.ones(12, dtype=torch.float64, device=place.device)
    full = {"weight": ones, "bias": 0 * ones, **wide}
    wide_x = wide_leaf(x)
    expected = oracle(wide_x, 4, full["weight"], full["bias"], "silu")
    ulps = roundings(place, dtype)
    assert_close(y.detach(), expected.detach(), dtype, roundings=ulps)
    exact = torch.autograd.grad(expected, [wide_x, *wide.values()], incoming.double())
    assert_close(gradients[0], exact[0], dtype, magnitude=4.0, roundings=ulps)
    for actual, gradient in zip(gradients[1:], exact[1:], strict=True):
        assert_close(actual, gradient, torch.float32, magnitude=50.0)


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", [*LAYOUTS, "last"])
def test_incoming_gradients_in_every_layout(place, layout):
    source = Source(place.device)
    for x in (leaf(source.normal(2, 6, 5, 4)), leaf(last(source.normal(2, 6, 5, 4)))):
        y = FV.group_norm_silu(x, 3)
        incoming = arrange(source.normal(*y.shape), layout)
        (ours,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        (dense,) = torch.autograd.grad(y, x, incoming.contiguous())
        assert torch.equal(ours, dense)
        assert ours.stride() == x.stride()


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_what_is_kept_for_the_backward_pass(place, dtype, layout):
    """The input, two float64 a group, and the parameters; neither the normalised values nor the sigmoid."""
    source = Source(place.device, dtype)
    x = leaf(arrange(source.normal(4, 64, 32, 32), layout))
    weight, bias = (leaf(source.normal(64)) for _ in range(2))
    assert kept_bytes(lambda: FV.group_norm_silu(x, 32, weight, bias), x, weight, bias) == 2 * (4 * 32 * 8)


@each_place(OPERATOR)
def test_only_the_wanted_gradients(place):
    source = Source(place.device)
    x, weight, bias = source.normal(2, 6, 4, 4), source.normal(6), source.normal(6)
    for wanted in range(3):
        tensors = [leaf(t) if i == wanted else t for i, t in enumerate((x, weight, bias))]
        wide = [wide_leaf(t) if i == wanted else t.double() for i, t in enumerate((x, weight, bias))]
        (gradient,) = torch.autograd.grad(FV.group_norm_silu(tensors[0], 3, *tensors[1:]).sum(), tensors[wanted])
        (expected,) = torch.autograd.grad(oracle(wide[0], 3, *wide[1:], "silu").sum(), wide[wanted])
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=2e-5)
    assert not FV.group_norm_silu(x, 3, weight, bias).requires_grad


@each_place(OPERATOR)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 6)], ids=str)
def test_empty(place, shape):
    x = leaf(torch.empty(shape, device=place.device))
    weight = leaf(torch.ones(6, device=place.device))
    y = FV.group_norm_silu(x, 3, weight)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert (weight.grad == 0).all()


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_group(place, dtype, layout, value):
    x = Source(place.device, dtype).normal(2, 6, 5, 7)
    x[1, 2, 3, 4] = value
    x = leaf(arrange(x, layout))
    y = FV.group_norm_silu(x, 3)
    spoiled = torch.zeros(2, 3, dtype=torch.bool, device=place.device)
    spoiled[1, 1] = True
    assert torch.equal(y.isnan().reshape(2, 3, -1).any(2), spoiled)
    assert y[0].isfinite().all()
    y.float().sum().backward()
    assert torch.equal(x.grad.isnan().reshape(2, 3, -1).any(2), spoiled)


@each_place_and_dtype(OPERATOR)
def test_nan_with_every_bit_set(place, dtype):
    """Rounding to 16 bits must not carry such a NaN away, wherever it comes in."""
    x, weight, bias, incoming = (torch.ones(shape, dtype=dtype, device=place.device) for shape in ((1, 2, 3), (2,), (2,), (1, 2, 3)))
    x[0, :, 0] = 2
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for poisoned in (x, weight, bias, incoming):
        tensors = [t.clone() for t in (x, weight, bias, incoming)]
        for tensor, original in zip(tensors, (x, weight, bias, incoming), strict=True):
            if original is poisoned:
                tensor.view(integers).fill_(-1)
        leaves = [leaf(t) for t in tensors[:3]]
        y = FV.group_norm_silu(leaves[0], 1, *leaves[1:])
        (gradient,) = torch.autograd.grad(y, leaves[0], tensors[3])
        assert y.isnan().all() or poisoned is incoming
        assert gradient.isnan().all()


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_far_from_zero(place, dtype, activation):
    """There the output is 0 or u, and the gradient 0 or that of u."""
    x = torch.tensor([-1.0, 1.0], dtype=dtype, device=place.device).view(1, 2, 1).repeat(1, 1, 4).view(1, 1, 8)
    for gain in (1.0, 30.0, 80.0, 100.0, 1e3, 1e4):
        weight = leaf(torch.full((1,), gain, dtype=dtype, device=place.device))
        y = FV.group_norm_silu(x, 1, weight, eps=0.0, activation=activation)
        expected = FUNCTIONS[activation](x.double() * gain)
        assert_close(y.detach(), expected, dtype, roundings=roundings(place, dtype))
        (gradient,) = torch.autograd.grad(y[..., 4:].sum(), weight)
        slope = torch.func.grad(FUNCTIONS[activation])(torch.tensor(gain, dtype=torch.float64))
        torch.testing.assert_close(gradient.double().item(), 4.0 * float(slope), rtol=5e-3, atol=1e-6)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_the_derivative_at_zero_is_that_of_torch(place, dtype, activation):
    x, bias = torch.ones(2, 2, 5, dtype=dtype, device=place.device), leaf(torch.zeros(2, dtype=dtype, device=place.device))
    y = FV.group_norm_silu(x, 1, None, bias, activation=activation)
    (gradient,) = torch.autograd.grad(y.sum(), bias)
    slope = torch.func.grad(FUNCTIONS[activation])(torch.zeros(()))
    assert (y == 0).all()
    assert_close(gradient, torch.full((2,), 10.0 * float(slope), dtype=torch.float64, device=place.device), dtype)


@pytest.mark.parametrize("place", [place for place in places(OPERATOR) if place.backend not in ON_EVERY_DEVICE], ids=str)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_gelu_keeps_its_digits_where_it_is_small(place, sign):
    """torch's own takes 1 + erf(u / sqrt(2)), which is 0 below -5.5."""
    x = torch.tensor([-1.0, 1.0], device=place.device).repeat(8).view(1, 1, 16)
    for gain in (0.01, 0.5, 1.0, 2.0, 4.0, 6.0, 9.0, 12.0):
        weight = torch.full((1,), sign * gain, device=place.device)
        y = FV.group_norm_silu(x, 1, weight, eps=0.0, activation="gelu")
        u = weight.cpu().double() * x.cpu().double()
        torch.testing.assert_close(y.cpu().double(), 0.5 * u * torch.erfc(-math.sqrt(0.5) * u), rtol=1e-6 + 2e-7 * gain**2, atol=0)


@each_place(OPERATOR)
def test_constant_input(place):
    """A group without variance is 0 before the affine map; its gradient is divided by sqrt(eps)."""
    x = leaf(torch.full((2, 4, 9), 3.3e4, device=place.device))
    y = FV.group_norm_silu(x, 2, activation="none")
    assert (y == 0).all()
    y.backward(torch.ones_like(y))
    assert x.grad.abs().max() < 1e-3


def deterministic_results(x, incoming, weight, bias):
    y = FV.group_norm_silu(x, 4, weight, bias)
    return [y.detach(), *torch.autograd.grad(y, [x, weight, bias], incoming)]


@pytest.mark.parametrize("place", [p for p in places(OPERATOR) if p.device == "cpu" and p.backend == "cpp"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_results_do_not_depend_on_the_number_of_threads(place, dtype, layout):
    source = Source("cpu", dtype)
    x, incoming = (leaf(arrange(source.normal(2, 20, 90, 91), layout)) for _ in range(2))
    weight, bias = (leaf(source.normal(20)) for _ in range(2))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(deterministic_results(x, incoming.detach(), weight, bias))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_instruction_set(instruction_set, dtype):
    """Each compiled path, reached and right."""
    place = Place("cpu", "cpp")
    for layout in ("contiguous", "last"):
        case = Case((2, 36, 19, 21), 6, layout=layout, grad_layout=layout)
        check(place, dtype, case)
        check(place, dtype, replace(case, activation="none", affine=False))
        check(place, dtype, replace(case, activation="relu"))
        check(place, dtype, replace(case, activation="gelu"))
    assert fastvae._C.last_instruction_set("group_norm") == compiled_path("group_norm", instruction_set)


def test_inductor():
    """Between convolutions in channels_last, whose layout the compiler must leave alone."""
    torch.compiler.reset()
    source = Source("cpu")
    convolutions = [torch.nn.Conv2d(6, 6, 3, padding=1).to(memory_format=torch.channels_last) for _ in range(2)]

    def function(x):
        return convolutions[1](FV.group_norm_silu(convolutions[0](x), 3))

    x = leaf(last(source.normal(2, 6, 8, 8)))
    outputs = [run(x) for run in (function, torch.compile(function, fullgraph=True))]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in outputs]
    torch.testing.assert_close(*gradients)


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(place, dtype):
    """The convolution's 16 bits go in and come out, with parameters in float32; the gradients are float32."""
    source = Source(place.device)
    convolution = torch.nn.Conv2d(3, 8, 3, padding=1).to(place.device)
    norm = torch.nn.GroupNorm(4, 8).to(place.device)
    x = source.normal(2, 3, 10, 10)
    with torch.autocast(place.device, dtype):
        y = FV.group_norm_silu(convolution(x), 4, norm.weight, norm.bias)
        assert y.dtype == dtype
        convolution.zero_grad()
        expected = F.silu(norm(convolution(x)))
    torch.testing.assert_close(y.float(), expected.float(), rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    assert norm.weight.grad.dtype == norm.bias.grad.dtype == torch.float32
    assert convolution.weight.grad.isfinite().all()


@pytest.mark.parametrize("activation", NORM_ACTIVATIONS)
def test_the_reference_function_is_torch_and_twice_differentiable(activation):
    source = Source("cpu", torch.float64)
    tensors = [leaf(source.normal(2, 6, 3, 3)), leaf(source.normal(6)), leaf(source.normal(6))]
    ours = reference.group_norm_silu(tensors[0], 3, *tensors[1:], activation=activation)
    torch.testing.assert_close(ours, oracle(tensors[0], 3, *tensors[1:], activation))
    assert torch.autograd.gradgradcheck(lambda *t: reference.group_norm_silu(t[0], 3, *t[1:], activation=activation), tensors)


X = torch.zeros(2, 6, 3, 3)
BAD = [
    ({"input": [1.0]}, TypeError, "input: got list, takes a tensor"),
    ({"input": X.long()}, TypeError, "input: got torch.int64, takes torch.float32"),
    ({"input": X.to_sparse()}, TypeError, "input: got a tensor of layout torch.sparse_coo, takes a dense one"),
    ({"input": X[0, 0, 0]}, ValueError, r"input: got shape \(3,\), takes \(batch, channels, ...\)"),
    ({"num_groups": 4}, ValueError, "num_groups: got 4 for 6 channels, takes a divisor of the number of channels"),
    ({"num_groups": 0}, ValueError, "num_groups: got 0"),
    ({"num_groups": 3.0}, ValueError, "num_groups: got 3.0"),
    ({"weight": torch.ones(5)}, ValueError, r"weight: got shape \(5,\), takes one value a channel, \(6,\)"),
    ({"weight": torch.ones(6, dtype=torch.float64)}, TypeError, "weight: got torch.float64, takes the dtype of input, torch.float32"),
    ({"bias": torch.ones(6, dtype=torch.bfloat16)}, TypeError, "bias: got torch.bfloat16, takes the dtype of input, torch.float32"),
    ({"bias": torch.ones(6, 1)}, ValueError, r"bias: got shape \(6, 1\)"),
    ({"bias": torch.ones(6, device="meta")}, ValueError, "bias: got a tensor on meta, takes the device of input, cpu"),
    ({"eps": -1.0}, ValueError, "eps: got -1.0, takes a finite number >= 0"),
    ({"eps": math.nan}, ValueError, "eps: got nan"),
    ({"activation": "gelu_tanh"}, ValueError, "activation: got 'gelu_tanh', takes one of 'none', 'silu', 'relu', 'gelu'"),
]


@pytest.mark.parametrize(("changed", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_the_error_names_the_argument(changed, error, message):
    with pytest.raises(error, match=message):
        FV.group_norm_silu(**{"input": X, "num_groups": 3, **changed})
