"""Vector quantization: the nearest code against exact arithmetic, gradients and losses against the reference, moving averages."""

import sys
import threading
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from _helpers import (
    LAYOUTS,
    Source,
    assert_close,
    compiled_places,
    each_place,
    each_place_and_dtype,
    lay_out,
    leaf,
    places,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastvae
from fastvae import functional as FV
from fastvae.fallback import codebook as fallback
from fastvae.functional.codebook import GRADIENTS, codebook_sums
from fastvae.ops._results import REDUCTIONS, accumulation_dtype
from fastvae.reference import codebook as reference

OPERATOR = "codebook_nearest"
SIZES = [
    (0, 4, 3),
    (1, 1, 1),
    (5, 3, 1),
    (7, 8, 33),
    (97, 4, 200),
    (200, 16, 65),
    (130, 17, 129),
    (33, 64, 100),
    (20, 100, 31),
    (3, 300, 40),
]


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DATA_FOLDER = Path(__file__).parent / "data"
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
# Shorter and longer than the vectors of every instruction set, whole numbers of them and not.
DIMS_AROUND_VECTORS = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33)
INSTRUCTION_SETS = sys.modules["fastvae._C"].instruction_sets() if "fastvae._C" in sys.modules else ()


def squared_distance(x: Tensor, code: Tensor) -> Fraction:
    """Without rounding."""
    return sum((Fraction(a) - Fraction(b)) ** 2 for a, b in zip(x.double().tolist(), code.double().tolist(), strict=True))


def product(x: Tensor, code: Tensor) -> Fraction:
    """Without rounding."""
    return sum(Fraction(a) * Fraction(b) for a, b in zip(x.double().tolist(), code.double().tolist(), strict=True))


def assert_nearest(x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    """``indices`` are those of the smallest real distance, the lowest where several are equal.

    Where float64 gives another index than ours, exact arithmetic says who is right.
    """
    oracle = reference.nearest(x[None], codebook[None])[0]
    assert indices.dtype == torch.int64
    assert indices.shape == x.shape[:1]
    for row in (indices != oracle).nonzero().flatten().tolist():
        ours, theirs = int(indices[row]), int(oracle[row])
        distances = [squared_distance(x[row], codebook[k]) for k in (ours, theirs)]
        assert (distances[0], ours) < (distances[1], theirs)


def exact_nearest(x: Tensor, codebook: Tensor) -> list[int]:
    return [min(range(len(codebook)), key=lambda k: (squared_distance(row, codebook[k]), k)) for row in x]


def ulp_steps(values: Tensor, steps: Tensor) -> Tensor:
    return (values.view(torch.int32) + steps).view(torch.float32)


def random(source, n, d, k):
    return source.normal(n, d), source.normal(k, d)


def clustered(source, n, d, k):
    centres = source.normal(4, d) * 10
    return (centres[torch.arange(n) % 4] + source.normal(n, d) * 0.01, centres[torch.arange(k) % 4] + source.normal(k, d) * 0.01)


def duplicated(source, n, d, k):
    codes = source.normal(k, d)
    return source.normal(n, d), codes[torch.arange(k) // 3]


def all_equal(source, n, d, k):
    return source.normal(n, d), source.normal(1, d).expand(k, d)


def nearly_duplicated(source, n, d, k):
    codes = source.normal(k, d)[torch.arange(k) // 4].contiguous()
    codes[:, 0] = ulp_steps(codes[:, 0].contiguous(), torch.arange(k, dtype=torch.int32) % 4)
    return codes[torch.arange(n) % k] + source.normal(n, d) * 1e-3, codes


def on_the_codes(source, n, d, k):
    codes = source.normal(k, d)
    return codes[torch.arange(n) % k].clone(), codes


def midway(source, n, d, k):
    """Halfway between two codes on a coarse grid: exact ties."""
    codes = (source.normal(k, d) * 4).round()
    return 0.5 * (codes[torch.arange(n) % k] + codes[(torch.arange(n) + 1) % k]), codes


def permuted_ties(source, n, d, k):
    """Codes with the same elements in another order, equally far from a constant vector but for the rounding of sums."""
    values = source.normal(d)
    codes = torch.stack([values.roll(i) for i in range(k)])
    return (source.normal(n, 1)).expand(n, d).contiguous(), codes


def offset(source, n, d, k):
    return 1e4 + source.normal(n, d), 1e4 + source.normal(k, d)


def tiny(source, n, d, k):
    return source.normal(n, d) * 1e-30, source.normal(k, d) * 1e-30


def denormal(source, n, d, k):
    return source.normal(n, d) * 1e-42, source.normal(k, d) * 1e-42


def huge(source, n, d, k):
    return source.normal(n, d) * 1e37, source.normal(k, d) * 1e37


def far_rows(source, n, d, k):
    return source.normal(n, d) * 1e20, source.normal(k, d)


def outliers(source, n, d, k):
    codes = source.normal(k, d)
    codes[k // 2] *= 1e6
    return source.normal(n, d), codes


def mixed_rows(source, n, d, k):
    return source.normal(n, d) * 10.0 ** (torch.arange(n)[:, None] % 7 - 3), source.normal(k, d)


def beside_huge_codes(source, n, d, k):
    """Codes of which few bits are left where the two longest are scaled to about 1, and rows that are long beside all."""
    x, codes = source.normal(n, d) * 2.0**124, source.normal(k, d) * 2.0**-79
    x[:, 0], codes[:2] = 0.0, 0.0
    codes[:2, 0] = codes.new_tensor([2.0**70, -(2.0**70)])[:k]
    return x, codes


DATA = (
    random, clustered, duplicated, all_equal, nearly_duplicated, on_the_codes, midway, permuted_ties, offset, tiny, denormal, huge,
    far_rows, outliers, mixed_rows, beside_huge_codes,
)  # fmt: skip


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_nearest_is_exact(data, instruction_set):
    for n, d, k in SIZES:
        x, codebook = data(Source("cpu"), n, d, k)
        assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def check_underflow(nearest, rows=8):
    """float64 cannot tell these distances apart, so the oracle is exact arithmetic."""
    x, codebook = (torch.from_numpy(np.load(DATA_FOLDER / f"underflow_{name}.npy")) for name in ("rows", "codebook"))
    x = x.view(-1, codebook.shape[1])
    assert nearest(x, codebook).tolist() == exact_nearest(x, codebook)
    for d in (5, 17):
        x, codebook = beside_huge_codes(Source("cpu"), rows, d, 70)
        assert nearest(x, codebook).tolist() == exact_nearest(x, codebook)


def test_error_bounds_do_not_underflow(instruction_set):
    check_underflow(FV.vq_nearest)


@pytest.mark.parametrize("scale", [1e-160, 1e-200, 1e-290])
def test_nearest_of_float64_whose_squares_underflow(instruction_set, scale):
    x, codebook = midway(Source("cpu", torch.float64), 40, 5, 30)
    x, codebook = x * scale, codebook * scale
    assert FV.vq_nearest(x, codebook).tolist() == exact_nearest(x, codebook)


in_plain_pytorch = pytest.mark.parametrize("place", [p for p in places(OPERATOR) if p.backend == "fallback"], ids=str)


@in_plain_pytorch
@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_nearest_is_exact_in_plain_pytorch(place, data):
    """Where float64 tells the distances apart; where it does not, it may take either."""
    for n, d, k in SIZES:
        x, codebook = data(Source(place.device), n, d, k)
        assert_nearest_in_float64(x, codebook, FV.vq_nearest(x, codebook))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_of_scores_in_plain_pytorch_where_norms_underflow(dtype):
    source, scale = Source("cpu", dtype), torch.finfo(dtype).tiny ** 0.61
    codes, rows = source.normal(50, 9) * scale, source.normal(20, 9) * scale**-0.8
    products = fallback._Products(codes, dtype)
    exact = [[product(code, code) / 2 - product(row, code) for code in codes] for row in rows]
    for scores, bound, exact_scores in zip(products.scores(rows), products.bound(rows), exact, strict=True):
        errors = [abs(Fraction(score) - true) for score, true in zip(scores.double().tolist(), exact_scores, strict=True)]
        assert max(errors) > 0
        assert 2 * max(errors) <= Fraction(bound.item())


def assert_nearest_in_float64(x: Tensor, codebook: Tensor, indices: Tensor) -> None:
    oracle = reference.nearest(x[None], codebook[None])[0]
    for row in (indices != oracle).nonzero().flatten().tolist():
        ours, theirs = (squared_distance(x[row], codebook[k]) for k in (int(indices[row]), int(oracle[row])))
        assert abs(ours - theirs) <= x.shape[1] * Fraction(1, 2**52) * theirs


@in_plain_pytorch
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_nearest_of_other_dtypes_in_plain_pytorch(place, dtype):
    for n, d, k in SIZES:
        x, codebook = (t.to(place.device) for t in random(Source("cpu", dtype), n, d, k))
        for pair in ((x, codebook), (x, codebook.float()), (x.float(), codebook)):
            assert_nearest(*pair, FV.vq_nearest(*pair))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_nearest_of_other_dtypes(dtype, instruction_set):
    for n, d, k in SIZES:
        x, codebook = random(Source("cpu", dtype), n, d, k)
        assert_nearest(x, codebook, FV.vq_nearest(x, codebook))
        assert_nearest(x, codebook.float(), FV.vq_nearest(x, codebook.float()))
        assert_nearest(x.float(), codebook, FV.vq_nearest(x.float(), codebook))


def test_nearest_of_close_float64(instruction_set):
    x, codebook = random(Source("cpu", torch.float64), 100, 9, 50)
    codebook[25:] = codebook[:25] + 1e-14
    x = codebook[torch.arange(100) % 50] + 1e-9 * x
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))


def test_each_instruction_set_is_reached(instruction_set):
    FV.vq_nearest(torch.randn(3, 2), torch.randn(4, 2))
    assert sys.modules["fastvae._C"].last_instruction_set("codebook") == instruction_set


sizes = st.tuples(st.integers(0, 150), st.integers(1, 40), st.integers(1, 150))


@given(size=sizes, data=st.sampled_from(DATA), seed=st.integers(0, 1000), layout=st.sampled_from(LAYOUTS), heads=st.integers(1, 3))
def test_nearest_of_any_size(size, data, seed, layout, heads):
    pairs = [data(Source("cpu", seed=seed + head), *size) for head in range(heads)]
    x, codebook = (lay_out(torch.stack(tensors), layout) for tensors in zip(*pairs, strict=True))
    indices = FV.vq_nearest(x, codebook)
    for head in range(heads):
        assert_nearest(x[head], codebook[head], indices[head])


@each_place_and_dtype(OPERATOR)
def test_distance(place, dtype):
    source = Source(place.device, dtype)
    x, codebook = source.normal(5, 6, 9), source.normal(11, 9)
    indices, distance = FV.vq_nearest(x, codebook, return_distance=True)
    oracle = ((x.double() - codebook.double()[indices]) ** 2).sum(-1)
    assert_close(distance, oracle, accumulation_dtype(dtype))


@each_place(OPERATOR)
def test_rows_that_are_not_finite_have_index_0(place):
    x, codebook = random(Source(place.device), 300, 5, 70)
    x[3, 2], x[150, 0], x[299, 4] = float("nan"), float("inf"), -float("inf")
    with_nan = FV.vq_nearest(x, codebook)
    assert with_nan[[3, 150, 299]].tolist() == [0, 0, 0]
    finite = torch.isfinite(x).all(-1)
    assert_nearest(x[finite].cpu(), codebook.cpu(), with_nan[finite].cpu())


def search_counts(x: Tensor, codebook: Tensor) -> dict:
    extension = sys.modules["fastvae._C"]
    extension.codebook_statistics(reset=True)
    FV.vq_nearest(x, codebook)
    return extension.codebook_statistics(reset=True)


def test_few_rows_are_rechecked(instruction_set):
    x, codebook = random(Source("cpu"), 2000, 64, 512)
    counts = search_counts(x, codebook)
    assert counts["rows"] == 2000
    assert counts["rechecked"] < 20
    assert counts["screened_again"] == 0


def test_screen_that_decides_nothing_falls_back(instruction_set):
    """Rows so short beside the codes, which are all of one length, that 16 bits cannot tell which is nearest."""
    source = Source("cpu")
    codebook = torch.nn.functional.normalize(source.normal(1000, 32), dim=1) * 1e3
    codebook = torch.cat([codebook, -codebook])
    x = source.normal(200, 32) * 1e-3
    counts = search_counts(x, codebook)
    assert_nearest(x, codebook, FV.vq_nearest(x, codebook))
    assert (counts["screened_again"] > 0) == (instruction_set == "avx512_vnni")


def test_equal_codes_cost_nothing(instruction_set):
    counts = search_counts(torch.randn(500, 8), torch.zeros(4096, 8))
    assert counts["rechecked"] == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", [7, 33, 64])
def test_the_lowest_of_equal_codes_in_every_layout(layout, rows):
    """The reference too, whose sums follow the strides."""
    x = lay_out(Source("cpu").normal(rows, 9), layout)
    codes = Source("cpu", seed=1).normal(1, 9).expand(7, 9)
    assert not reference.nearest(x[None], codes[None]).any()
    assert not FV.vq_nearest(x, codes).any()


@each_place("codebook_quantize", "codebook_quantize_backward")
@pytest.mark.parametrize("dim", [1, 2, 7, 33])
def test_the_rotation_to_an_opposite_code_keeps_lengths(place, dim):
    """Half a turn, in one dimension -1; rounding alone would choose its plane."""
    source = Source(place.device)
    x = leaf(source.normal(200, dim))
    codes = -0.3 * x.detach()
    quantized = torch.stack([FV.vector_quantize(x[i : i + 1], codes[i : i + 1], gradient="rotation").quantized[0] for i in range(200)])
    incoming = source.normal(200, dim)
    (gradient,) = torch.autograd.grad(quantized, x, incoming)
    torch.testing.assert_close(gradient.norm(dim=1), 0.3 * incoming.norm(dim=1))
    if dim == 1:
        torch.testing.assert_close(gradient, -0.3 * incoming)


@pytest.mark.parametrize("place", compiled_places(OPERATOR), ids=str)
def test_bitwise_equal_with_any_number_of_threads(place):
    source = Source(place.device)
    x, codebook = source.normal(5000, 24), source.normal(300, 24)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            x_leaf, codebook_leaf = leaf(x), leaf(codebook)
            output = FV.vector_quantize(x_leaf, codebook_leaf, gradient="rotation")
            (output.loss + output.quantized.square().mean()).backward()
            state = codebook.clone(), torch.ones(300, device=place.device), codebook.clone()
            counts = FV.codebook_ema_update_(*state, x, output.indices)
            results.append([*output, x_leaf.grad, codebook_leaf.grad, *state, counts])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@each_place_and_dtype("codebook_quantize")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (63, 41, 17), (401, 3, 65)], ids=str)
def test_odd_sizes(place, dtype, sizes):
    check_quantize(place, dtype, sizes, "straight_through", "mean")


@each_place_and_dtype("codebook_quantize")
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_vector_quantize(place, dtype, gradient, reduction):
    check_quantize(place, dtype, (60, 40, 5), gradient, reduction)


def check_quantize(place, dtype, sizes, gradient, reduction):
    rows, codes, dim = sizes
    source = Source(place.device, dtype)
    x, codebook = source.normal(rows, dim), source.normal(codes, dim)
    incoming = source.normal(rows, dim)
    ours, oracle = [], []
    for function, results, tensors in (
        (FV.vector_quantize, ours, (x, codebook)),
        (reference.vector_quantize, oracle, (x.double(), codebook.double())),
    ):
        leaves = [leaf(t.clone()) for t in tensors]
        quantized, indices, loss = function(*leaves, commitment_cost=0.3, codebook_cost=0.7, gradient=gradient, reduction=reduction)
        weights = torch.arange(1, loss.numel() + 1, device=loss.device).view(loss.shape) / loss.numel()
        ((quantized * incoming.to(quantized.dtype)).sum() + 2 * (loss * weights.to(loss.dtype)).sum()).backward()
        results += [quantized.detach(), indices, loss.detach(), *(t.grad for t in leaves)]
    assert torch.equal(ours[1], oracle[1])
    loss_dtype = dtype if reduction == "none" else accumulation_dtype(dtype)
    for actual, expected, expected_dtype in zip(
        (ours[0], *ours[2:]), (oracle[0], *oracle[2:]), (dtype, loss_dtype, dtype, dtype), strict=True
    ):
        assert_close(actual, expected, expected_dtype, magnitude=expected.abs().max().item() * 4, roundings=2)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_rotation_and_straight_through_of_x_on_its_code(gradient):
    """A vector that is its own code is not turned."""
    x = torch.randn(10, 6)
    x_leaf, incoming = leaf(x.clone()), torch.randn(10, 6)
    FV.vector_quantize(x_leaf, x.clone(), gradient=gradient).quantized.backward(incoming)
    torch.testing.assert_close(x_leaf.grad, incoming, rtol=1e-5, atol=1e-5)


def test_gradient_without_the_loss_leaves_the_codebook_alone():
    x, codebook = leaf(torch.randn(10, 6)), leaf(torch.randn(4, 6))
    FV.vector_quantize(x, codebook).quantized.sum().backward()
    assert torch.equal(x.grad, torch.ones(10, 6))
    assert torch.equal(codebook.grad, torch.zeros(4, 6))


@each_place("codebook_quantize")
def test_losses_are_weighted_by_their_costs(place):
    source = Source(place.device)
    x, codebook = leaf(source.normal(20, 3)), leaf(source.normal(7, 3))
    FV.vector_quantize(x, codebook, codebook_cost=0.0).loss.backward()
    assert torch.count_nonzero(codebook.grad) == 0
    x.grad = None
    FV.vector_quantize(x, codebook, commitment_cost=0.0).loss.backward()
    assert torch.count_nonzero(x.grad) == 0


def test_channels_first_views_and_empty_batches():
    x, codebook = torch.randn(2, 8, 5, 7), torch.randn(30, 8)
    moved = FV.vector_quantize(x.movedim(1, -1), codebook)
    assert torch.equal(moved.indices, FV.vq_nearest(x.movedim(1, -1).contiguous(), codebook))
    assert moved.quantized.shape == (2, 5, 7, 8)
    for reduction in REDUCTIONS:
        x, codebook_leaf = leaf(torch.zeros(0, 8)), leaf(codebook.clone())
        empty = FV.vector_quantize(x, codebook_leaf, reduction=reduction)
        empty.loss.sum().backward()
        assert empty.indices.shape == (0,)
        assert torch.count_nonzero(empty.loss) == 0
        assert torch.count_nonzero(codebook_leaf.grad) == 0


@each_place("codebook_sums")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [None, 2])
def test_ema_update(place, dtype, heads):
    source = Source(place.device, dtype)
    lead = () if heads is None else (heads,)
    codebook, x = source.normal(*lead, 6, 3), source.normal(*lead, 2000, 3)
    ema_count, ema_sum = source.uniform(*lead, 6) + 1, source.normal(*lead, 6, 3)
    indices = torch.randint(-1, 5, (*lead, 2000), generator=source.generator).to(place.device)
    state = [t.clone() for t in (codebook, ema_count, ema_sum)]
    counts = FV.codebook_ema_update_(*state, x, indices, decay=0.9, eps=1e-3)

    one_hot = torch.nn.functional.one_hot(indices + 1, 7)[..., 1:].double()
    hits, sums = one_hot.sum(-2), one_hot.transpose(-1, -2) @ x.double()
    count = 0.9 * ema_count.double() + 0.1 * hits
    mean = 0.9 * ema_sum.double() + 0.1 * sums
    total = count.sum(-1, keepdim=True)
    smoothed = (count + 1e-3) / (total + 6 * 1e-3) * total
    assert torch.equal(counts, hits.to(torch.int64))
    for actual, expected in zip(state, (mean / smoothed[..., None], count, mean), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


@each_place("codebook_sums")
def test_ema_update_of_one_code_and_of_strided_state(place):
    """All vectors on one code: its sum is that of many pieces."""
    source = Source(place.device)
    x, indices = source.normal(5000, 3), torch.full((5000,), 2, device=place.device)
    codebook, ema_sum = (source.normal(3, 4).T for _ in range(2))
    ema_count = torch.zeros(8, device=place.device)[::2]
    counts = FV.codebook_ema_update_(codebook, ema_count, ema_sum, x, indices, decay=0.0, eps=0.0)
    assert counts.tolist() == [0, 0, 5000, 0]
    assert ema_count.tolist() == [0, 0, 5000, 0]
    torch.testing.assert_close(codebook[2].double(), x.double().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", compiled_places("codebook_quantize"), ids=str)
def test_against_faiss(place):
    faiss = pytest.importorskip("faiss", reason="a comparison, not a dependency")
    x, codebook = random(Source("cpu"), 3000, 32, 400)
    index = faiss.IndexFlatL2(32)
    index.add(codebook.numpy())
    distance, found = index.search(x.numpy(), 1)
    indices, ours = FV.vq_nearest(x, codebook, return_distance=True)
    assert np.mean(indices.numpy() == found[:, 0]) > 0.999
    np.testing.assert_allclose(ours.numpy(), distance[:, 0], rtol=1e-3, atol=1e-4)


WRONG = [
    (lambda: FV.vq_nearest(torch.randn(3, 4), torch.randn(5, 3)), ValueError, r"x: got shape \(3, 4\), takes \(\.\.\., 3\)"),
    (lambda: FV.vq_nearest(torch.randn(3, 4), torch.randn(0, 4)), ValueError, "codebook: .*at least one code"),
    (lambda: FV.vq_nearest(torch.randn(3, 4), torch.randn(4)), ValueError, "codebook: got shape"),
    (lambda: FV.vq_nearest(torch.randn(3, 4), torch.randn(2, 5, 4)), ValueError, "x: got shape .*one slice a head"),
    (lambda: FV.vq_nearest(torch.arange(8).view(2, 4), torch.randn(5, 4)), TypeError, "x: got torch.int64"),
    (lambda: FV.vq_nearest(torch.randn(3, 4), torch.arange(8).view(2, 4)), TypeError, "codebook: got torch.int64"),
    (lambda: FV.vector_quantize(torch.randn(3, 4), torch.randn(5, 4), gradient="other"), ValueError, "gradient: got 'other'"),
    (lambda: FV.vector_quantize(torch.randn(3, 4), torch.randn(5, 4), commitment_cost=-1), ValueError, "commitment_cost: got -1"),
    (lambda: FV.vector_quantize(torch.randn(2, 3, 4), torch.randn(2, 5, 4), reduction="sample"), ValueError, "reduction: got 'sample'"),
    (lambda: ema(indices=torch.zeros(4, dtype=torch.int64)), ValueError, "indices: got shape"),
    (lambda: ema(indices=torch.zeros(3)), TypeError, "indices: got torch.float32"),
    (lambda: ema(decay=1.5), ValueError, "decay: got 1.5"),
    (lambda: ema(ema_count=torch.zeros(6)), ValueError, "ema_count: got shape"),
    (lambda: ema(codebook=torch.zeros(5, 4, dtype=torch.bfloat16)), TypeError, "codebook: got torch.bfloat16"),
]


def ema(**changed):
    arguments = {
        "codebook": torch.zeros(5, 4),
        "ema_count": torch.zeros(5),
        "ema_sum": torch.zeros(5, 4),
        "x": torch.randn(3, 4),
        "indices": torch.zeros(3, dtype=torch.int64),
    }
    return FV.codebook_ema_update_(**arguments | changed)


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


@each_place(OPERATOR)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_codebook_that_is_not_finite(place, value):
    for dim in DIMS_AROUND_VECTORS:
        codebook = torch.randn(5, dim, device=place.device)
        codebook[2, dim // 2] = value
        if place.device == "cpu":
            with pytest.raises((ValueError, RuntimeError), match="codebook: got NaN or infinite"):
                FV.vq_nearest(torch.randn(4, dim), codebook)
        else:
            assert FV.vq_nearest(torch.randn(4, dim, device=place.device), codebook).max() < 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_codebook_that_is_not_finite_anywhere(instruction_set, value, dtype):
    """In each place of a vector and of what is left of a row, in the first code and the last."""
    for dim in DIMS_AROUND_VECTORS:
        x, codebook = torch.randn(2, dim, dtype=dtype), torch.randn(3, dim, dtype=dtype)
        for code, place in [(0, d) for d in range(dim)] + [(2, dim - 1)]:
            broken = codebook.clone()
            broken[code, place] = value
            for function in (FV.vq_nearest, FV.vector_quantize):
                with pytest.raises(RuntimeError, match="codebook: got NaN or infinite"):
                    function(x, broken)
        FV.vq_nearest(x, codebook)


@pytest.mark.parametrize("value", NOT_FINITE)
def test_rows_that_are_not_finite_anywhere(instruction_set, value):
    for dim in DIMS_AROUND_VECTORS:
        codebook = Source("cpu").normal(40, dim)
        x = codebook[1].repeat(dim, 1)
        x[torch.arange(dim), torch.arange(dim)] = value
        assert FV.vq_nearest(x, codebook).tolist() == [0] * dim


@each_place_and_dtype("codebook_sums")
@pytest.mark.parametrize("heads", [None, 2])
def test_rows_that_are_not_finite_move_no_code(place, dtype, heads):
    check_rows_left_out(place, dtype, heads, DIMS_AROUND_VECTORS)


def check_rows_left_out(place, dtype, heads, dims):
    """Counts, sums and the codebook are bitwise those of the other rows alone."""
    lead = () if heads is None else (heads,)
    for dim in dims:
        source = Source(place.device, dtype)
        state_dtype = accumulation_dtype(dtype)
        x, codebook, ema_sum = source.normal(*lead, 600, dim), source.normal(*lead, 7, dim), source.normal(*lead, 7, dim)
        indices = torch.randint(-1, 6, (*lead, 600), generator=source.generator).to(place.device)
        bad = torch.arange(0, 600, 5, device=place.device)
        values = x.new_tensor(NOT_FINITE)[torch.arange(len(bad), device=place.device) % 3]
        x[..., bad, bad % dim] = values.expand(*lead, -1)
        results = []
        for kept in (indices, indices.index_fill(-1, bad, -1)):
            state = [t.to(state_dtype, copy=True) for t in (codebook, torch.ones_like(codebook[..., 0]), ema_sum)]
            rows = x if kept is indices else torch.where(torch.isfinite(x), x, 0)
            results.append((*codebook_sums(rows, kept, codebook), FV.codebook_ema_update_(*state, rows, kept), *state))
        for ours, others in zip(*results, strict=True):
            assert torch.equal(ours, others)
            assert torch.isfinite(ours).all()


@pytest.mark.parametrize("scale", [1e154, 1e200, 1e307])
def test_codes_whose_distances_overflow_float64(instruction_set, scale):
    """Rows on a code are found; others get the index of some code."""
    codebook = Source("cpu", torch.float64).normal(70, 20) * scale
    assert_nearest(codebook, codebook, FV.vq_nearest(codebook, codebook))
    indices = FV.vq_nearest(torch.cat([codebook * (1 + 2**-40), -codebook, codebook.flip(1)]), codebook)
    assert indices.min() >= 0
    assert indices.max() < 70


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="this processor has one instruction set")
def test_instruction_set_that_another_thread_changes():
    """A call keeps the kernels that it began with."""
    extension, source = sys.modules["fastvae._C"], Source("cpu")
    x, codebook = source.normal(200, 20), source.normal(300, 20)
    expected, done = reference.nearest(x[None], codebook[None])[0], threading.Event()
    previous = extension.instruction_set()

    def change():
        while not done.is_set():
            for name in INSTRUCTION_SETS:
                extension.set_instruction_set(name)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        with fastvae.use_backend("cpp"):
            results = [FV.vq_nearest(x, codebook) for _ in range(300)]
    finally:
        done.set()
        thread.join()
        extension.set_instruction_set(previous)
    assert all(torch.equal(indices, expected) for indices in results)


@pytest.mark.parametrize("place", compiled_places("codebook_sums"), ids=str)
def test_index_out_of_range(place):
    if place.device == "cpu" and place.backend == "cpp":
        with pytest.raises(RuntimeError, match="indices: got 5"):
            ema(indices=torch.tensor([0, 5, 1]))


def test_use_backend_reaches_the_reference():
    x, codebook = torch.randn(9, 4), torch.randn(5, 4)
    with fastvae.use_backend("reference"):
        indices = FV.vq_nearest(x, codebook)
    assert torch.equal(indices, FV.vq_nearest(x, codebook))
