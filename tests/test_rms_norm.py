"""RMS norm and its activations against float64: values, gradients, layouts, bounds, memory."""

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
    brief,
    compiled_path,
    each_place,
    each_place_and_dtype,
    kept_bytes,
    leaf,
    wide_leaf,
)
from hypothesis import example, given
from hypothesis import strategies as st
from test_group_norm import FUNCTIONS, arrange, is_near_kink, last, roundings

import fastvae
from fastvae import functional as FV
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES
from fastvae.reference import rms_norm as reference

OPERATOR = "rms_norm_forward"
# An interpreter takes seconds for what a kernel does in microseconds: these get smaller tensors.
SIMULATED = (Place("cpu", "triton"), Place("cpu", "cuda"))
NAMES = ("weight", "bias", "scale", "shift")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    parameters: tuple[str, ...] = NAMES[:2]
    activation: str = "silu"
    eps_mode: str = "add"
    eps: float = 1e-6
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    size: float = 1.0
    seed: int = 0

    @property
    def options(self) -> dict:
        return {"eps": self.eps, "eps_mode": self.eps_mode, "activation": self.activation}


def oracle(x, *, eps=1e-6, eps_mode="add", activation="silu", weight=None, bias=None, scale=None, shift=None):
    """The formula, with the functions of torch that it is written with elsewhere."""
    if eps_mode == "add":
        normal = x * (x.square().mean(1, keepdim=True) + eps).rsqrt()
    else:
        normal = F.normalize(x, dim=1, eps=eps) * x.shape[1] ** 0.5
    ones = (1,) * (x.ndim - 2)
    for factor, term, shape in ((weight, bias, (1, -1)), (None if scale is None else 1 + scale, shift, x.shape[:2])):
        normal = normal if factor is None else normal * factor.view(*shape, *ones)
        normal = normal if term is None else normal + term.view(*shape, *ones)
    return FUNCTIONS[activation](normal)


def parameter_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:2] if name in NAMES[:2] else shape[:2]


def is_near_bound(x: torch.Tensor, eps: float) -> bool:
    """Whether rounding decides if the norm of some position or eps is larger: the derivative is another on either side."""
    return bool(((x.detach().norm(dim=1) / eps - 1).abs() < 1e-6).any())


def check(place: Place, dtype: torch.dtype, case: Case) -> None:
    source, ulps = Source(place.device, dtype, case.seed), roundings(place, dtype)
    x = leaf(arrange(source.normal(*case.shape) * case.size, case.layout))
    parameters = {name: leaf(source.normal(*parameter_shape(name, case.shape))) for name in case.parameters}
    wide_x, wide = wide_leaf(x), {name: wide_leaf(p) for name, p in parameters.items()}
    if case.activation == "relu" and is_near_kink(oracle(wide_x, **wide, **case.options | {"activation": "none"})):
        return check(place, dtype, replace(case, seed=case.seed + 1))
    if case.eps_mode == "clamp" and is_near_bound(wide_x, case.eps):
        return check(place, dtype, replace(case, seed=case.seed + 1))
    y = FV.rms_norm_silu(x, **parameters, **case.options)
    stays_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    assert (y.movedim(1, -1) if stays_last else y).is_contiguous()

    expected = oracle(wide_x, **wide, **case.options)
    assert_close(y.detach(), expected.detach(), dtype, magnitude=1.0 + float(expected.detach().abs().max()), roundings=ulps)
    incoming = arrange(source.normal(*case.shape), case.grad_layout)
    gradients = torch.autograd.grad(y, [x, *parameters.values()], incoming)
    oracles = torch.autograd.grad(expected, [wide_x, *wide.values()], incoming.double())
    # What the gradient of x cancels: the incoming one, scaled, and its projection.
    norms = oracle(wide_x.detach(), eps=case.eps, eps_mode=case.eps_mode, activation="none").abs()
    rrms = float((norms / wide_x.detach().abs().clamp(min=1e-300)).max())
    factors = [1 + float(p.detach().abs().max()) for p in parameters.values()]
    largest = 4.0 * rrms * math.prod(factors) * float(incoming.double().abs().max())
    assert_close(gradients[0], oracles[0], dtype, magnitude=max(largest, float(oracles[0].abs().max())), roundings=ulps)
    terms = case.shape[0] * math.prod(case.shape[2:])
    for actual, exact in zip(gradients[1:], oracles[1:], strict=True):
        assert_close(actual, exact, dtype, magnitude=terms**0.5 * 4.0 * math.prod(factors), roundings=ulps)


shapes = st.builds(
    lambda batch, channels, positions: (batch, channels, *positions),
    st.sampled_from((1, 2, 5)),
    st.sampled_from((1, 2, 3, 8, 17, 32, 96)),
    st.lists(st.sampled_from((1, 2, 3, 7, 16, 21)), max_size=3).filter(lambda sizes: math.prod(sizes) <= 441),
).filter(lambda shape: math.prod(shape) <= 60_000)
cases = st.builds(
    Case,
    shapes,
    parameters=st.lists(st.sampled_from(NAMES), unique=True).map(tuple),
    activation=st.sampled_from(tuple(NORM_ACTIVATIONS)),
    eps_mode=st.sampled_from(tuple(EPS_MODES)),
    # With the last, some positions are below the bound and some are not.
    eps=st.sampled_from((1e-12, 1e-6, 2.0)),
    layout=st.sampled_from(("contiguous", "last", "permuted", "sliced", "offset")),
    grad_layout=st.sampled_from((*LAYOUTS, "last")),
    seed=st.integers(0, 2**31),
)


@each_place_and_dtype(OPERATOR)
@given(case=cases)
@example(case=Case((2, 96, 3, 4, 5), ("weight",), eps_mode="clamp", eps=1e-12, layout="last", grad_layout="last"))
@example(case=Case((2, 17, 7, 9), NAMES, layout="last"))
@example(case=Case((3, 8, 5), (), activation="none"))
@example(case=Case((2, 1, 4, 4), ("bias",)))
@example(case=Case((5, 20), NAMES))
@example(case=Case((3, 1, 1, 1), ("scale",), eps_mode="clamp", eps=2.0))
@example(case=Case((2, 32, 9, 8), NAMES, activation="relu", layout="last", grad_layout="last"))
@example(case=Case((2, 32, 9, 8), ("weight",), activation="gelu"))
@example(case=Case((2, 17, 7, 9), activation="gelu", layout="last"))
@example(case=Case((2, 1, 2, 21), (), activation="none", eps_mode="clamp", eps=2.0, seed=23))
def test_matches_float64(place, dtype, case):
    check(place, dtype, case)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("shape", [(1, 3, 301, 299), (3, 520, 9, 9), (1, 700, 64), (2, 77, 9, 9), (40, 33, 2)], ids=str)
def test_odd_sizes(place, dtype, layout, shape):
    """Rows of odd length, and so many positions and samples that threads share them."""
    if place in SIMULATED:
        shape = tuple(min(length, 77) for length in shape)
    check(place, dtype, Case(shape, NAMES, layout=layout, grad_layout=layout))


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("eps_mode", EPS_MODES)
def test_small_and_large_values(place, layout, size, eps_mode):
    check(place, torch.float32, Case((2, 24, 6, 5), layout=layout, size=size, eps_mode=eps_mode, eps=1e-12))


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("parameters", [(), ("weight",), NAMES], ids=str)
@pytest.mark.parametrize("eps_mode", EPS_MODES)
@pytest.mark.parametrize("activation", brief(list(NORM_ACTIVATIONS), ["silu"]))
def test_gradcheck(place, layout, parameters, eps_mode, activation):
    source = Source(place.device, torch.float64)
    x = leaf(arrange(source.normal(2, 6, 3, 2), layout))
    values = [leaf(source.normal(*parameter_shape(name, x.shape))) for name in parameters]

    def function(x, *values):
        named = dict(zip(parameters, values, strict=True))
        return FV.rms_norm_silu(x, eps=2.5, eps_mode=eps_mode, activation=activation, **named)

    assert torch.autograd.gradcheck(function, [x, *values])


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("eps_mode", EPS_MODES)
def test_positions_of_zeros(place, dtype, layout, eps_mode):
    """They are 0, and their gradient is the incoming one over the bound; without eps they are 0 / 0."""
    x = torch.zeros(2, 6, 5, dtype=dtype, device=place.device)
    x[:, :, 2] = 1.0
    x = leaf(arrange(x, layout))
    y = FV.rms_norm_silu(x, eps=0.25, eps_mode=eps_mode, activation="none")
    assert (y.detach()[:, :, :2] == 0).all()
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    bound = 0.25**0.5 if eps_mode == "add" else 0.25 / 6**0.5
    torch.testing.assert_close(
        gradient[:, :, 0].double(), torch.full((2, 6), 1 / bound, dtype=torch.float64, device=place.device), rtol=4e-3, atol=0
    )
    assert FV.rms_norm_silu(x, eps=0.0, eps_mode=eps_mode)[:, :, 0].isnan().all()


@each_place(OPERATOR)
@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2])
def test_the_dimension_of_the_channels(place, dim):
    """Moved to dimension 1 and back, with the memory of the input."""
    x = leaf(Source(place.device).normal(2, 4, 5, 6))
    y = FV.rms_norm_silu(x, dim=dim)
    moved = x.detach().movedim(dim, 1).requires_grad_()
    expected = FV.rms_norm_silu(moved)
    assert y.shape == x.shape
    assert torch.equal(y, expected.movedim(1, dim))
    assert dim != -1 or y.is_contiguous()
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0].movedim(dim, 1), torch.autograd.grad(expected.square().sum(), moved)[0])


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_with_16_bit_input(place, dtype):
    """As under autocast: the output has the dtype of the input, each gradient that of its argument."""
    source = Source(place.device, dtype)
    x = leaf(last(source.normal(2, 12, 5, 5)))
    parameters = {name: leaf(source.normal(*parameter_shape(name, x.shape), dtype=torch.float32)) for name in NAMES}
    y = FV.rms_norm_silu(x, **parameters)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, [x, *parameters.values()], source.normal(*x.shape))
    assert [g.dtype for g in gradients] == [dtype, *[torch.float32] * 4]
    expected = oracle(x.detach().double(), **{name: p.detach().double() for name, p in parameters.items()})
    assert_close(y.detach(), expected, dtype, magnitude=1 + float(expected.abs().max()), roundings=roundings(place, dtype))


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", [*LAYOUTS, "last"])
def test_incoming_gradients_in_every_layout(place, layout):
    source = Source(place.device)
    for x in (leaf(source.normal(2, 6, 5, 4)), leaf(last(source.normal(2, 6, 5, 4)))):
        y = FV.rms_norm_silu(x)
        incoming = arrange(source.normal(*y.shape), layout)
        (ours,) = torch.autograd.grad(y, x, incoming, retain_graph=True)
        (dense,) = torch.autograd.grad(y, x, incoming.contiguous())
        assert torch.equal(ours, dense)
        assert ours.stride() == x.stride()


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_what_is_kept_for_the_backward_pass(place, dtype, layout):
    """The input, one float32 a position, and the parameters; neither the normalised values nor the sigmoid."""
    source = Source(place.device, dtype)
    x = leaf(arrange(source.normal(4, 64, 8, 8), layout))
    weight, bias = (leaf(source.normal(64)) for _ in range(2))
    assert kept_bytes(lambda: FV.rms_norm_silu(x, weight, bias), x, weight, bias) == 4 * 64 * 4


@each_place(OPERATOR)
def test_only_the_wanted_gradients(place):
    source = Source(place.device)
    x, weight, bias = source.normal(2, 6, 4, 4), source.normal(6), source.normal(6)
    for wanted in range(3):
        tensors = [leaf(t) if i == wanted else t for i, t in enumerate((x, weight, bias))]
        wide = [wide_leaf(t) if i == wanted else t.double() for i, t in enumerate((x, weight, bias))]
        (gradient,) = torch.autograd.grad(FV.rms_norm_silu(*tensors).sum(), tensors[wanted])
        (expected,) = torch.autograd.grad(oracle(wide[0], weight=wide[1], bias=wide[2]).sum(), wide[wanted])
        torch.testing.assert_close(gradient.double(), expected, rtol=2e-5, atol=2e-5)
    assert not FV.rms_norm_silu(x, weight, bias).requires_grad


@each_place(OPERATOR)
@pytest.mark.parametrize("names", [NAMES, ("weight", "shift"), ("bias", "scale"), ("scale",)], ids=str)
def test_an_empty_batch_with_parameters(place, names):
    """Those of the channels have more values than those of the samples, of which there are none."""
    x = leaf(torch.empty(0, 64, 5, device=place.device))
    parameters = {name: leaf(torch.ones(parameter_shape(name, x.shape), device=place.device)) for name in names}
    y = FV.rms_norm_silu(x, **parameters)
    assert y.shape == x.shape
    gradients = torch.autograd.grad(y.sum(), [x, *parameters.values()])
    assert [g.shape for g in gradients] == [x.shape, *(p.shape for p in parameters.values())]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("eps_mode", EPS_MODES)
def test_the_reference_has_a_gradient_where_all_channels_are_zero(eps_mode):
    x = torch.zeros(1, 3, 2, dtype=torch.float64, requires_grad=True)
    incoming = torch.ones_like(x)
    (gradient,) = torch.autograd.grad(reference.rms_norm_silu(x, eps=4.0, eps_mode=eps_mode, activation="none"), x, incoming)
    torch.testing.assert_close(gradient, torch.full_like(x, 0.5 if eps_mode == "add" else 3**0.5 / 4))


@each_place(OPERATOR)
@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 6), (2, 0, 3)], ids=str)
def test_empty(place, shape):
    x = leaf(torch.empty(shape, device=place.device))
    weight, scale = (leaf(torch.ones(parameter_shape(name, shape), device=place.device)) for name in ("weight", "scale"))
    y = FV.rms_norm_silu(x, weight, scale=scale)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert (weight.grad == 0).all()
    assert (scale.grad == 0).all()


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_position(place, dtype, layout, value):
    x = Source(place.device, dtype).normal(2, 6, 5, 7)
    x[1, 2, 3, 4] = value
    x = leaf(arrange(x, layout))
    y = FV.rms_norm_silu(x)
    spoiled = torch.zeros(2, 5, 7, dtype=torch.bool, device=place.device)
    spoiled[1, 3, 4] = True
    assert torch.equal(y.isnan().any(1), spoiled)
    y.float().sum().backward()
    assert torch.equal(x.grad.isnan().any(1), spoiled)


@each_place_and_dtype(OPERATOR)
def test_nan_with_every_bit_set(place, dtype):
    """Rounding to 16 bits must not carry such a NaN away, wherever it comes in."""
    tensors = [torch.ones(shape, dtype=dtype, device=place.device) for shape in ((1, 2, 3), (2,), (2,), (1, 2, 3))]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for poisoned in range(4):
        values = [t.clone() for t in tensors]
        values[poisoned].view(integers).fill_(-1)
        leaves = [leaf(t) for t in values[:3]]
        y = FV.rms_norm_silu(*leaves)
        (gradient,) = torch.autograd.grad(y, leaves[0], values[3])
        assert y.isnan().all() or poisoned == 3
        assert gradient.isnan().all()


@each_place_and_dtype(OPERATOR)
def test_is_deterministic(place, dtype):
    source = Source(place.device, dtype)
    size = 12 if place in SIMULATED else 64
    x = leaf(last(source.normal(3, 24, size, size)))
    parameters = [leaf(source.normal(24)) for _ in range(2)]
    results = []
    for _ in range(2):
        y = FV.rms_norm_silu(x, *parameters)
        results.append([y, *torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@each_place(OPERATOR)
def test_does_not_depend_on_the_number_of_threads(place):
    source = Source(place.device)
    size = 12 if place in SIMULATED else 40
    x = leaf(last(source.normal(3, 96, size, size + 1)))
    parameters = [leaf(source.normal(96)) for _ in range(2)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = FV.rms_norm_silu(x, *parameters)
            results.append([y.detach(), *torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        # The fallback's blocks are as large as the caches of so many cores.
        torch.testing.assert_close(
            one, two, rtol=2e-6 if place.backend == "fallback" else 0, atol=1e-5 if place.backend == "fallback" else 0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_instruction_set(instruction_set, dtype):
    """Each compiled path, reached and right."""
    for layout in ("contiguous", "last"):
        case = Case((2, 35, 19, 21), NAMES, layout=layout, grad_layout=layout)
        check(Place("cpu", "cpp"), dtype, case)
        check(Place("cpu", "cpp"), dtype, replace(case, activation="none", parameters=(), eps_mode="clamp", eps=5.9))
        check(Place("cpu", "cpp"), dtype, replace(case, activation="relu"))
        check(Place("cpu", "cpp"), dtype, replace(case, activation="gelu"))
    assert fastvae._C.last_instruction_set("rms_norm") == compiled_path("rms_norm", instruction_set)


def test_inductor():
    """Between convolutions in channels_last, whose layout the compiler must leave alone."""
    torch.compiler.reset()
    source = Source("cpu")
    convolutions = [torch.nn.Conv2d(6, 6, 3, padding=1).to(memory_format=torch.channels_last) for _ in range(2)]

    def function(x):
        return convolutions[1](FV.rms_norm_silu(convolutions[0](x), eps_mode="clamp"))

    x = leaf(last(source.normal(2, 6, 8, 8)))
    outputs = [run(x) for run in (function, torch.compile(function, fullgraph=True))]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(output.sum(), x)[0] for output in outputs]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("activation", NORM_ACTIVATIONS)
@pytest.mark.parametrize("eps_mode", EPS_MODES)
def test_the_reference_function_is_twice_differentiable(eps_mode, activation):
    source = Source("cpu", torch.float64)
    tensors = [
        leaf(source.normal(2, 6, 3)),
        leaf(source.normal(6)),
        leaf(source.normal(6)),
        leaf(source.normal(2, 6)),
        leaf(source.normal(2, 6)),
    ]

    def function(x, weight, bias, scale, shift):
        return reference.rms_norm_silu(x, weight, bias, 0.5, eps_mode=eps_mode, activation=activation, scale=scale, shift=shift)

    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input: got list", {"input": [1.0]}),
        (ValueError, r"input: got shape \(4,\)", {"input": torch.ones(4)}),
        (ValueError, "dim: got 0", {"dim": 0}),
        (ValueError, "dim: got 3", {"dim": 3}),
        (ValueError, "dim: got 1.0", {"dim": 1.0}),
        (ValueError, "eps: got -1", {"eps": -1}),
        (ValueError, "eps: got nan", {"eps": math.nan}),
        (ValueError, "eps_mode: got 'max'", {"eps_mode": "max"}),
        (ValueError, "activation: got 'swish'", {"activation": "swish"}),
        (ValueError, r"weight: got shape \(3,\), takes one value a channel, \(4,\)", {"weight": torch.ones(3)}),
        (TypeError, "bias: got torch.float64", {"bias": torch.ones(4, dtype=torch.float64)}),
        (ValueError, r"scale: got shape \(4,\)", {"scale": torch.ones(4)}),
        (ValueError, r"shift: got shape \(2, 4, 2\)", {"shift": torch.ones(2, 4, 2)}),
        (ValueError, r"shift: got shape \(1, 4\), takes one value a channel of each sample, \(2, 4\)", {"shift": torch.ones(1, 4)}),
    ],
    ids=str,
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        FV.rms_norm_silu(**{"input": torch.ones(2, 4, 3), **arguments})


def test_trailing_dimensions_of_scale_and_shift():
    """As LTX has them, (batch, channels, 1, 1, 1)."""
    x, table = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4)
    wide = table.view(2, 4, 1, 1, 1)
    assert torch.equal(FV.rms_norm_silu(x, scale=wide, shift=wide), FV.rms_norm_silu(x, scale=table, shift=table))
