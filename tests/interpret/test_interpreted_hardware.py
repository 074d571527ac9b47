"""A GPU does what the interpreter does not: it runs programs in any order, leaves anything in the lanes outside a mask, approximates
roots, quotients and exponentials to a unit in the last place, and truncates the sums of tensor cores."""

import math

import numpy
import pytest
import test_codebook
import torch
import triton
import triton.language as tl
from _calls import CALLS_OF_KERNELS
from _helpers import NOISE_TOLERANCE, Source
from test_codebook import DATA, assert_nearest
from test_interpreted_codebook import COMPARED
from test_interpreted_contracts import FAMILIES
from test_interpreted_helpers import losses
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from fastvae import functional as FV
from fastvae.kernels import _device, _launch, _reduce
from fastvae.reference import latent as reference

ROWS = 21

# The interpreter takes seconds for a large feature map. One call of each family, and in the long proof every other.
each_call = pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, marks=[] if call.name in FAMILIES else pytest.mark.prove, id=str(call))
        for call in CALLS_OF_KERNELS
        if not call.name.startswith("GroupNorm and SiLU")
    ],
)


# The rest is for the long proof.
QUICK = test_codebook.random, test_codebook.nearly_duplicated, test_codebook.midway, test_codebook.mixed_rows
each_data = pytest.mark.parametrize(
    "data", [pytest.param(data, marks=[] if data in QUICK else pytest.mark.prove, id=data.__name__) for data in DATA]
)


def assert_same_bits(results: dict, others: dict) -> None:
    assert results.keys() == others.keys()
    for name, value in results.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=0, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def run_in_another_order(patch: pytest.MonkeyPatch, seed: int) -> None:
    """The programs of each launch run in an order that ``seed`` draws."""
    generator = numpy.random.default_rng(seed)
    set_dim, set_index = InterpreterBuilder.set_grid_dim, InterpreterBuilder.set_grid_idx
    order = []

    def set_grid_dim(self, *sizes):
        set_dim(self, *sizes)
        order[:] = generator.permutation(math.prod(sizes))

    def set_grid_idx(self, *index):
        drawn = order[numpy.ravel_multi_index(index, self.grid_dim)]
        set_index(self, *(int(i) for i in numpy.unravel_index(drawn, self.grid_dim)))

    patch.setattr(InterpreterBuilder, "set_grid_dim", set_grid_dim)
    patch.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)


@each_call
def test_the_order_of_programs_changes_no_bit(monkeypatch, call):
    expected = call.results(call.tensors("cpu", ROWS))
    run_in_another_order(monkeypatch, seed=1)
    assert_same_bits(call.results(call.tensors("cpu", ROWS)), expected)


@pytest.mark.parametrize("data", [test_codebook.nearly_duplicated, test_codebook.clustered, test_codebook.midway], ids=lambda f: f.__name__)
def test_the_order_of_programs_changes_no_index(monkeypatch, data):
    """Rows that several programs decide together."""
    monkeypatch.setattr(_launch, "RECHECK_TILES", 1)
    run_in_another_order(monkeypatch, seed=1)
    x, codebook = data(Source("cpu"), 6, 20, 64 * 2 + 1)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def test_another_order_runs_every_program_once(monkeypatch):
    run_in_another_order(monkeypatch, seed=3)
    builder = InterpreterBuilder()
    builder.set_grid_dim(3, 4, 5)
    indices = []
    for index in numpy.ndindex(3, 4, 5):
        builder.set_grid_idx(*index)
        indices.append(builder.grid_idx)
    assert sorted(indices) == sorted(numpy.ndindex(3, 4, 5))
    assert indices != sorted(indices)


def poison_masked_lanes(patch: pytest.MonkeyPatch) -> list[int]:
    """Masked loads that do not say what is in the other lanes fill them with NaN, or with the largest integer. Returns the numbers of lanes
    that were filled."""
    load = InterpreterBuilder.create_masked_load
    counts = []

    def create_masked_load(self, pointers, mask, other, *options):
        loaded = load(self, pointers, mask, other, *options)
        if other is None:
            dtype = loaded.data.dtype
            loaded.data[~mask.data] = numpy.nan if dtype.kind == "f" else numpy.iinfo(dtype).max
            counts.append(int((~mask.data).sum()))
        return loaded

    patch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
    return counts


@each_call
def test_lanes_outside_a_mask_reach_no_result(monkeypatch, call):
    expected = call.results(call.tensors("cpu", ROWS))
    poison_masked_lanes(monkeypatch)
    assert_same_bits(call.results(call.tensors("cpu", ROWS)), expected)


@triton.jit
def shifted_copy_kernel(source, target, before, count, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    tl.store(target + lane, tl.load(source + lane - before, mask=lane < count), mask=lane < count)


@pytest.mark.parametrize(("before", "count", "outside"), [(0, 5, 0), (1, 4, 1), (0, 6, 1), (-2, 5, 2)])
def test_an_access_outside_the_arguments_is_found(before, count, outside):
    source, target = torch.arange(12.0)[3:8], torch.zeros(8)
    if outside:
        with pytest.raises(InterpreterError, match=f"{outside} of {count} lanes access memory outside the arguments"):
            shifted_copy_kernel[(1,)](source, target, before, count, LANES=8)
    else:
        shifted_copy_kernel[(1,)](source, target, before, count, LANES=8)
        assert target.tolist() == [3, 4, 5, 6, 7, 0, 0, 0]


QUICK_LOSSES = "codebook", "reconstruction, samples", "jacobian, samples"


@pytest.mark.parametrize(
    "call", [pytest.param(call, marks=[] if name in QUICK_LOSSES else pytest.mark.prove, id=name) for name, call in losses()]
)
def test_lanes_outside_a_mask_reach_no_sum(monkeypatch, call):
    """Sums over several programs, the last of which has few elements."""
    torch.manual_seed(0)
    expected = call()
    poison_masked_lanes(monkeypatch)
    torch.manual_seed(0)
    results = call()
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


def test_there_are_lanes_outside_masks(monkeypatch):
    counts = poison_masked_lanes(monkeypatch)
    FV.kl_normal(torch.randn(3, 20), torch.randn(3, 20))
    assert sum(counts) > 0


def test_slots_are_stored_as_they_are_on_amd(monkeypatch):
    """The operation that waits for the store of a slot changes nothing."""
    mu, logvar = Source("cpu").normal(2, 6, 300)
    expected = FV.kl_normal(mu, logvar, reduction="sum"), FV.kl_normal(mu, logvar, free_bits=0.3)
    monkeypatch.setattr(_reduce, "ON_AMD", True)
    assert (FV.kl_normal(mu, logvar, reduction="sum"), FV.kl_normal(mu, logvar, free_bits=0.3)) == expected


def off_by_an_ulp(patch: pytest.MonkeyPatch, *names: str) -> None:
    """The float32 results of these operations are moved by -1, 0 or 1 units in the last place, at random."""
    generator = numpy.random.default_rng(0)

    def moved(operation):
        def run(self, *arguments):
            result = operation(self, *arguments)
            if result.data.dtype == numpy.float32:
                towards = generator.choice(numpy.array([-numpy.inf, 0.0, numpy.inf], numpy.float32), result.data.shape)
                stays = (towards == 0) | ~numpy.isfinite(result.data) | (result.data == 0)
                result.data = numpy.where(stays, result.data, numpy.nextafter(result.data, towards))
            return result

        return run

    for name in names:
        patch.setattr(InterpreterBuilder, name, moved(getattr(InterpreterBuilder, name)))


APPROXIMATE = ("create_sqrt", "create_fdiv", "create_exp", "create_exp2")


def test_noise_with_approximate_roots(monkeypatch):
    zero = torch.zeros(3, 700)
    exact = FV.reparameterize(zero, zero, seed=5)
    off_by_an_ulp(monkeypatch, *APPROXIMATE)
    noise = FV.reparameterize(zero, zero, seed=5)
    assert not torch.equal(noise, exact)
    torch.testing.assert_close(noise, reference.normal(torch.tensor(5), zero.shape), rtol=0, atol=NOISE_TOLERANCE)


@each_data
@pytest.mark.parametrize("dim", [pytest.param(7, marks=pytest.mark.prove), 33])
def test_indices_with_approximate_roots(monkeypatch, data, dim):
    off_by_an_ulp(monkeypatch, *APPROXIMATE)
    x, codebook = data(Source("cpu"), 1 if data in COMPARED else 4, dim, 70)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


# Tensor cores add 16 products and the accumulator at a time: they truncate each to a multiple of a unit, 2^-23 of the power of two of the
# largest, add them, and truncate the sum to float32.
BLOCK, BITS = 16, 24


def truncate(values: numpy.ndarray, magnitude: numpy.ndarray) -> numpy.ndarray:
    """``values`` (float64), rounded toward zero to BITS bits below the power of two above ``magnitude``."""
    _, exponent = numpy.frexp(magnitude)
    return numpy.ldexp(numpy.trunc(numpy.ldexp(values, BITS - exponent)), exponent - BITS)


def tensor_core_product(a: numpy.ndarray, b: numpy.ndarray, total: numpy.ndarray) -> numpy.ndarray:
    """``a @ b + total`` of float16 matrices as tensor cores compute it, in float32."""
    total = total.astype(numpy.float64)
    for first in range(0, a.shape[1], BLOCK):
        rows, columns = a[:, first : first + BLOCK, None].astype(numpy.float64), b[None, first : first + BLOCK].astype(numpy.float64)
        terms = numpy.concatenate([rows * columns, total[:, None]], axis=1)
        total = truncate(terms, numpy.abs(terms).max(axis=1, keepdims=True)).sum(axis=1)
        total = truncate(total, numpy.abs(total))
    return total.astype(numpy.float32)


def on_tensor_cores(patch: pytest.MonkeyPatch) -> None:
    def create_dot(self, a, b, d, *options):
        return TensorHandle(tensor_core_product(a.data, b.data, d.data), d.dtype.scalar)

    patch.setattr(InterpreterBuilder, "create_dot", create_dot)


def truncated_most(source, n, d, k):
    """Products of one sign with all their bits set, so that every truncation makes the sums smaller, and codes with their opposites, whose
    mean is near 0. Codes of a pair differ by less than the truncation."""
    ones = 1 + (source.uniform(k, d) * 1024).round() / 1024 + 1 / 2048
    codes = torch.where(torch.arange(k)[:, None] % 2 == 0, ones, -ones.roll(1, 0))
    codes[2::4] = test_codebook.ulp_steps(codes[0::4][: len(codes[2::4])].clone(), torch.tensor(1, dtype=torch.int32))
    x = 1 + (source.uniform(n, d) * 1024).round() / 1024 + 1 / 2048
    return x, codes


@pytest.mark.parametrize("dim", [16, pytest.param(130, marks=pytest.mark.prove)])
def test_indices_of_codes_that_truncation_hides(monkeypatch, dim):
    on_tensor_cores(monkeypatch)
    x, codebook = truncated_most(Source("cpu"), 4, dim, 70)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


@each_data
@pytest.mark.parametrize("dim", [16, pytest.param(130, marks=pytest.mark.prove)])
def test_indices_with_truncated_sums(monkeypatch, data, dim):
    on_tensor_cores(monkeypatch)
    x, codebook = data(Source("cpu"), 1 if data in COMPARED else 4, dim, 70)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def all_bits_set(generator, rows, dim):
    """Positive numbers near 2^14 whose last bits are set: nothing cancels, and truncation is one-sided."""
    return (2.0**13 + 8 * generator.integers(512, 1024, (rows, dim)) - 8).astype(numpy.float16)


def growing(generator, rows, dim):
    """The largest products come last, so that the units of the accumulator grow at every step."""
    return (2.0 ** numpy.linspace(0, 13, dim) * (1 + generator.integers(0, 1024, (rows, dim)) / 1024)).astype(numpy.float16)


def mixed(generator, rows, dim):
    return (generator.standard_normal((rows, dim)) * 2.0**12).astype(numpy.float16)


@pytest.mark.parametrize("make", [all_bits_set, growing, mixed], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", [16, 64, 256, 2048])
def test_the_bound_covers_truncated_sums(make, dim):
    """The part of the screen's bound that is for sums, see _launch.Screen.rounding; it is not many times too large either."""
    generator = numpy.random.default_rng(dim)
    rows, codes = make(generator, 8, dim), make(generator, 8, dim)
    exact = rows.astype(numpy.float64) @ codes.astype(numpy.float64).T
    error = numpy.abs(tensor_core_product(rows, codes.T, numpy.zeros((8, 8), numpy.float32)) - exact)
    norms = numpy.linalg.norm(rows.astype(numpy.float64), axis=1)[:, None] * numpy.linalg.norm(codes.astype(numpy.float64), axis=1)
    plan = _launch.screen(1, 8, 8, dim, _device.machine(torch.device("cpu")))
    sums = plan.rounding - plan.unit - plan.half_norm_rounding
    assert (error <= sums * norms).all()
    # A single block truncates little.
    assert make is not all_bits_set or dim == BLOCK or (error > 0.05 * sums * norms).any()
