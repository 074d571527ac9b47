"""What only the backend in plain PyTorch has: its screen, its blocks, and the ways it takes on devices that are not here."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from _calls import CALLS
from _helpers import NOISE_TOLERANCE, Source, threads
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import functional as FV
from fastvae.fallback import _blocks, _device, codebook, latent
from fastvae.ops import _results, group_norm
from fastvae.reference import codebook as reference_codebook
from fastvae.reference import latent as reference_latent


@pytest.fixture(autouse=True)
def forced():
    with fastvae.use_backend("fallback"):
        yield


@pytest.fixture
def elsewhere(monkeypatch):
    """The implementations take CPU tensors for those of another device."""
    monkeypatch.setattr(_device, "is_cpu", lambda device: False)


@pytest.fixture
def without_float64(monkeypatch, elsewhere):
    """As on Apple's GPUs."""
    monkeypatch.setattr(_results, "has_float64", lambda device: False)


class NoFloat64(TorchDispatchMode):
    """Raises where an operation takes or gives a tensor in float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert torch.float64 not in {t.dtype for t in tensors}, func
        return result


def results(call, backend: str, rows: int = 70) -> dict[str, torch.Tensor]:
    with fastvae.use_backend(backend):
        return call.results(call.tensors("cpu", rows))


def assert_same_results(call) -> None:
    expected = results(call, "reference")
    for name, tensor in results(call, "fallback").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_in_many_blocks_are_those_of_the_reference(call, monkeypatch):
    monkeypatch.setattr(_blocks, "_ELEMENTS_PER_THREAD", 300)
    monkeypatch.setattr(codebook, "_BLOCKS_OF_SCORES", 1)
    monkeypatch.setattr(codebook, "_FEWEST_ROWS", 3)
    assert_same_results(call)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_on_another_device_are_those_of_the_reference(call):
    assert_same_results(call)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_results_on_a_device_without_float64_are_those_of_the_reference(call):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_results, "has_float64", lambda device: True)
        expected = results(call, "reference")
    for name, tensor in results(call, "fallback").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("without_float64")
def test_a_device_without_float64_is_never_asked_for_it():
    source = Source("cpu")
    x, weight, codes, rows, mu = (source.normal(*shape) for shape in ((2, 6, 5, 4), (6,), (9, 5), (1, 30, 5), (40, 20)))
    with NoFloat64():
        _, mean, rstd = fastvae.fallback.group_norm.group_norm_forward(group_norm.ForwardArguments(x, 3, weight, weight, 1e-5, 1))
        fastvae.fallback.group_norm.group_norm_backward(group_norm.BackwardArguments(x, x, mean, rstd, weight, weight, 3, 1))
        # Codes that float32 cannot tell apart are what a more precise search would be for.
        indices, _ = codebook.codebook_nearest(codebook.ops.NearestArguments(rows, torch.cat([codes, codes + 1e-6])[None], True))
        codebook.codebook_quantize(codebook.ops.QuantizeArguments(rows, codes[None], 1, 4, 1.0))
        noise = None, torch.tensor(3), None
        latent.latent_forward(latent.ops.ForwardArguments(mu, mu, None, None, *noise, True, 4, 0.0, -30.0, 20.0, True))
    assert indices.max() < 18
    assert mean.dtype == rstd.dtype == torch.float32


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", True), ("hpu", True), ("mps", False)])
def test_which_devices_have_float64(device, expected):
    assert _results.has_float64(torch.device(device)) == expected


@given(st.integers(-(2**63), 2**63 - 1))
def test_the_keys_of_a_seed_are_the_same_on_every_device(seed):
    tensor = torch.tensor(seed)
    here = latent._round_keys(tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_device, "is_cpu", lambda device: False)
        assert torch.equal(latent._round_keys(tensor), here)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_noise_does_not_depend_on_the_number_of_threads(count, seed):
    """Nor on whether NumPy or torch draws it."""
    shape = (3, 111_111)
    expected = reference_latent.normal(torch.tensor(seed), shape)
    with threads(count):
        torch.testing.assert_close(latent.normal(torch.tensor(seed), shape), expected, rtol=0, atol=NOISE_TOLERANCE)


@pytest.mark.parametrize("start", [0, 2**32 - 300, 2**32, 2**40 + 5])
@pytest.mark.parametrize("way", ["numpy", "torch"])
def test_words_are_those_of_philox(start, way, monkeypatch):
    """Also where a counter takes more than 32 bits."""
    if way == "torch":
        monkeypatch.setattr(_device, "is_cpu", lambda device: False)
    seed, counters = torch.tensor(-12345), torch.arange(start, start + 640)
    even, odd = latent._words(start, torch.empty((3, 2, 640), dtype=torch.int64), latent._round_keys(seed))
    words = even[0], odd[0] & 0xFFFFFFFF, even[1], odd[1] & 0xFFFFFFFF
    for ours, theirs in zip(words, reference_latent.philox4x32(counters, seed), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kl_of_a_posterior_near_the_prior_keeps_its_digits(dtype):
    exponents = torch.linspace(-30, 4, 2000, dtype=torch.float64)
    x = torch.cat([exponents.exp(), -exponents.exp()]).to(dtype)
    expected = torch.tensor([_excess(value) for value in x.double().tolist()], dtype=torch.float64)
    actual = latent.excess_exp(x, _blocks.Rooms(dtype))
    torch.testing.assert_close(actual.double(), expected, rtol=16 * torch.finfo(dtype).eps, atol=0)


def _excess(x: float) -> float:
    """exp(x) - 1 - x, by its series where the difference would lose digits."""
    if abs(x) > 1:
        return math.exp(x) - 1.0 - x
    term, total = x * x / 2, 0.0
    for k in range(3, 30):
        total += term
        term *= x / k
    return total


def test_limits_that_no_log_variance_reaches_are_not_looked_at():
    logvar = torch.tensor([-math.inf, -1.0, 20.0, 21.0], requires_grad=True)
    FV.kl_normal(torch.zeros(4), logvar, reduction="none", logvar_clamp=(-math.inf, 20.0)).backward(torch.ones(4))
    assert logvar.grad[0] == -0.5
    assert logvar.grad[2] > 0
    assert logvar.grad[3] == 0


@pytest.mark.parametrize("outside", [None, -31.0, 21.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["cpu", "elsewhere"])
def test_one_log_variance_outside_the_limits_is_clamped_and_the_others_stay(outside, place, request):
    if place == "elsewhere":
        request.getfixturevalue("elsewhere")
    mu, logvar = Source("cpu").normal(3, 4), Source("cpu").normal(3, 4)
    if outside is not None:
        logvar[1, 2] = outside
    gradients = []
    for backend in ("fallback", "reference"):
        leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
        with fastvae.use_backend(backend):
            z, kl = FV.reparameterize_kl(*leaves, seed=3, logvar_clamp=(-30.0, 20.0))
            gradients.append((z, kl, *torch.autograd.grad(z.sum() + kl, leaves)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5, equal_nan=True)


def near_ties(dim: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows halfway between two codes but for steps that float32 products do not see."""
    generator = torch.Generator().manual_seed(dim)
    codes = scale * torch.randn(64, dim, generator=generator)
    pairs = torch.randint(64, (500, 2), generator=generator)
    nearer = torch.rand(500, 1, generator=generator) * 2e-7 - 1e-7
    x = (0.5 + nearer) * codes[pairs[:, 0]] + (0.5 - nearer) * codes[pairs[:, 1]]
    return x, torch.cat([codes, torch.nextafter(codes, torch.full_like(codes, math.inf))])


each_scale = pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e-15, 1.0, 1e15, 1e37])


@each_scale
@pytest.mark.parametrize("dim", [1, 2, 7, 64, 300])
def test_near_ties_are_decided_as_float64_does(dim, scale):
    x, codes = near_ties(dim, scale)
    expected = reference_codebook.nearest(x[None], codes[None])[0]
    assert torch.equal(FV.vq_nearest(x, codes), expected)


@pytest.fixture
def rounded_products():
    """float32 products that torch may make of operands in bfloat16."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(previous)


@pytest.mark.usefixtures("rounded_products")
@each_scale
def test_products_of_rounded_operands_are_only_a_coarser_screen(scale):
    assert codebook._operand_rounding(torch.device("cpu"), torch.float32) > 0
    x, codes = near_ties(64, scale)
    assert torch.equal(FV.vq_nearest(x, codes), reference_codebook.nearest(x[None], codes[None])[0])


def test_products_are_as_wide_again_after_that():
    assert codebook._operand_rounding(torch.device("cpu"), torch.float32) == 0


@each_scale
def test_autocast_does_not_round_the_screen(scale):
    x, codes = near_ties(64, scale)
    with torch.autocast("cpu", torch.bfloat16):
        indices = FV.vq_nearest(x, codes)
    assert torch.equal(indices, reference_codebook.nearest(x[None], codes[None])[0])


def test_the_operands_of_an_unknown_device_count_as_rounded():
    assert codebook._operand_rounding(torch.device("mps"), torch.float32) > 0
    assert codebook._operand_rounding(torch.device("mps"), torch.float64) == 0


def test_a_codebook_of_equal_codes_leaves_one_candidate_a_row(monkeypatch):
    """What a codebook holds before its first update must not cost a distance for each pair."""
    seen, decide = [], codebook._Search._lowest_of_the_nearest

    def record(self, codes, rows, row, code):
        seen.append(code.shape[0])
        return decide(self, codes, rows, row, code)

    monkeypatch.setattr(codebook._Search, "_lowest_of_the_nearest", record)
    assert FV.vq_nearest(torch.randn(200, 8), torch.zeros(100, 8)).tolist() == [0] * 200
    assert sum(seen) == 200


def test_few_rows_are_left_to_float64(monkeypatch):
    seen, decide = [], codebook._Search.decide
    monkeypatch.setattr(codebook._Search, "decide", lambda self, x: seen.append(x.shape[0]) or decide(self, x))
    FV.vq_nearest(torch.randn(8192, 64), torch.randn(512, 64))
    assert sum(seen) < 50


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_group_of_a_large_mean_does_not_change_the_others(layout):
    """What is computed in another way for it is the same to the last digits."""
    x = Source("cpu").normal(2, 6, 40, 40).contiguous(memory_format=layout)
    shifted = x.clone(memory_format=torch.preserve_format)
    shifted[0, :2] += 1e4
    plain, mixed = FV.group_norm_silu(x, 3), FV.group_norm_silu(shifted, 3)
    torch.testing.assert_close(mixed[:, 2:], plain[:, 2:], rtol=1e-5, atol=1e-5)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(shifted.double(), 3))
    torch.testing.assert_close(mixed.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def kept(monkeypatch):
    """The thread keeps nothing for temporaries at first; the fixture gives what it keeps then."""
    monkeypatch.setattr(_blocks, "_kept", _blocks._Kept())
    return _blocks._kept.memories


def norm_gradient(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(FV.group_norm_silu(x, 3).float().square().sum(), x)[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_that_inference_asked_for_serves_training(kept, layout):
    x = Source("cpu").normal(2, 6, 8, 8).bfloat16().contiguous(memory_format=layout)
    expected = norm_gradient(x)
    kept.clear()
    with torch.inference_mode():
        FV.group_norm_silu(x, 3)
    assert kept[torch.float32]
    assert torch.equal(norm_gradient(x), expected)


def test_later_calls_ask_for_no_memory(kept):
    x = Source("cpu").normal(2, 6, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    norm_gradient(x)
    addresses = [memory.data_ptr() for memory in kept[torch.float32]]
    norm_gradient(x)
    assert [memory.data_ptr() for memory in kept[torch.float32]] == addresses


def test_kept_memory_is_bounded(kept, monkeypatch):
    size = 2 * 6 * 8 * 8 * 4
    monkeypatch.setattr(_blocks, "_KEPT_BYTES", 2 * size)
    norm_gradient(Source("cpu").normal(2, 6, 8, 8).bfloat16())
    assert 0 < sum(memory.nbytes for memory in kept[torch.float32]) <= 2 * size


def test_threads_do_not_share_the_memory_of_their_temporaries():
    inputs = [Source("cpu", seed=seed).normal(2, 6, 40, 40).bfloat16() for seed in range(8)]
    expected = [norm_gradient(x) for x in inputs]

    def gradients(_) -> list[torch.Tensor]:
        with fastvae.use_backend("fallback"):
            return [norm_gradient(x) for x in inputs]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(gradients, range(8)):
            for actual, wanted in zip(found, expected, strict=True):
                assert torch.equal(actual, wanted)


@pytest.mark.parametrize("positions", [(1, 1), (1, 3), (5, 7), (8, 8)])
def test_sums_of_channels_that_are_last_do_not_miss_a_position(positions):
    """Threads sum equal numbers of positions, and what is left is added."""
    x = Source("cpu").normal(1, 6, *positions).contiguous(memory_format=torch.channels_last)
    for count in (1, 2, 3, 4):
        with threads(count):
            torch.testing.assert_close(FV.group_norm_silu(x, 3), FV.group_norm_silu(x.contiguous(), 3))
