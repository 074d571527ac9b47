"""Snake and SnakeBeta against float64: values, gradients, layouts, memory."""

import math
from dataclasses import dataclass

import pytest
import torch
from _helpers import LAYOUTS, Place, Source, assert_close, compiled_path, each_place, each_place_and_dtype, kept_bytes, leaf, wide_leaf
from hypothesis import example, given
from hypothesis import strategies as st
from test_group_norm import arrange, last, roundings
from torch import nn

import fastvae
from fastvae import functional as FV
from fastvae import nn as fnn
from fastvae import reference

OPERATOR = "snake_forward"
# An interpreter takes seconds for what a kernel does in microseconds: these get smaller tensors.
SIMULATED = (Place("cpu", "triton"), Place("cpu", "cuda"))


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    with_beta: bool = True
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    size: float = 1.0
    seed: int = 0


def oracle(x, alpha, beta=None, eps=1e-9):
    shape = (-1, *(1,) * (x.ndim - 2))
    alpha, beta = alpha.view(shape), (alpha if beta is None else beta).view(shape)
    return x + (1.0 / (beta + eps)) * torch.sin(x * alpha).pow(2)


def check(place: Place, dtype: torch.dtype, case: Case) -> None:
    source, ulps = Source(place.device, dtype, case.seed), roundings(place, dtype)
    x = leaf(arrange(source.normal(*case.shape) * case.size, case.layout))
    parameters = [leaf(source.uniform(case.shape[1]) + 0.5) for _ in range(1 + case.with_beta)]
    y = FV.snake(x, *parameters)
    stays_last = not x.is_contiguous() and x.movedim(1, -1).is_contiguous()
    assert (y.movedim(1, -1) if stays_last else y).is_contiguous()

    wide_x, wide = wide_leaf(x), [wide_leaf(p) for p in parameters]
    expected = oracle(wide_x, *wide)
    # The phase has the rounding error of the product of frequency and input.
    magnitude = 4.0 + 4.0 * float(wide_x.detach().abs().max())
    assert_close(y.detach(), expected.detach(), dtype, magnitude=magnitude, roundings=ulps)
    incoming = arrange(source.normal(*case.shape), case.grad_layout)
    gradients = torch.autograd.grad(y, [x, *parameters], incoming)
    oracles = torch.autograd.grad(expected, [wide_x, *wide], incoming.double())
    largest = magnitude * 4.0 * float(incoming.double().abs().max())
    assert_close(gradients[0], oracles[0], dtype, magnitude=largest, roundings=ulps)
    terms = case.shape[0] * math.prod(case.shape[2:])
    for actual, exact in zip(gradients[1:], oracles[1:], strict=True):
        assert_close(actual, exact, dtype, magnitude=terms**0.5 * magnitude * largest, roundings=ulps)


shapes = st.builds(
    lambda batch, channels, positions: (batch, channels, *positions),
    st.sampled_from((1, 2, 5)),
    st.sampled_from((1, 2, 3, 8, 17, 32)),
    st.lists(st.sampled_from((1, 2, 3, 7, 16, 21)), max_size=3).filter(lambda sizes: math.prod(sizes) <= 441),
).filter(lambda shape: math.prod(shape) <= 60_000)
cases = st.builds(
    Case,
    shapes,
    with_beta=st.booleans(),
    layout=st.sampled_from(("contiguous", "last", "permuted", "sliced", "offset")),
    grad_layout=st.sampled_from((*LAYOUTS, "last")),
    size=st.sampled_from((1e-3, 1.0, 100.0)),
    seed=st.integers(0, 2**31),
)


@each_place_and_dtype(OPERATOR)
@given(case=cases)
@example(case=Case((2, 17, 37), layout="last", grad_layout="last"))
@example(case=Case((3, 8, 5, 4), with_beta=False))
@example(case=Case((5, 20)))
def test_matches_float64(place, dtype, case):
    check(place, dtype, case)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("shape", [(1, 3, 90_001), (2, 520, 81), (1, 700, 64), (40, 33, 2)], ids=str)
def test_odd_sizes(place, dtype, layout, shape):
    """Rows of odd length, and so many positions and samples that threads share them."""
    if place in SIMULATED:
        shape = tuple(min(length, 77) for length in shape)
    check(place, dtype, Case(shape, layout=layout, grad_layout=layout))


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("with_beta", [False, True])
def test_gradcheck(place, layout, with_beta):
    source = Source(place.device, torch.float64)
    x = leaf(arrange(source.normal(2, 4, 5), layout))
    assert torch.autograd.gradcheck(FV.snake, [x, *(leaf(source.uniform(4) + 0.5) for _ in range(1 + with_beta))])


@each_place(OPERATOR)
def test_phases_of_many_periods(place):
    """Up to where float32 holds them; beyond, what is added to the input stays between 0 and the gain."""
    x = torch.linspace(-1e5, 1e5, 1001, device=place.device).view(1, 1, -1)
    one = torch.ones(1, device=place.device)
    expected = torch.sin(x.double()).square()
    torch.testing.assert_close((FV.snake(x, one, eps=0.0).double() - x.double()), expected, rtol=0, atol=8e-3)
    far = torch.tensor([1e8, -1e20, 3e38], device=place.device).view(1, 1, -1)
    y = FV.snake(far.requires_grad_(), one)
    assert torch.equal(y, far)
    (gradient,) = torch.autograd.grad(y.sum(), far)
    assert ((gradient >= -1e-3) & (gradient <= 2.001)).all()


@each_place(OPERATOR)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_with_16_bit_input(place, dtype):
    source = Source(place.device, dtype)
    x = leaf(last(source.normal(2, 12, 25)))
    alpha, beta = (leaf(source.uniform(12, dtype=torch.float32) + 0.5) for _ in range(2))
    y = FV.snake(x, alpha, beta)
    assert y.dtype == dtype
    gradients = torch.autograd.grad(y, [x, alpha, beta], source.normal(*x.shape))
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    expected = oracle(*(t.detach().double() for t in (x, alpha, beta)))
    assert_close(y.detach(), expected, dtype, magnitude=4.0, roundings=roundings(place, dtype))


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
def test_what_is_kept_for_the_backward_pass(place, layout):
    """The input and the parameters; neither phases nor sines."""
    source = Source(place.device)
    x = leaf(arrange(source.normal(4, 64, 50), layout))
    alpha = leaf(source.uniform(64))
    assert kept_bytes(lambda: FV.snake(x, alpha)) <= x.nbytes + 3 * alpha.nbytes


@each_place(OPERATOR)
@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (0, 6), (2, 0, 3)], ids=str)
def test_empty(place, shape):
    x, alpha = leaf(torch.empty(shape, device=place.device)), leaf(torch.ones(shape[1], device=place.device))
    y = FV.snake(x, alpha)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert (alpha.grad == 0).all()


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("layout", ["contiguous", "last"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_element(place, dtype, layout, value):
    x = Source(place.device, dtype).normal(2, 6, 5)
    x[1, 2, 3] = value
    x = leaf(arrange(x, layout))
    y = FV.snake(x, torch.ones(6, dtype=dtype, device=place.device))
    spoiled = torch.zeros(x.shape, dtype=torch.bool, device=place.device)
    spoiled[1, 2, 3] = True
    assert torch.equal(y.isnan(), spoiled)
    y.float().sum().backward()
    assert torch.equal(x.grad.isnan(), spoiled)


@each_place_and_dtype(OPERATOR)
def test_nan_with_every_bit_set(place, dtype):
    """Rounding to 16 bits must not carry such a NaN away, wherever it comes in."""
    tensors = [torch.ones(shape, dtype=dtype, device=place.device) for shape in ((1, 2, 3), (2,), (2,), (1, 2, 3))]
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for poisoned in range(4):
        values = [t.clone() for t in tensors]
        values[poisoned].view(integers).fill_(-1)
        leaves = [leaf(t) for t in values[:3]]
        y = FV.snake(*leaves)
        (gradient,) = torch.autograd.grad(y, leaves[0], values[3])
        assert y.isnan().all() or poisoned == 3
        assert gradient.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_instruction_set(instruction_set, dtype):
    """Each compiled path, reached and right."""
    for layout in ("contiguous", "last"):
        check(Place("cpu", "cpp"), dtype, Case((2, 35, 401), layout=layout, grad_layout=layout))
    assert fastvae._C.last_instruction_set("snake") == compiled_path("snake", instruction_set)


def test_does_not_depend_on_the_number_of_threads():
    source = Source("cpu")
    x, alpha = leaf(source.normal(3, 24, 4001)), leaf(source.uniform(24))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y = FV.snake(x, alpha)
            results.append([y.detach(), *torch.autograd.grad(y, [x, alpha], torch.ones_like(y))])
    finally:
        torch.set_num_threads(threads)
    if "cpp" in fastvae._backend.serving(OPERATOR, "cpu", torch.float32):
        assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
    else:
        torch.testing.assert_close(*results)


def test_the_reference_function_is_twice_differentiable():
    source = Source("cpu", torch.float64)
    assert torch.autograd.gradgradcheck(reference.snake, [leaf(source.normal(2, 3, 4)), *(leaf(source.uniform(3) + 0.5) for _ in range(2))])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "input: got list", {"input": [1.0]}),
        (ValueError, r"input: got shape \(4,\)", {"input": torch.ones(4)}),
        (ValueError, r"alpha: got shape \(3,\), takes one value a channel, \(4,\)", {"alpha": torch.ones(3)}),
        (ValueError, r"alpha: got shape \(2, 2\), takes one value a channel, \(4,\)", {"alpha": torch.ones(2, 2)}),
        (TypeError, "beta: got torch.float64", {"beta": torch.ones(4, dtype=torch.float64)}),
        (ValueError, "eps: got -1", {"eps": -1}),
    ],
    ids=str,
)
def test_bad_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        FV.snake(**{"input": torch.ones(2, 4, 3), "alpha": torch.ones(4), **arguments})


@pytest.mark.parametrize("with_beta", [False, True])
@pytest.mark.parametrize("log_scale", [False, True])
def test_the_module_is_its_formula(with_beta, log_scale):
    module = fnn.Snake(4, with_beta=with_beta, log_scale=log_scale)
    x = leaf(torch.randn(2, 4, 9))
    assert set(module.state_dict()) == ({"alpha", "beta"} if with_beta else {"alpha"})
    assert all(parameter.shape == (1, 4, 1) for parameter in module.parameters())
    torch.testing.assert_close(module(x), oracle(x, *(torch.ones(4) for _ in range(1 + with_beta))))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.0)
    scaled = [p.exp() if log_scale else p for p in module.parameters()]
    expected = oracle(x, *(p.flatten() for p in scaled))
    torch.testing.assert_close(module(x), expected)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *module.parameters()]) for y in (module(x), expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_the_module_takes_the_place_of_an_activation():
    network = nn.Sequential(nn.Conv1d(1, 6, 7, padding=3), fnn.Snake(6), nn.Conv1d(6, 1, 7, padding=3))
    x = torch.randn(2, 1, 40)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), network(x))
    assert "6, with_beta=False" in repr(network[1])
    with pytest.raises(ValueError, match="channels: got 0"):
        fnn.Snake(0)
