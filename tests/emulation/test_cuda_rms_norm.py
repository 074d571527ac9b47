"""The CUDA kernels of RMS norm and its activations, emulated: what tests/test_rms_norm.py asks of every backend."""

import math
from dataclasses import replace

import pytest
import test_rms_norm as contract
import torch
from _helpers import LAYOUTS, Place, Source, leaf
from test_group_norm import arrange
from test_rms_norm import NAMES, Case, check

from fastvae import functional as FV
from fastvae.ops.group_norm import NORM_ACTIVATIONS, TORCH_ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = Place("cpu", "cuda")

# With this argument the backend is forced.
pytestmark = pytest.mark.parametrize("place", [EMULATED], ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "last"])
each_mode = pytest.mark.parametrize("eps_mode", EPS_MODES)

SHAPES = [
    (3, 1, 1, 1),  # one element
    (5, 20),  # one position
    (2, 1, 9, 7),  # one channel
    (2, 3, 20, 16),  # fewer channels than lines of a tile
    (40, 33, 2),  # more samples than a grid has blocks
    (2, 17, 7, 9),  # odd everything
    (2, 6, 3, 4, 5),
    (1, 16, 40, 24),  # steps of one thread a position
    (1, 96, 16, 20),  # three of four vectors
    (2, 130, 8, 5),  # two threads too many
]


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(place, dtype, layout, shape):
    case = Case(shape, NAMES, layout=layout, grad_layout=layout)
    check(place, dtype, case)
    check(place, dtype, replace(case, parameters=("weight",), activation="none", eps_mode="clamp", eps=2.0))


@each_dtype
@each_layout
@pytest.mark.parametrize("activation", TORCH_ACTIVATIONS)
@pytest.mark.parametrize("shape", [(2, 17, 7, 9), (2, 130, 8, 5), (1, 1100, 3, 2)], ids=str)
def test_activations(place, dtype, layout, activation, shape):
    check(place, dtype, Case(shape, NAMES, activation=activation, layout=layout, grad_layout=layout))


# In channels-last memory: a warp for each position, two, and four; more channels than these take. In contiguous memory: tiles of which
# shared memory has room for all, for a part, and for no step of some passes; lines of 128, 64 and 32 bytes.
MANY_CHANNELS = [
    ((1, 384, 5, 4), torch.bfloat16),
    ((1, 512, 4, 5), torch.float32),
    ((2, 516, 3, 4), torch.float16),
    ((1, 1100, 3, 2), torch.float32),
    ((1, 2048, 2, 2), torch.bfloat16),
    ((2, 2052, 3), torch.float32),
    ((3, 2500), torch.bfloat16),
    ((1, 60, 8, 12), torch.float32),
    ((1, 100, 8, 24), torch.bfloat16),
    ((1, 200, 8, 24), torch.float16),
]


@each_layout
@pytest.mark.parametrize(("shape", "dtype"), MANY_CHANNELS, ids=str)
@pytest.mark.parametrize("parameters", [NAMES[:2], NAMES], ids=["of all samples", "of each sample"])
def test_many_channels(place, layout, shape, dtype, parameters):
    check(place, dtype, Case(shape, parameters, layout=layout, grad_layout=layout))


@each_layout
@pytest.mark.parametrize("parameters", [(), *((name,) for name in NAMES), ("weight", "shift"), ("bias", "scale")], ids=str)
def test_parameters_of_all_samples_and_of_each(place, layout, parameters):
    """Of which the two gradients are sums over different rows of partial sums."""
    for shape in ((3, 24, 6, 9), (3, 5, 4, 4), (5, 8)):
        check(place, torch.float32, Case(shape, parameters, layout=layout, grad_layout=layout))


@each_dtype
@pytest.mark.parametrize("layout", ["contiguous", "last", "permuted", "sliced", "offset"])
@pytest.mark.parametrize("grad_layout", [*LAYOUTS, "last"])
def test_layouts_and_alignments(place, dtype, layout, grad_layout):
    for shape in ((2, 16, 4, 8), (2, 6, 5, 7)):
        check(place, dtype, Case(shape, layout=layout, grad_layout=grad_layout))


@each_layout
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_memory_that_is_not_aligned(place, layout, offset):
    """In either layout, at every distance from a vector's boundary."""
    results = []
    for skipped in (0, offset):
        shape = (2, 20, 12, 16) if layout == "last" else (2, 16, 20, 12)
        x, incoming = (
            torch.cat([torch.zeros(skipped), Source("cpu", seed=seed).normal(*shape).flatten()])[skipped:].view(shape) for seed in range(2)
        )
        if layout == "last":
            x, incoming = x.movedim(-1, 1), incoming.movedim(-1, 1)
        x = leaf(x)
        y = FV.rms_norm_silu(x)
        results.append((y.detach(), *torch.autograd.grad(y, x, incoming)))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_an_rrms_that_is_not_aligned(place):
    """The operator takes it as it comes."""
    source = Source(place.device)
    x, incoming = source.normal(2, 6, 20, 12), source.normal(2, 6, 20, 12)
    _, rrms = torch.ops.fastvae.rms_norm_forward.cuda(x, None, None, 1e-6, 0, 1)
    shifted = torch.cat([torch.zeros(1), rrms.flatten()])[1:].view(rrms.shape)
    results = [torch.ops.fastvae.rms_norm_backward.cuda(incoming, x, r, None, None, 1e-6, 0, 1)[0] for r in (rrms, shifted)]
    assert torch.equal(*results)


@each_layout
@pytest.mark.parametrize("size", [1e-4, 1e4])
@each_mode
def test_small_and_large_values(place, layout, size, eps_mode):
    contract.test_small_and_large_values(place, layout, size, eps_mode)


@each_dtype
@each_layout
@each_mode
def test_positions_of_zeros(place, dtype, layout, eps_mode):
    contract.test_positions_of_zeros(place, dtype, layout, eps_mode)


@each_dtype
@each_layout
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_position(place, dtype, layout, value):
    contract.test_nan_stays_in_its_position(place, dtype, layout, value)


@each_dtype
def test_nan_with_every_bit_set(place, dtype):
    contract.test_nan_with_every_bit_set(place, dtype)


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (2, 6, 0, 4), (0, 6), (2, 0, 3)], ids=str)
def test_empty(place, shape):
    contract.test_empty(place, shape)
    y, rrms = torch.ops.fastvae.rms_norm_forward.cuda(torch.empty(shape), None, None, 0.25, 0, 1)
    assert y.shape == shape
    assert rrms.shape == (shape[0], *shape[2:])
    assert (rrms == 0).all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_parameters_with_16_bit_input(place, dtype):
    contract.test_float32_parameters_with_16_bit_input(place, dtype)


def test_only_the_wanted_gradients(place):
    contract.test_only_the_wanted_gradients(place)


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2])
def test_the_dimension_of_the_channels(place, dim):
    contract.test_the_dimension_of_the_channels(place, dim)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_the_backward_pass(place, dtype, layout):
    contract.test_what_is_kept_for_the_backward_pass(place, dtype, layout)


@each_layout
@pytest.mark.parametrize("names", [NAMES[:2], NAMES], ids=["of all samples", "of each sample"])
@pytest.mark.parametrize("shape", [(3, 16, 20, 9), (2, 520, 6, 4)], ids=["few channels", "many channels"])
def test_sums_are_the_same_in_whatever_order_blocks_run(place, emulated, layout, names, shape):
    """Also while a graph is captured, with a workspace of its own."""
    source = Source(place.device)
    x, incoming = (leaf(arrange(source.normal(*shape), layout)) for _ in range(2))
    parameters = {name: leaf(source.normal(*contract.parameter_shape(name, shape))) for name in names}

    def results():
        y = FV.rms_norm_silu(x, **parameters)
        return [y, *torch.autograd.grad(y, [x, *parameters.values()], incoming.detach())]

    expected, again = results(), results()
    emulated.set_capturing(1)
    captured = results()
    emulated.set_capturing(0)
    for other in (again, captured):
        assert all(torch.equal(a, b) for a, b in zip(expected, other, strict=True))


@each_dtype
@each_layout
@each_mode
def test_rrms_is_that_of_float64(place, dtype, layout, eps_mode):
    for shape in ((2, 6, 5, 7), (1, 520, 4, 3)):
        x = arrange(Source(place.device, dtype).normal(*shape), layout)
        arguments = (None, None, 2.0, EPS_MODES[eps_mode], NORM_ACTIVATIONS["none"])
        _, rrms = torch.ops.fastvae.rms_norm_forward.cuda(x, *arguments)
        squares = x.double().square().sum(1)
        rms = (squares / shape[1] + 2.0).sqrt() if eps_mode == "add" else squares.sqrt().clamp(min=2.0) / shape[1] ** 0.5
        torch.testing.assert_close(rrms.double(), 1 / rms, rtol=1e-6, atol=0)
