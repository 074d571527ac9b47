"""The CUDA kernels of GroupNorm and its activations, emulated: what tests/test_group_norm.py asks of every backend."""

import math
from dataclasses import replace

import pytest
import test_group_norm as contract
import torch
from _helpers import LAYOUTS, Place, Source, brief, leaf
from test_group_norm import Case, arrange, check

from fastvae import functional as FV
from fastvae.ops.group_norm import NORM_ACTIVATIONS, TORCH_ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = Place("cpu", "cuda")

# With this argument the backend is forced.
pytestmark = pytest.mark.parametrize("place", [EMULATED], ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "last"])

SHAPES = [
    ((3, 1, 1, 1), 1),  # one element
    ((5, 20), 4),  # one position
    ((2, 64, 1, 1), 8),
    ((3, 520), 2),  # one position of a group too wide for a block
    ((1, 4, 7), 4),  # as many groups as channels
    ((2, 33, 7, 9), 3),  # odd everything
    ((2, 6, 3, 4, 5), 3),
    ((2, 20, 8, 8), 1),  # one group
    ((2, 20, 8, 8), 20),
    ((2, 64, 4, 4), 4),  # on chip in either layout
    ((2, 48, 16, 16), 6),
    ((1, 130, 9, 5), 2),  # more channels than one tile
    ((2, 4, 40, 60), 2),  # planes of several pieces
    ((1, 3, 61, 59), 3),
    ((1, 8, 64, 64), 2),
]


@each_dtype
@each_layout
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_shapes(place, dtype, layout, shape, groups):
    case = Case(shape, groups, layout=layout, grad_layout=layout)
    check(place, dtype, case)
    check(place, dtype, replace(case, affine=False, activation="none"))


@each_dtype
@each_layout
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize(("shape", "groups"), [((2, 33, 7, 9), 3), ((2, 48, 16, 16), 6), ((1, 8, 64, 64), 2)], ids=str)
def test_activations(place, dtype, layout, activation, shape, groups):
    check(place, dtype, Case(shape, groups, activation=activation, layout=layout, grad_layout=layout))


@each_dtype
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
def test_extremes_of_activations(place, dtype, activation):
    contract.test_far_from_zero(place, dtype, activation)
    contract.test_the_derivative_at_zero_is_that_of_torch(place, dtype, activation)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_gelu_keeps_its_digits_where_it_is_small(place, sign):
    contract.test_gelu_keeps_its_digits_where_it_is_small(place, sign)


# Groups that one block handles, and the smallest that are too large for it. The emulated GPU has shared memory for a part of them.
LARGE_GROUPS = [
    ((2, 9, 20, 34), 3, torch.float32),  # keeps one step of two
    ((1, 8, 32, 32), 2, torch.float32),  # as large as a group can be
    ((1, 4, 32, 33), 1, torch.float32),  # larger than that
    ((1, 16, 32, 32), 2, torch.float16),
    ((1, 64, 16, 32), 4, torch.float32),  # too large where there are few groups
    ((2, 64, 16, 32), 4, torch.float32),  # 8,192 elements of one of many groups, 256 threads
    ((1, 128, 32, 32), 8, torch.bfloat16),  # 16,384 elements, 512 threads
    ((1, 400, 2, 3), 1, torch.float32),  # as many threads as channels
]


@each_layout
@pytest.mark.parametrize(("shape", "groups", "dtype"), LARGE_GROUPS, ids=str)
def test_groups_on_both_sides_of_each_limit(place, layout, shape, groups, dtype):
    check(place, dtype, Case(shape, groups, layout=layout, grad_layout=layout, mean=3.0))


@pytest.mark.parametrize("dtype", brief(DTYPES, ["torch.float32", "torch.bfloat16"]))
@pytest.mark.parametrize("layout", ["contiguous", "last", "permuted", "sliced", "offset"])
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "last"])
def test_layouts_and_alignments(place, dtype, layout, grad_layout):
    for shape, groups in (((2, 16, 4, 8), 2), ((2, 16, 20, 20), 8), ((2, 6, 5, 7), 3)):
        check(place, dtype, Case(shape, groups, layout=layout, grad_layout=grad_layout))


@each_layout
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_is_not_aligned(place, layout, offset):
    """In either layout, at every distance from a vector's boundary."""
    results = []
    for skipped in (0, offset):
        shape = (2, 20, 20, 16) if layout == "last" else (2, 16, 20, 20)
        x, incoming = (
            torch.cat([torch.zeros(skipped), Source("cpu", seed=seed).normal(*shape).flatten()])[skipped:].view(shape) for seed in range(2)
        )
        if layout == "last":
            x, incoming = x.movedim(-1, 1), incoming.movedim(-1, 1)
        x = leaf(x)
        y = FV.group_norm_silu(x, 4)
        results.append((y.detach(), *torch.autograd.grad(y, x, incoming)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@each_layout
@pytest.mark.parametrize("mean", [1e2, 1e4, -1e4])
def test_a_large_mean_with_a_small_variance(place, layout, mean):
    for shape, groups in (((2, 24, 20, 20), 6), ((1, 8, 60, 60), 2), ((2, 8, 5, 5), 2), ((1, 16, 20, 20), 2)):
        check(place, torch.float32, Case(shape, groups, layout=layout, mean=mean))


@each_layout
@pytest.mark.parametrize("where", [0, 5, -1])
def test_an_outlier_does_not_spoil_the_statistics(place, layout, where):
    contract.test_an_outlier_does_not_spoil_the_statistics(place, layout, where)


def test_sums_of_many_elements_keep_their_digits(place):
    contract.test_weight_gradients_of_a_million_elements(place)


@each_dtype
@each_layout
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_group(place, dtype, layout, value):
    contract.test_nan_stays_in_its_group(place, dtype, layout, value)
    x = Source(place.device, dtype).normal(2, 6, 50, 50)
    x[1, 2, 30, 4] = value
    y = FV.group_norm_silu(arrange(x, layout), 3)
    spoiled = y.isnan().reshape(2, 3, -1).any(2)
    assert spoiled.nonzero().tolist() == [[1, 1]]


@each_dtype
def test_nan_with_every_bit_set(place, dtype):
    contract.test_nan_with_every_bit_set(place, dtype)


@each_layout
@pytest.mark.parametrize("length", [3, 40, 60])
def test_constant_input(place, layout, length):
    x = leaf(arrange(torch.full((2, 4, length, length), 3.3e4), layout))
    y = FV.group_norm_silu(x, 2, activation="none")
    assert (y == 0).all()
    y.backward(torch.ones_like(y))
    assert x.grad.abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 6), (2, 0, 3)], ids=str)
def test_empty(place, shape):
    if shape[1]:
        contract.test_empty(place, shape)
    y, mean, rstd = torch.ops.fastvae.group_norm_forward.cuda(torch.empty(shape), 3, None, None, 0.25, 1)
    assert y.shape == shape
    assert (mean == 0).all()
    assert (rstd == 2).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("only", ["weight", "bias", "both"])
def test_float32_parameters_with_16_bit_input(place, dtype, only):
    contract.test_float32_parameters_with_16_bit_input(place, dtype, only)


def test_only_the_wanted_gradients(place):
    contract.test_only_the_wanted_gradients(place)


@each_layout
def test_what_is_kept_for_the_backward_pass(place, layout):
    contract.test_what_is_kept_for_the_backward_pass(place, torch.float32, layout)


@each_layout
@pytest.mark.parametrize("shape", [(2, 8, 60, 50), (3, 16, 8, 8), (3, 16, 24, 20)], ids=["in pieces", "on chip", "partly on chip"])
def test_sums_are_the_same_in_whatever_order_blocks_run(place, emulated, layout, shape):
    """Also while a graph is captured, with a workspace of its own."""
    source = Source(place.device)
    x, incoming = (leaf(arrange(source.normal(*shape), layout)) for _ in range(2))
    parameters = [leaf(source.normal(shape[1])) for _ in range(2)]
    results = [contract.deterministic_results(x, incoming.detach(), *parameters) for _ in range(2)]
    emulated.set_capturing(1)
    results.append(contract.deterministic_results(x, incoming.detach(), *parameters))
    emulated.set_capturing(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_dtype
@pytest.mark.parametrize("activation", NORM_ACTIVATIONS)
def test_moments_are_those_of_float64(place, dtype, activation):
    """To what float32 deviations give, which is more digits than a float32 mean has."""
    for shape in ((2, 6, 5, 7), (1, 6, 70, 50), (1, 6, 40, 50)):
        x = (Source(place.device, torch.float64).normal(*shape) + 1000).to(dtype)
        _, mean, rstd = torch.ops.fastvae.group_norm_forward.cuda(x, 3, None, None, 1e-5, NORM_ACTIVATIONS[activation])
        groups = x.double().reshape(shape[0], 3, -1)
        torch.testing.assert_close(mean, groups.mean(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(rstd, (groups.var(2, correction=0) + 1e-5).rsqrt(), rtol=2e-6, atol=0)
