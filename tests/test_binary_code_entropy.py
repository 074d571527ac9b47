"""Entropies of binary codes against a softmax over all of them in float64."""

import math

import pytest
import torch
from _helpers import LAYOUTS, TOLERANCES, Source, each_place, each_place_and_dtype, lay_out
from torch import distributed

from benchmarks import devices
from fastvae import functional as FV
from fastvae import reference
from fastvae.fallback import binary_code_entropy as fallback

OPERATORS = ("binary_code_entropy_forward", "binary_code_entropy_backward")


def softmax_entropies(x: torch.Tensor, inv_temperature: float, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition."""
    codes = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * x.shape[-1]).view(-1, x.shape[-1])
    log_p = torch.log_softmax(2 * inv_temperature * x @ codes.T, -1)
    per_sample = -(log_p.exp() * log_p).sum(-1)
    kept = log_p.exp() if mask is None else log_p.exp()[mask]
    per_sample = per_sample if mask is None else torch.where(mask, per_sample, 0.0)
    mean = kept.reshape(-1, len(codes)).mean(0)
    return per_sample, -(mean * mean.clamp(min=torch.finfo(mean.dtype).tiny).log()).sum()


def results(function, x: torch.Tensor, *arguments, **options) -> list[torch.Tensor]:
    """Both entropies, and the gradient of a sum of both whose weights differ from vector to vector."""
    leaf = x.detach().requires_grad_()
    per_sample, codebook = function(leaf, *arguments, **options)
    weights = torch.linspace(-1, 2, per_sample.numel(), dtype=torch.float64, device=x.device).view(per_sample.shape).to(per_sample.dtype)
    (gradient,) = torch.autograd.grad((per_sample * weights).sum() - 3 * codebook, leaf)
    return [per_sample.detach(), codebook.detach(), gradient]


def assert_same_entropies(actual: list[torch.Tensor], oracle: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Entropies of float32 agree to 1e-6, as the exact values of the rounded vectors."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    assert [tensor.dtype for tensor in actual] == [sums, sums, dtype]
    of_entropies = {torch.float64: 1e-11, torch.float32: 1e-6}[sums]
    for ours, expected, tolerance in zip(actual, oracle, (of_entropies, of_entropies, TOLERANCES[dtype]["rtol"]), strict=True):
        scale = max(expected.abs().max().item(), 1.0)
        torch.testing.assert_close(ours.double().cpu(), expected, rtol=tolerance, atol=tolerance * scale)


@each_place_and_dtype(*OPERATORS)
@pytest.mark.parametrize("dim", [1, 2, 5, 8, 12])
@pytest.mark.parametrize("inv_temperature", [0.4, 5.0, 100.0])
def test_is_the_softmax_over_all_codes(place, dtype, dim, inv_temperature):
    x = Source(place.device, dtype, dim).normal(3, 20, dim)
    oracle = results(softmax_entropies, x.double().cpu(), inv_temperature)
    assert_same_entropies(results(FV.binary_code_entropy, x, inv_temperature), oracle, dtype)


@each_place(*OPERATORS)
@pytest.mark.parametrize("shape", [(1,), (4,), (63, 3), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_layouts(place, shape, layout):
    x = lay_out(Source(place.device).normal(*shape), layout)
    actual = results(FV.binary_code_entropy, x, 2.0)
    assert actual[0].shape == shape[:-1]
    assert actual[2].shape == shape
    oracle = results(softmax_entropies, x.double().cpu(), 2.0)
    assert_same_entropies(actual, oracle, torch.float32)


@each_place(*OPERATORS)
def test_only_one_of_the_entropies_learns(place):
    x = Source(place.device).normal(30, 5)
    for index in (0, 1):
        gradients = []
        for function, values in ((FV.binary_code_entropy, x), (softmax_entropies, x.double().cpu())):
            leaf = values.detach().requires_grad_()
            gradients += torch.autograd.grad(function(leaf, 1.5)[index].sum(), leaf)
        torch.testing.assert_close(gradients[0].double().cpu(), gradients[1], rtol=1e-5, atol=1e-7)


@each_place(*OPERATORS)
def test_a_mask_leaves_vectors_out_whatever_they_hold(place):
    source = Source(place.device)
    x, mask = source.normal(4, 25, 7), source.uniform(4, 25) < 0.6
    oracle = results(softmax_entropies, x.double().cpu(), 3.0, mask.cpu())
    for outside in (x, torch.where(mask[..., None], x, math.nan), torch.where(mask[..., None], x, math.inf)):
        actual = results(FV.binary_code_entropy, outside, 3.0, mask=mask)
        assert_same_entropies(actual, oracle, torch.float32)
        assert not actual[2][~mask].any()


@each_place(*OPERATORS)
@pytest.mark.parametrize("count", [0, 9], ids=["no vectors", "an empty mask"])
def test_no_vectors_have_no_entropy(place, count):
    x = Source(place.device).normal(count, 6)
    per_sample, codebook, gradient = results(FV.binary_code_entropy, x, mask=torch.zeros(count, dtype=torch.bool, device=place.device))
    assert per_sample.shape == (count,)
    assert codebook.shape == ()
    assert not any(tensor.any() for tensor in (per_sample, codebook, gradient))


@each_place(*OPERATORS)
def test_nan_stays_in_its_vector_and_in_the_mean(place):
    x = Source(place.device).normal(9, 4)
    x[3, 2] = math.nan
    per_sample, codebook = FV.binary_code_entropy(x)
    assert per_sample.isnan().nonzero().tolist() == [[3]]
    assert codebook.isnan()


@each_place(*OPERATORS)
@pytest.mark.parametrize("size", [1.0, 1e10, 1e38, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_bits_are_certain_and_have_a_finite_gradient(place, size, dtype):
    signs = (Source(place.device, dtype).normal(40, 6) > 0).to(dtype) * 2 - 1
    per_sample, codebook, gradient = results(FV.binary_code_entropy, signs * size, 300.0)
    _, counts = signs.unique(dim=0, return_counts=True)
    assert not per_sample.any()
    torch.testing.assert_close(codebook, torch.special.entr(counts / 40.0).sum().to(dtype))
    assert not gradient.any()


@each_place(*OPERATORS)
def test_all_codes_alike_is_the_most_entropy(place):
    per_sample, codebook, gradient = results(FV.binary_code_entropy, torch.zeros(5, 18, device=place.device))
    torch.testing.assert_close(per_sample, torch.full_like(per_sample, 18 * math.log(2.0)))
    torch.testing.assert_close(codebook, torch.full_like(codebook, 18 * math.log(2.0)))
    assert gradient.abs().max() < 1e-4


@each_place(*OPERATORS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(place, masked):
    source = Source(place.device, torch.float64)
    x, mask = source.normal(6, 5).requires_grad_(), source.uniform(6) < 0.7 if masked else None
    assert torch.autograd.gradcheck(lambda x: FV.binary_code_entropy(x, 0.7, mask=mask), x)


@each_place(*OPERATORS)
def test_odd_sizes(place):
    for rows, dim in ((1, 1), (63, 3), (41, 11)):
        x = Source(place.device).normal(rows, dim)
        oracle = results(softmax_entropies, x.double().cpu(), 10.0)
        assert_same_entropies(results(FV.binary_code_entropy, x, 10.0), oracle, torch.float32)


@each_place(*OPERATORS)
def test_under_autocast_results_are_those_without(place):
    x = Source(place.device).normal(50, 9)
    expected = results(FV.binary_code_entropy, x, 3.0)
    with torch.autocast(place.device, torch.bfloat16):
        actual = results(FV.binary_code_entropy, x, 3.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@each_place(*OPERATORS)
def test_the_same_bits_twice(place):
    x = Source(place.device).normal(100, 10)
    first, second = (results(FV.binary_code_entropy, x) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_many_blocks_give_the_same(monkeypatch, elements):
    source = Source("cpu", torch.float64)
    x, mask = source.normal(45, 7), source.uniform(45) < 0.7
    expected = results(FV.binary_code_entropy, x, 1.5, mask=mask)
    monkeypatch.setattr(fallback, "_BLOCK_ELEMENTS", elements)
    torch.testing.assert_close(results(FV.binary_code_entropy, x, 1.5, mask=mask), expected)


def test_memory_is_that_of_some_numbers_a_code():
    """Of 24 bits the probabilities of all codes for each vector would take 64 MiB a vector."""
    x, codebooks = Source("cpu").normal(100, 24).requires_grad_(), []

    def step():
        per_sample, codebook = FV.binary_code_entropy(x, 1.0)
        (per_sample.mean() - codebook).backward()
        codebooks.append(codebook.detach())

    assert devices.Cpu().peak_memory(step) < 8 * 4 * 2**24
    assert 0 < codebooks[0] < 24 * math.log(2.0)


def test_the_halves_of_the_bits_may_trade_places():
    """The entropies do not depend on how codes are numbered."""
    x = Source("cpu").normal(200, 11)
    first, second = (results(FV.binary_code_entropy, values, 20.0) for values in (x, x.roll(5, -1)))
    torch.testing.assert_close(first[:2], second[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first[2].roll(5, -1), second[2], rtol=1e-5, atol=1e-5)


def entropies_in_rank(rank, shares, masks):
    """The results on a rank's share, by the function and by the reference; each rank weighs the entropy that all share differently."""
    x = shares[rank].clone().requires_grad_()
    options = {"mask": masks[rank], "group": distributed.group.WORLD if distributed.is_initialized() else None}
    outcomes = []
    for module in (FV, reference):
        per_sample, codebook = module.binary_code_entropy(x, 1.5, **options)
        (gradient,) = torch.autograd.grad(per_sample.sum() - (rank + 1) * codebook, x)
        outcomes.append([per_sample.detach(), codebook.detach(), gradient])
    return outcomes


@pytest.mark.parametrize("sizes", [(30, 30), (50, 10), (60, 0)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_two_ranks_give_what_one_gives(ranks, sizes, masked):
    source = Source("cpu", torch.float64)
    x, mask = source.normal(60, 7), source.uniform(60) < 0.5
    shares = x.split(sizes)
    by_rank = ranks.run(entropies_in_rank, shares, mask.split(sizes) if masked else (None, None))
    leaf = x.clone().requires_grad_()
    per_sample, codebook = softmax_entropies(leaf, 1.5, mask if masked else None)
    # The gradient on each rank is that of the sum of both ranks' losses.
    (gradient,) = torch.autograd.grad(per_sample.sum() - (1 + 2) * codebook, leaf)
    for outcomes in zip(*by_rank, strict=True):
        torch.testing.assert_close(torch.cat([o[0] for o in outcomes]), per_sample.detach())
        torch.testing.assert_close(torch.stack([o[1] for o in outcomes]), codebook.detach().expand(2))
        torch.testing.assert_close(torch.cat([o[2] for o in outcomes]), gradient)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: got list, takes a tensor"),
        ({"x": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "x: got torch.int64, takes"),
        ({"x": torch.zeros(())}, ValueError, r"x: got shape \(\), takes \(..., D\) with 1 <= D <= 24"),
        ({"x": torch.zeros(3, 0)}, ValueError, r"x: got shape \(3, 0\), takes \(..., D\) with 1 <= D <= 24"),
        ({"x": torch.zeros(3, 25)}, ValueError, r"x: got shape \(3, 25\), takes .*: a number is kept for each of 2\^D codes"),
        ({"inv_temperature": -1.0}, ValueError, "inv_temperature: got -1.0, takes a finite number >= 0"),
        ({"inv_temperature": math.inf}, ValueError, "inv_temperature: got inf, takes a finite number >= 0"),
        ({"inv_temperature": True}, ValueError, "inv_temperature: got True, takes a finite number >= 0"),
        ({"mask": torch.ones(3)}, TypeError, "mask: got torch.float32, takes torch.bool"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask: got shape \(4,\), takes the shape of x without its last dimension"),
        ({"group": "world"}, TypeError, "group: got str, takes a process group of torch.distributed, or None"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        FV.binary_code_entropy(**{"x": torch.zeros(3, 4)} | arguments)
