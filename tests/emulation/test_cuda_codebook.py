"""The CUDA kernels of vector quantization, emulated: what tests/test_codebook.py asks of every backend, and how their work is cut."""

import ctypes

import pytest
import test_codebook as contract
import torch
from _helpers import LAYOUTS, Place, Source, lay_out, leaf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_codebook import DATA, GRADIENTS, assert_nearest

import fastvae
from fastvae import functional as FV
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = Place("cpu", "cuda")
# Rows that a thread holds whole, of each length that there is a kernel for; tiles of scores, whole and not; codes shared out or not.
SIZES = [(0, 4, 3), (1, 1, 1), (5, 3, 1), (300, 7, 70), (20, 16, 300), (7, 8, 33), (3, 70, 31), (130, 17, 65), (9, 200, 7)]
# Data of which the screen decides no row: each row is work for a whole block.
UNDECIDED = {contract.far_rows, contract.outliers, contract.permuted_ties, contract.beside_huge_codes}

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def emulated_backend(emulated):
    with fastvae.use_backend("cuda"):
        yield


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_nearest_is_exact(data):
    for n, d, k in SIZES:
        x, codebook = data(Source("cpu"), min(n, 6) if data in UNDECIDED else n, d, k)
        assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def counted_search(library, x, codebook) -> tuple[torch.Tensor, int, int]:
    """The indices, the rows that the screen lists, and the distances in float64 that the recheck kernel computes for them."""
    counters = library.emulated_wide_additions, library.emulated_distances
    for counter in counters:
        counter.restype = ctypes.c_int64
    before = [counter() for counter in counters]
    indices = FV.vq_nearest(x, codebook)
    rows, distances = (counter() - count for counter, count in zip(counters, before, strict=True))
    return indices, rows, distances


def rechecked(library, x, codebook) -> int:
    return counted_search(library, x, codebook)[1]


def tied(source, n, d, k, ties):
    """Rows that are equally far from ``ties`` codes, which have the same elements in another order, and further from the others."""
    values = source.normal(d)
    codes = torch.cat([torch.stack([values.roll(i) for i in range(ties)]), 5 * source.normal(k - ties, d)])
    order = torch.randperm(k, generator=source.generator)
    return (0.1 * source.normal(n, 1)).expand(n, d).contiguous(), codes[order]


# Rows in registers, and tiles; fewer rows than blocks, whose codes several blocks share, and more.
RECHECKED = [(5, 12, 70), (2, 16, 3000), (560, 4, 9), (4, 20, 130), (2, 64, 2000), (2, 130, 600)]


@pytest.mark.parametrize("size", RECHECKED, ids=str)
def test_distances_of_candidates_alone_are_computed(emulated, size):
    """Two codes, some, and more than a block stores for the others."""
    for ties in (2, 3, 9) if size[0] < 100 else (3,):
        x, codebook = tied(Source("cpu"), *size, ties)
        indices, *counts = counted_search(emulated, x, codebook)
        assert counts == [len(x), ties * len(x)]
        assert_nearest(x, codebook, indices)


@pytest.mark.parametrize("data", [contract.random, contract.midway, contract.mixed_rows], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dim", [8, 64])
def test_few_distances_are_computed(emulated, data, dim):
    _, rows, distances = counted_search(emulated, *data(Source("cpu"), 200, dim, 300))
    assert distances <= 4 * rows


@pytest.mark.parametrize("dim", [3, 40, 130])
@pytest.mark.parametrize(("data", "factor"), [(contract.far_rows, 1.0), (contract.huge, 8.0)], ids=["far rows", "huge"])
def test_few_distances_are_computed_of_rows_that_cannot_be_screened(emulated, data, factor, dim):
    x, codebook = (factor * tensor for tensor in data(Source("cpu"), 6, dim, 300))
    indices, rows, distances = counted_search(emulated, x, codebook)
    assert rows == 6
    assert distances <= 12 * rows
    assert_nearest(x, codebook, indices)


@pytest.mark.parametrize("dim", [4, 40])
def test_more_candidates_than_a_block_keeps(emulated, dim):
    """A fifth of the codes are one code, one unit in the last place apart in one element; several blocks share them."""
    source = Source("cpu")
    codes = source.normal(1, dim).repeat(600, 1)
    codes[:, 0] = contract.ulp_steps(codes[:, 0].contiguous(), torch.arange(600, dtype=torch.int32))
    codebook = torch.cat([source.normal(2400, dim) * 3, codes])[torch.randperm(3000, generator=source.generator)]
    x = codes[:1] + source.normal(1, dim) * 1e-2
    indices, rows, distances = counted_search(emulated, x, codebook)
    assert rows == 1
    assert 150 < distances <= 600
    assert indices.tolist() == contract.exact_nearest(x, codebook)


def test_listed_rows_of_many_heads(emulated):
    pairs = [tied(Source("cpu", seed=head), 2, 33, 1000, 1 + head % 3) for head in range(6)]
    x, codebook = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    x[4, 1, 0] = float("inf")
    x[5] *= 1e25
    indices = FV.vq_nearest(x, codebook)
    assert indices[4, 1] == 0
    x[4, 1] = x[4, 0]
    indices[4, 1] = indices[4, 0]
    for head in range(6):
        assert_nearest(x[head], codebook[head], indices[head])


def test_error_bounds_do_not_underflow():
    contract.check_underflow(FV.vq_nearest)


@pytest.mark.parametrize("data", [contract.random, contract.offset, contract.tiny, contract.denormal], ids=lambda f: f.__name__)
def test_few_rows_are_rechecked(emulated, data):
    for dim in (4, 7, 16, 64):
        assert rechecked(emulated, *data(Source("cpu"), 400, dim, 100)) < 8


@each_dtype
def test_few_rows_of_16_bits_are_rechecked(emulated, dtype):
    for dim in (4, 7, 16, 64):
        assert rechecked(emulated, *contract.random(Source("cpu", dtype), 400, dim, 100)) < 8


@pytest.mark.parametrize("dim", [5, 40])
def test_equal_codes_cost_nothing(emulated, dim):
    source = Source("cpu")
    x = source.normal(200, dim)
    assert rechecked(emulated, x, torch.zeros(100, dim)) == 0
    # Those whose hash shares a slot with another code's are not found.
    assert rechecked(emulated, x, source.normal(30, dim).repeat(4, 1)) < 60


@each_dtype
@pytest.mark.parametrize("codebook_dtype", DTYPES, ids=str)
def test_nearest_of_every_dtype(dtype, codebook_dtype):
    for n, d, k in SIZES:
        x, codebook = contract.random(Source("cpu"), n, d, k)
        x, codebook = x.to(dtype), codebook.to(codebook_dtype)
        assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def test_float64_codes_that_float32_cannot_tell_apart():
    """The public functions leave them to the reference, the operator takes them."""

    def nearest(x, codebook):
        return OPERATORS["codebook_nearest"].overloads["cuda"](x[None], codebook[None], False)[0][0]

    with pytest.raises(fastvae.BackendError, match=r"cannot serve codebook_nearest on cpu with torch\.float64"):
        FV.vq_nearest(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.float64))
    source = Source("cpu", torch.float64)
    codebook = source.normal(20, 9)
    codebook[10:] = codebook[:10] + 1e-12
    x = (codebook[torch.arange(30) % 20] + 1e-3 * source.normal(30, 9)).float()
    for scale in (1.0, 1e-200, 1e100, 1e200):
        wide = codebook * scale
        assert_nearest(x, wide, nearest(x, wide))


@settings(max_examples=25)
@given(
    size=st.tuples(st.integers(0, 150), st.integers(1, 40), st.integers(1, 150)),
    data=st.sampled_from([data for data in DATA if data not in UNDECIDED]),
    seed=st.integers(0, 1000),
    layout=st.sampled_from(LAYOUTS),
    heads=st.integers(1, 3),
)
def test_nearest_of_any_size(size, data, seed, layout, heads):
    pairs = [data(Source("cpu", seed=seed + head), *size) for head in range(heads)]
    x, codebook = (lay_out(torch.stack(tensors), layout) for tensors in zip(*pairs, strict=True))
    with fastvae.use_backend("cuda"):
        indices = FV.vq_nearest(x, codebook)
    for head in range(heads):
        assert_nearest(x[head], codebook[head], indices[head])


@pytest.mark.parametrize("dim", [3, 8, 40])
def test_rows_and_memory_that_are_not_aligned(dim):
    flat = Source("cpu").normal(1, 200 * (dim + 1) + 1)[0]
    x, codebook = flat[1:].view(200, dim + 1)[:100, :dim], flat[1:].view(200, dim + 1)[100:, 1:]
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))
    output = FV.vector_quantize(x, codebook, reduction="none")
    torch.testing.assert_close(output.quantized, codebook[output.indices], rtol=0, atol=0)
    torch.testing.assert_close(output.loss, 1.25 * (x - codebook[output.indices]) ** 2)


def test_more_tiles_of_rows_than_codes_are_shared_out_for():
    """And heads that fill their tiles unevenly."""
    x, codebook = Source("cpu").normal(300, 130, 2), Source("cpu", seed=1).normal(300, 65, 2)
    indices = FV.vq_nearest(x, codebook)
    for head in (0, 1, 150, 299):
        assert_nearest(x[head], codebook[head], indices[head])


@each_dtype
def test_distance(dtype):
    contract.test_distance(EMULATED, dtype)


@pytest.mark.parametrize("dim", [5, 40])
def test_rows_that_are_not_finite_have_index_0(dim):
    x, codebook = contract.random(Source("cpu"), 300, dim, 70)
    bad = torch.tensor([3, 150, 299])
    x[bad, torch.tensor([2, 0, 4])] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    output = FV.vector_quantize(x, codebook, reduction="none")
    finite = torch.isfinite(x).all(-1)
    assert output.indices[bad].tolist() == [0, 0, 0]
    assert_nearest(x[finite], codebook, output.indices[finite])
    assert torch.equal(torch.isfinite(output.loss).all(-1), finite)
    assert torch.equal(output.quantized[bad], codebook[[0, 0, 0]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_codes_that_are_not_finite_are_never_nearest(value):
    x, codebook = contract.random(Source("cpu"), 40, 6, 70)
    codebook[[0, 33]] = value
    kept = torch.isfinite(codebook).all(-1).nonzero()[:, 0]
    indices = FV.vq_nearest(x, codebook)
    assert_nearest(x, codebook[kept], torch.searchsorted(kept, indices))
    assert FV.vq_nearest(x, torch.full_like(codebook, value)).tolist() == [0] * 40


@each_dtype
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vector_quantize(dtype, gradient, reduction):
    for sizes in ((60, 40, 5), (1, 1, 1), (40, 7, 64), (130, 3, 33)):
        contract.check_quantize(EMULATED, dtype, sizes, gradient, reduction)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_codebook_of_another_dtype_and_several_heads(gradient):
    source = Source("cpu")
    x, codebook = source.normal(3, 50, 12).bfloat16(), source.normal(3, 9, 12)
    results = []
    for backend in ("cuda", "reference"):
        with fastvae.use_backend(backend):
            leaves = leaf(x.clone()), leaf(codebook.clone())
            output = FV.vector_quantize(*leaves, gradient=gradient)
            (output.quantized.square().sum() + output.loss).backward()
            results.append([*output, *(t.grad for t in leaves)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_losses_and_gradients_of_expanded_and_strided_gradients():
    source = Source("cpu")
    x, codebook, indices = source.normal(1, 12, 6), source.normal(1, 5, 6), torch.arange(12)[None] % 5
    for grad_loss, reduction in (
        (source.normal(1, 1, 1).expand(1, 12, 6), "none"),
        (source.normal(8)[::2], "sample"),
        (source.normal(1).expand(4), "sample"),
    ):
        arguments = (None, grad_loss, x, codebook, indices, 4, REDUCTIONS[reduction], 0.7, 0.3, False, True)
        results = [OPERATORS["codebook_quantize_backward"].overloads[backend](*arguments) for backend in ("cuda", "reference")]
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_empty_batches():
    for reduction in REDUCTIONS:
        x, codebook = leaf(torch.zeros(0, 8)), leaf(torch.randn(5, 8))
        output = FV.vector_quantize(x, codebook, reduction=reduction)
        output.loss.sum().backward()
        assert output.indices.shape == (0,)
        assert torch.count_nonzero(output.loss) == 0
        assert torch.count_nonzero(codebook.grad) == 0
        counts = FV.codebook_ema_update_(torch.randn(5, 8), torch.ones(5), torch.randn(5, 8), x.detach(), output.indices)
        assert torch.count_nonzero(counts) == 0


@pytest.mark.parametrize("heads", [None, 2])
def test_ema_update(heads):
    contract.test_ema_update(EMULATED, torch.float32, heads)


@each_dtype
@pytest.mark.parametrize("heads", [None, 2])
def test_rows_that_are_not_finite_move_no_code(dtype, heads):
    contract.check_rows_left_out(EMULATED, dtype, heads, (1, 4, 5, 33, 130))


def test_ema_update_of_one_code_and_of_strided_state():
    contract.test_ema_update_of_one_code_and_of_strided_state(EMULATED)


@each_dtype
@pytest.mark.parametrize("dim", [1, 5, 130])
def test_sums_are_those_of_the_rows_in_their_order(dtype, dim):
    """Rows of several parts of the sort; codes that lie in one piece, cross several, or have none. Indices out of range are left out."""
    source = Source("cpu", dtype)
    x = source.normal(2, 700, dim)
    indices = torch.where(torch.arange(700) % 3 > 0, 4, torch.arange(700) % 11 - 1).repeat(2, 1)
    indices[1, ::7] = 40
    counts, sums = OPERATORS["codebook_sums"].overloads["cuda"](x, indices, 12)
    kept = torch.where(indices < 12, indices, -1)
    oracle = OPERATORS["codebook_sums"].overloads["reference"](x.double(), kept, 12)
    assert torch.equal(counts, oracle[0])
    assert (counts[0, 10:] == 0).all()
    torch.testing.assert_close(sums.double(), oracle[1], rtol=1e-6, atol=1e-6)


def test_more_parts_of_a_sort_and_more_codes_than_a_thread_loads_at_a_time():
    """157 parts, which 16 threads share; 1,500 codes, of which a block handles 1,024 at a time."""
    source = Source("cpu")
    x, indices = source.normal(1, 40_000, 1), torch.randint(0, 1500, (1, 40_000), generator=source.generator)
    results = [OPERATORS["codebook_sums"].overloads[backend](x, indices, 1500) for backend in ("cuda", "reference")]
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-5)
    states = []
    for backend, (counts, sums) in zip(("cuda", "reference"), results, strict=True):
        state = torch.ones(1, 1500, 1), torch.arange(1500.0)[None], torch.ones(1, 1500, 1)
        OPERATORS["codebook_ema_"].overloads[backend](*state, counts, sums, 0.9, 1e-5)
        states.append(state)
    for ours, theirs in zip(*states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_are_added_in_their_order():
    """1e17 + 1 is 1e17 in float64, so the sum tells the order."""
    x = torch.tensor([1.0, 1e17, 2.0, -1e17, 3.0] * 12, dtype=torch.float32).view(1, 60, 1)
    indices = torch.where(torch.arange(60) % 4 == 3, 1, 0)[None]
    _, sums = OPERATORS["codebook_sums"].overloads["cuda"](x, indices, 2)
    for code in (0, 1):
        assert sums[0, code].item() == sum(x[indices == code].flatten().tolist())


def test_float64_sums_move_a_float32_codebook():
    state = [torch.randn(1, 4, 3), torch.rand(1, 4), torch.randn(1, 4, 3)]
    other = [t.clone() for t in state]
    arguments = torch.tensor([[3, 0, 1, 2]]), torch.randn(1, 4, 3, dtype=torch.float64), 0.9, 1e-5
    OPERATORS["codebook_ema_"].overloads["cuda"](*state, *arguments)
    OPERATORS["codebook_ema_"].overloads["reference"](*other, *arguments)
    for ours, theirs in zip(state, other, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", [contract.random, contract.midway, contract.duplicated], ids=lambda f: f.__name__)
def test_results_do_not_depend_on_the_order_of_blocks(emulated, data):
    """Nor on the race for places in the worklist; also while a graph is captured, with a workspace of its own."""
    x, codebook = data(Source("cpu"), 300, 20, 130)
    results = []
    for capturing in (0, 0, 1):
        emulated.set_capturing(capturing)
        leaves = leaf(x.clone()), leaf(codebook.clone())
        output = FV.vector_quantize(*leaves, gradient="rotation", reduction="sample")
        (output.quantized.square().sum() + output.loss.sum()).backward()
        state = codebook.clone(), torch.ones(130), codebook.clone()
        counts = FV.codebook_ema_update_(*state, x, output.indices)
        results.append([*output, *(t.grad for t in leaves), *state, counts])
    emulated.set_capturing(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.fixture(scope="module")
def call(emulated):
    def function(name, *arguments, out):
        results = (ctypes.c_int64 * out)()
        getattr(emulated, f"emulated_{name}")(*(ctypes.c_int64(a) for a in arguments), results)
        return list(results)

    return function


@given(heads=st.integers(1, 40), rows=st.integers(1, 2**22), codes=st.integers(1, 2**18), dim=st.integers(1, 64))
def test_blocks_cover_all_rows_and_codes(call, heads, rows, codes, dim):
    tile_rows, tiles, splits, codes_per_split, padded = call("screen_grid", heads, rows, codes, dim, out=5)
    assert heads * rows <= tiles * tile_rows < heads * (rows + tile_rows)
    assert codes <= padded < codes + 64
    assert (splits - 1) * codes_per_split < padded <= splits * codes_per_split
    # Each tile of rows whose codes are shared out has a ticket, and there is one wave of blocks.
    assert splits == 1 or (tiles <= 512 and tiles * splits <= 512)


@given(codes=st.integers(1, 200), dim=st.integers(1, 40))
def test_each_element_of_a_code_has_a_place_of_its_own(call, codes, dim):
    padded_codes, padded_dim, slots = call("code_layout", codes, dim, out=3)
    places = {call("code_element", codes, dim, code, d, out=1)[0] for code in range(codes) for d in range(dim)}
    assert len(places) == codes * dim
    assert max(places) < padded_codes * padded_dim
    assert slots >= 2 * codes
    assert slots & (slots - 1) == 0


@given(rows=st.integers(1, 2**33))
def test_parts_of_a_sort_cover_all_rows_in_whole_warps(call, rows):
    rows_per_part, parts = call("sort_parts", rows, out=2)
    assert rows_per_part % 32 == 0
    assert parts <= 512
    assert (parts - 1) * rows_per_part < rows <= parts * rows_per_part


@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_parts_of_a_code_that_crosses_pieces_have_slots_of_their_own(call, lengths):
    used, start = set(), 0
    for length in lengths:
        end = start + length
        crosses = length > 0 and start // 64 != (end - 1) // 64
        if length > 0:
            assert call("crosses_pieces", start, end, out=1)[0] == crosses
        for piece in range(start // 64, (end - 1) // 64 + 1) if crosses else ():
            slot = call("piece_slot", piece, start, out=1)[0]
            assert slot // 2 == piece
            assert slot not in used
            used.add(slot)
        start = end


score = st.floats(-100, 100, width=32)


@given(scores=st.lists(score, min_size=1, max_size=20), threads=st.integers(1, 24))
def test_two_smallest_scores_are_kept_in_any_order(emulated, scores, threads):
    values = (ctypes.c_float * len(scores))(*scores)
    kept = (ctypes.c_float * 5)()
    emulated.emulated_best(values, ctypes.c_int64(len(scores)), ctypes.c_int64(threads), kept)
    smallest, second, rest, code, second_code = kept
    none = torch.finfo(torch.float32).max
    assert smallest == min(scores) == scores[int(code)]
    assert second == none or second == scores[int(second_code)]
    named = {int(code)} if second == none else {int(code), int(second_code)}
    others = [value for i, value in enumerate(scores) if i not in named]
    # The second smallest of one thread has no code, so it is among the rest; no thread has a third.
    assert rest <= min(others, default=none)
    assert min(second, rest) == min(scores[: int(code)] + scores[int(code) + 1 :], default=none)
    if threads >= len(scores):
        assert rest == min(others, default=none)
        assert len(scores) == 1 or len(named) == 2
