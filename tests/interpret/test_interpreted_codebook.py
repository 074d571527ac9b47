"""The codebook kernels in the interpreter: the nearest code against exact arithmetic, the rest against float64 and the C++ backend."""

from collections import Counter

import pytest
import test_codebook
import torch
from _helpers import LAYOUTS, Place, Source, assert_close, brief, lay_out, leaf, places
from test_codebook import DATA, assert_nearest, check_quantize, nearly_duplicated, random, ulp_steps

import fastvae
from fastvae import functional as FV
from fastvae.functional.codebook import GRADIENTS
from fastvae.kernels import _codebook_exact, _codebook_search, _device, _launch
from fastvae.ops._results import REDUCTIONS

PLACE = Place("cpu", "triton")
OTHER_BACKENDS = [place.backend for place in places("codebook_quantize") if place.backend != "triton"]
HALVES = torch.bfloat16, torch.float16
# Below 16 dimensions in float32; above in float16, in one block or in several, padded or not.
SIZES = [(0, 4, 3), (1, 1, 1), (5, 3, 1), (7, 8, 33), (40, 4, 70), (20, 15, 130), (35, 16, 65), (33, 17, 129), (9, 64, 100), (3, 300, 40)]
OFTEN = ["(0, 4, 3)", "(5, 3, 1)", "(20, 15, 130)", "(33, 17, 129)"]
# For each row of these all codes are compared exactly, which takes the interpreter long: so many rows of them are searched for.
COMPARED = {test_codebook.far_rows: 5, test_codebook.permuted_ties: 5, test_codebook.beside_huge_codes: 1}


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", brief(SIZES, OFTEN))
def test_nearest_is_exact(data, size):
    n, d, k = size
    x, codebook = data(Source("cpu"), min(n, COMPARED.get(data, n)), d, k)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def test_error_bounds_do_not_underflow():
    test_codebook.check_underflow(FV.vq_nearest, rows=1)


@pytest.mark.parametrize("dim", [3, 20])
def test_a_score_that_underflows_beside_the_number_of_its_tile(dim):
    """Scaled to the huge codes, which fill the first tile but for one code, the scores of all other codes are 0."""
    tile = _launch.SCREEN_CODES
    codebook = torch.zeros(3 * tile, dim)
    codebook[1 : tile - 1, 0] = 2.0**127 * (1 - 2 * (torch.arange(tile - 2) % 2)) * (1 - torch.arange(tile - 2) // 2 * 2.0**-20)
    codebook[0, 1], codebook[tile - 1, 1] = 2.0**-40, 2.0**-40
    codebook[tile:, 1] = 2.0**-40 * torch.arange(2, 2 + 2 * tile)
    x = torch.zeros(1, dim)
    x[0, 1] = 2.0**-20
    assert FV.vq_nearest(x, codebook).tolist() == [3 * tile - 1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", SIZES[3::3], ids=str)
def test_nearest_of_16_bits(dtype, size):
    x, codebook = random(Source("cpu", dtype), *size)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))
    assert_nearest(x, codebook.float(), FV.vq_nearest(x, codebook.float()))
    assert_nearest(x.float(), codebook, FV.vq_nearest(x.float(), codebook))


@pytest.mark.parametrize("dim", range(1, 18))
def test_nearest_of_every_short_dimension(dim):
    x, codebook = random(Source("cpu", seed=dim), 21, dim, 67)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_heads_and_layouts(layout):
    source = Source("cpu")
    x, codebook = source.normal(3, 20, 5, layout=layout), lay_out(source.normal(3, 9, 5), layout)
    indices = FV.vq_nearest(x, codebook)
    for head in range(3):
        assert_nearest(x[head], codebook[head], indices[head])


@pytest.mark.parametrize("bits", [0, 1])
@pytest.mark.parametrize("dim", [4, 20])
def test_more_tiles_than_their_numbers_in_a_score(monkeypatch, bits, dim):
    """Several rounds, of one tile each or of two."""
    monkeypatch.setattr(_launch, "MAX_TILE_BITS", dict.fromkeys((False, True), bits))
    for data in (random, test_codebook.nearly_duplicated, test_codebook.outliers):
        x, codebook = data(Source("cpu"), 10, dim, 64 * 5 + 1)
        assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


@pytest.mark.parametrize(("multiprocessors", "programs"), [(1, 8), (40, 320)])
def test_any_number_of_programs(monkeypatch, multiprocessors, programs):
    machine = _launch.Machine("interpreter", multiprocessors, programs)
    monkeypatch.setattr(_device, "machine", lambda device: machine)
    check_quantize(PLACE, torch.float32, (150, 41, 17), "rotation", "mean")


def listed(x, codebook) -> list[int]:
    """How many pairs and how many open rows the screen leaves to the recheck kernel, which decides them rightly."""
    counts = []

    def zeros(*arguments, **options):
        counts.append(original(*arguments, **options))
        return counts[-1]

    original = torch.zeros
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        assert_nearest(x, codebook, FV.vq_nearest(x, codebook))
    return counts[0][:2].tolist()


@pytest.mark.parametrize("dim", [8, 64])
def test_few_rows_are_listed(dim):
    """Equal codes, which count once, list none."""
    x, codebook = random(Source("cpu"), 130, dim, 256)
    assert sum(listed(x, codebook)) < 13
    assert sum(listed(x, torch.zeros(256, dim))) == 0
    assert sum(listed(x, codebook[torch.arange(256) // 8])) < 13


@pytest.fixture
def exact_distances(monkeypatch) -> Counter:
    """The number of exact distances of each row, by its address. The function of the kernel that computes them counts its candidates."""
    counts, distances = Counter(), _codebook_exact.distances

    def counted(row, codebook, code, candidate, *arguments):
        counts[int(row.handle.data.item())] += int(candidate.handle.data.sum())
        return distances(row, codebook, code, candidate, *arguments)

    monkeypatch.setattr(_codebook_exact, "distances", counted)
    return counts


def in_one_slot(source, n, d, k):
    """The two nearest codes of each row are in one slot of the screen, and differ by an ulp."""
    codes = source.normal(k, d)
    codes[64:128, 1:], codes[64:128, 0] = codes[:64, 1:], ulp_steps(codes[:64, 0].clone(), torch.ones(64, dtype=torch.int32))
    return codes[torch.arange(n) % 64] + source.normal(n, d) * 1e-3, codes


@pytest.mark.parametrize(("dim", "tiles"), [(8, 1), (64, 1), (64, 8)])
def test_open_rows_take_a_handful_of_exact_distances(monkeypatch, exact_distances, dim, tiles):
    """Four codes each that the screen cannot tell apart, of 256 codes in one split or in four."""
    monkeypatch.setattr(_launch, "RECHECK_TILES", tiles)
    x, codebook = nearly_duplicated(Source("cpu"), 8, dim, 256)
    assert listed(x, codebook)[1] >= 4
    assert max(exact_distances.values()) <= 8


@pytest.mark.parametrize(("dim", "tiles"), [(8, 1), (64, 1), (64, 8)])
def test_two_codes_in_one_slot_take_two_exact_distances(monkeypatch, exact_distances, dim, tiles):
    monkeypatch.setattr(_launch, "RECHECK_TILES", tiles)
    x, codebook = in_one_slot(Source("cpu"), 8, dim, 256)
    assert listed(x, codebook) == [0, 8]
    assert list(exact_distances.values()) == [2] * 8


def test_a_pair_takes_two_exact_distances(exact_distances):
    x, codebook = random(Source("cpu"), 5, 20, 130)
    codebook[3] = ulp_steps(codebook[100].clone(), torch.ones(20, dtype=torch.int32))
    x = codebook[3] + 1e-3 * x
    assert listed(x, codebook) == [5, 0]
    assert list(exact_distances.values()) == [2] * 5


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_nearest_of_codes_in_several_splits(monkeypatch, data):
    """Three splits of a tile each, whose nearest codes are merged; several rows for each group of programs."""
    monkeypatch.setattr(_launch, "RECHECK_TILES", 1)
    x, codebook = data(Source("cpu"), 1 if data in COMPARED else 6, 20, 64 * 2 + 5)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def test_a_row_may_be_open_to_every_code(exact_distances):
    """More codes of a tile than are compared at a time."""
    x, codebook = test_codebook.permuted_ties(Source("cpu"), 2, 70, 70)
    assert listed(x, codebook) == [0, 2]
    assert min(exact_distances.values()) >= 70


class Rehashed:
    """The kernel that hashes codes, with other hashes."""

    def __init__(self, kernel, hashes: torch.Tensor):
        self.kernel, self.hashes = kernel, hashes

    def __getitem__(self, grid):
        def launch(codebook, mean, largest, hashes, *arguments, **options):
            self.kernel[grid](codebook, mean, largest, hashes, *arguments, **options)
            hashes.copy_(self.hashes)

        return launch


@pytest.mark.parametrize("hashes", [torch.arange(70), torch.zeros(70)], ids=["all different", "all equal"])
@pytest.mark.parametrize("dim", [5, 33])
def test_equal_codes_that_their_hashes_do_not_show(monkeypatch, dim, hashes):
    """The recheck kernel gives the lowest; different codes of one hash stay different."""
    monkeypatch.setattr(_codebook_search, "codebook_measure_kernel", Rehashed(_codebook_search.codebook_measure_kernel, hashes))
    x, codebook = test_codebook.duplicated(Source("cpu"), 10, dim, 70)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def test_rows_that_are_not_finite_have_index_0():
    test_codebook.test_rows_that_are_not_finite_have_index_0(PLACE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dim", [3, 20])
def test_a_code_that_is_not_finite_is_never_the_nearest(value, dim):
    x, codebook = random(Source("cpu"), 30, dim, 70)
    codebook[2, 1] = value
    finite = torch.arange(70) != 2
    expected = FV.vq_nearest(x, codebook[finite])
    assert torch.equal(FV.vq_nearest(x, codebook), expected + (expected >= 2))
    assert torch.count_nonzero(FV.vq_nearest(x, torch.full((5, dim), value))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_distance(dtype):
    test_codebook.test_distance(PLACE, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_quantize_matches_float64(dtype, gradient, reduction):
    check_quantize(PLACE, dtype, (60, 40, 5), gradient, reduction)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (63, 41, 17), (131, 3, 65), (5, 9, 130), (3, 4, 300)], ids=str)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_odd_sizes(sizes, gradient):
    for reduction in ("none", "sample", "mean"):
        check_quantize(PLACE, torch.float32, sizes, gradient, reduction)


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_every_backend(backend, gradient, reduction):
    source = Source("cpu")
    x, codebook, incoming = source.normal(2, 3, 50, 6), source.normal(2, 11, 6), source.normal(2, 3, 50, 6)
    results = []
    for name in ("triton", backend):
        with fastvae.use_backend(name):
            leaves = leaf(x), leaf(codebook)
            quantized, indices, loss = FV.vector_quantize(*leaves, gradient=gradient, reduction=reduction)
            gradients = torch.autograd.grad((quantized * incoming).sum() + 3 * loss.sum(), leaves)
            results.append((quantized, indices, loss, *gradients))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_in_any_layout(reduction):
    """Batches of images with the channels moved last, and a gradient that is expanded."""
    source = Source("cpu")
    x, codebook = leaf(source.normal(2, 8, 5, 7)), leaf(source.normal(30, 8))
    dense = leaf(x.detach().movedim(1, -1).contiguous())
    outputs = FV.vector_quantize(x.movedim(1, -1), codebook, reduction=reduction), FV.vector_quantize(dense, codebook, reduction=reduction)
    moved, plain = (torch.autograd.grad(o.quantized.sum() + o.loss.sum(), (t, codebook)) for o, t in zip(outputs, (x, dense), strict=True))
    torch.testing.assert_close(moved[0].movedim(1, -1), plain[0])
    torch.testing.assert_close(moved[1], plain[1])


def test_gradients_alone():
    """Of the codes alone, and of the loss alone."""
    source = Source("cpu")
    x, codebook, incoming = leaf(source.normal(20, 6)), leaf(source.normal(4, 6)), source.normal(20, 6)
    output = FV.vector_quantize(x, codebook)
    for_x, for_codes = torch.autograd.grad(output.quantized, (x, codebook), incoming, retain_graph=True)
    assert torch.equal(for_x, incoming)
    assert torch.count_nonzero(for_codes) == 0
    for_x, for_codes = torch.autograd.grad(output.loss, (x, codebook))
    error = x.detach().double() - codebook.detach().double()[output.indices]
    assert_close(for_x, 2 * 0.25 * error / x.numel(), torch.float32)
    assert_close(for_codes.sum(0), -2 * error.sum(0) / x.numel(), torch.float32)


def test_losses_are_weighted_by_their_costs():
    test_codebook.test_losses_are_weighted_by_their_costs(PLACE)


def test_channels_first_views_and_empty_batches():
    test_codebook.test_channels_first_views_and_empty_batches()


def test_nan_in_nan_out():
    x, codebook = random(Source("cpu"), 20, 6, 9)
    x[3, 2] = torch.nan
    x, codebook = leaf(x), leaf(codebook)
    output = FV.vector_quantize(x, codebook)
    output.loss.backward()
    assert output.indices[3] == 0
    assert torch.equal(output.quantized[3], codebook[0])
    assert output.loss.isnan()
    assert x.grad.isnan().nonzero().tolist() == [[3, 2]]
    assert codebook.grad.isnan().nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bitwise_equal_twice(reduction):
    source = Source("cpu")
    x, codebook = source.normal(400, 10), source.normal(7, 10)
    results = []
    for _ in range(2):
        leaves = leaf(x), leaf(codebook)
        output = FV.vector_quantize(*leaves, gradient="rotation", reduction=reduction)
        state = codebook.clone(), torch.ones(7), codebook.clone()
        counts = FV.codebook_ema_update_(*state, x, output.indices)
        results.append((*output, *torch.autograd.grad(output.loss.sum(), leaves), *state, counts))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("heads", [None, 2])
def test_ema_update(heads):
    test_codebook.test_ema_update(PLACE, torch.float32, heads)


@pytest.mark.parametrize("dtype", brief([torch.float32, *HALVES], ["torch.float32"]))
@pytest.mark.parametrize("heads", [None, 2])
def test_rows_that_are_not_finite_move_no_code(dtype, heads):
    test_codebook.check_rows_left_out(PLACE, dtype, heads, (1, 4, 33, 130))


def test_ema_update_of_one_code_and_of_strided_state():
    test_codebook.test_ema_update_of_one_code_and_of_strided_state(PLACE)


@pytest.mark.parametrize("rows", [0, 1, 127, 128, 129, 700])
@pytest.mark.parametrize("dim", [1, 3, 130])
def test_sums_by_code(rows, dim):
    """Rows with a negative index, or one that is no code's, are left out; codes without rows have zeros."""
    source = Source("cpu")
    x, indices = source.normal(2, rows, dim), torch.randint(-1, 6, (2, rows), generator=source.generator)
    indices[1] = 3
    counts, sums = torch.ops.fastvae.codebook_sums.triton(x, indices, 5)
    one_hot = torch.nn.functional.one_hot(indices + 1, 7)[..., 1:6].double()
    assert torch.equal(counts, one_hot.sum(1).to(torch.int64))
    assert_close(sums, one_hot.transpose(1, 2) @ x.double(), torch.float32, magnitude=float(rows))


def test_a_code_without_counts_stays():
    """Where the smoothed count is 0 there is no quotient."""
    codebook = torch.randn(3, 2)
    before = codebook.clone()
    FV.codebook_ema_update_(codebook, torch.zeros(3), torch.zeros(3, 2), torch.randn(0, 2), torch.zeros(0, dtype=torch.int64), eps=0.0)
    assert torch.equal(codebook, before)


def test_float64_is_refused():
    for dtypes in ((torch.float64, torch.float32), (torch.float32, torch.float64)):
        x, codebook = (torch.randn(4, 3, dtype=dtype) for dtype in dtypes)
        with pytest.raises(fastvae.BackendError, match=r"triton.*float64.*Backends that can: .*reference"):
            FV.vq_nearest(x, codebook)
        with pytest.raises(fastvae.BackendError, match=r"triton.*float64"):
            FV.vector_quantize(x, codebook)
