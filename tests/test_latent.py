"""Sampling and the Gaussian KL against float64: values, gradients, shapes, layouts, limits."""

import math
from dataclasses import dataclass, replace

import mpmath
import pytest
import torch
from _helpers import (
    LAYOUTS,
    TOLERANCES,
    Source,
    accumulated,
    assert_close,
    assert_gradient_close,
    compiled_path,
    compiled_places,
    each_place,
    each_place_and_dtype,
    kept_bytes,
    lay_out,
    leaf,
    threads,
    wide_leaf,
)
from hypothesis import example, given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

import fastvae
from fastvae import _backend
from fastvae import functional as FV
from fastvae.ops._results import REDUCTIONS
from fastvae.reference import latent as reference
from fastvae.reference._reduce import reduce_elements

OPERATOR = "latent_forward"
CLAMPS = ((-30.0, 20.0), (-0.5, 0.5), None)


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    prior: str = "none"
    num_samples: int | None = None
    reduction: str = "batchmean"
    free_bits: bool = False
    logvar_clamp: tuple[float, float] | None = (-30.0, 20.0)
    given_eps: bool = False
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    seed: int = 0


shapes = st.lists(st.sampled_from((0, 1, 2, 3, 7, 20, 63, 130)), max_size=4).filter(lambda sizes: math.prod(sizes) <= 20_000).map(tuple)
cases = st.builds(
    Case,
    shape=shapes,
    prior=st.sampled_from(("none", "full", "row", "scalar")),
    num_samples=st.sampled_from((None, 1, 3)),
    reduction=st.sampled_from(tuple(REDUCTIONS)),
    free_bits=st.booleans(),
    logvar_clamp=st.sampled_from(CLAMPS),
    given_eps=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)


def prior_tensors(source: Source, case: Case) -> list[torch.Tensor]:
    shape = {"none": None, "full": case.shape, "row": case.shape[1:], "scalar": ()}[case.prior]
    return [] if shape is None else [leaf(source.normal(*shape, layout=case.layout)) for _ in range(2)]


def drawn_eps(mu: torch.Tensor, num_samples: int | None, seed: int) -> torch.Tensor:
    """The noise of a seed on the backend in use."""
    zeros = torch.zeros(mu.shape, device=mu.device)
    return FV.reparameterize(zeros, zeros, num_samples=num_samples, seed=seed)


def threshold(elements: torch.Tensor) -> float:
    """Free bits with dimensions clearly on both sides: the middle of the widest gap between their mean KLs; below all of them where there
    is no gap."""
    means = elements.mean(0).flatten().sort().values
    if elements.numel() == 0:
        return 0.25
    gaps = means.diff()
    if gaps.numel() == 0 or gaps.max() < 1e-3 * means.max():
        return 0.5 * float(means.min())
    gap, where = gaps.max(0)
    return float(means[where] + gap / 2)


def cancelled(elements: torch.Tensor, reduction: str) -> float:
    """What sums of KLs have to be allowed where all are small: each is the difference of numbers of order 1 and rounds like them."""
    if reduction == "none" or elements.numel() == 0:
        return 0.0
    return 0.1 * float(reduce_elements(torch.ones_like(elements), REDUCTIONS[reduction], elements.dtype).max())


def expand_prior(prior, like):
    return [p.expand(like.shape).contiguous().detach().requires_grad_() for p in prior]


def check(device: str, dtype: torch.dtype, case: Case) -> None:
    """The fused function and each alone, against the plain functions in float64."""
    source = Source(device, dtype, case.seed)
    mu, logvar = (leaf(source.normal(*case.shape, layout=case.layout)) for _ in range(2))
    prior = prior_tensors(source, case)
    sample_shape = case.shape if case.num_samples is None else (case.num_samples, *case.shape)
    if case.given_eps:
        eps = source.normal(*sample_shape, layout=case.layout)
        noise = {"eps": eps}
    else:
        eps = drawn_eps(mu, case.num_samples, case.seed)
        noise = {"seed": case.seed}

    wide = [wide_leaf(mu), wide_leaf(logvar), *expand_prior([wide_leaf(p) for p in prior], mu)]
    elements = reference.kl_normal(*wide, reduction="none", logvar_clamp=case.logvar_clamp)
    options = {
        "reduction": case.reduction,
        "free_bits": threshold(elements.detach()) if case.free_bits else 0.0,
        "logvar_clamp": case.logvar_clamp,
    }
    oracle = reference.reparameterize_kl(*wide, eps=eps.double(), **options)
    z, kl = FV.reparameterize_kl(mu, logvar, *prior, num_samples=case.num_samples, **noise, **options)
    assert z.device == kl.device == mu.device
    assert_close(z, oracle[0], dtype)
    assert_close(kl, oracle[1], accumulated(dtype, case.reduction), magnitude=cancelled(elements, case.reduction))

    cotangents = [source.normal(*output.shape, layout=case.grad_layout, dtype=output.dtype) for output in (z, kl)]
    wide_cotangents = [c.double() for c in cotangents]
    inputs = [mu, logvar, *prior]
    compare_gradients(
        torch.autograd.grad([z, kl], inputs, cotangents), torch.autograd.grad(oracle, wide, wide_cotangents, retain_graph=True)
    )

    alone = FV.reparameterize(mu, logvar, num_samples=case.num_samples, logvar_clamp=case.logvar_clamp, **noise)
    assert_close(alone, oracle[0], dtype)
    expected = torch.autograd.grad(oracle[0], wide[:2], wide_cotangents[0], retain_graph=True)
    compare_gradients(torch.autograd.grad(alone, [mu, logvar], cotangents[0]), expected)

    alone = FV.kl_normal(mu, logvar, *prior, **options)
    assert_close(alone, oracle[1], kl.dtype, magnitude=cancelled(elements, case.reduction))
    expected = torch.autograd.grad(oracle[1], wide, wide_cotangents[1])
    compare_gradients(torch.autograd.grad(alone, inputs, cotangents[1]), expected)


def compare_gradients(actual, full_oracle) -> None:
    """The oracle's gradients are those of expanded priors; a prior that was broadcast gets their sum."""
    for gradient, oracle in zip(actual, full_oracle, strict=True):
        assert_gradient_close(gradient, oracle)


@each_place_and_dtype(OPERATOR)
@given(case=cases)
@example(case=Case((128, 20)))
@example(case=Case((0, 20), free_bits=True))
@example(case=Case((20, 0), reduction="sample"))
@example(case=Case((), free_bits=True, reduction="sample", num_samples=3))
@example(case=Case((64, 2, 8, 8), prior="row", layout="channels_last", grad_layout="channels_last"))
def test_matches_float64(place, dtype, case):
    check(place.device, dtype, case)


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("shape", [(1,), (63,), (41, 401), (513, 1), (1, 4097)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_odd_sizes(place, dtype, shape, reduction):
    case = Case(shape, reduction=reduction)
    check(place.device, dtype, case)
    check(place.device, dtype, replace(case, prior="full", free_bits=True, num_samples=2))


@each_place(OPERATOR)
@pytest.mark.parametrize("case", [Case((1_000_001,), reduction="mean"), Case((1, 1_000_001), prior="full", reduction="sum")], ids=str)
def test_a_million_and_one(place, case):
    check(place.device, torch.float32, case)


@pytest.mark.parametrize("clamp", CLAMPS)
def test_the_oracle_is_torch_distributions(clamp):
    source = Source("cpu", torch.float64)
    mu, logvar, prior_mu, prior_logvar = source.normal(4, 30, 7)
    limits = (-math.inf, math.inf) if clamp is None else clamp
    scale, prior_scale = (v.clamp(*limits).mul(0.5).exp() for v in (logvar, prior_logvar))
    expected = kl_divergence(Normal(mu, scale), Normal(prior_mu, prior_scale))
    ours = reference.kl_normal(mu, logvar, prior_mu, prior_logvar, reduction="none", logvar_clamp=clamp)
    torch.testing.assert_close(ours, expected)
    standard = reference.kl_normal(mu, logvar, reduction="none", logvar_clamp=clamp)
    torch.testing.assert_close(standard, kl_divergence(Normal(mu, scale), Normal(torch.zeros_like(mu), torch.ones_like(mu))))


@each_place(OPERATOR)
def test_torch_distributions(place):
    """Values and gradients of the tutorial's lines."""
    source = Source(place.device, torch.float32)
    mu, logvar, eps = source.normal(3, 128, 20)
    leaves, theirs = [leaf(mu), leaf(logvar)], [leaf(mu), leaf(logvar)]
    z, kl = FV.reparameterize_kl(*leaves, eps=eps)
    posterior = Normal(theirs[0], theirs[1].mul(0.5).exp())
    expected_z = posterior.loc + posterior.scale * eps
    expected_kl = kl_divergence(posterior, Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(z, expected_z)
    torch.testing.assert_close(kl, expected_kl)
    (2 * kl + (z**2).sum()).backward()
    (2 * expected_kl + (expected_z**2).sum()).backward()
    for ours, expected in zip(leaves, theirs, strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def relative_error(actual: torch.Tensor, expected: list) -> float:
    """In units of the dtype's last place, half of which the result may have been rounded by."""
    eps = torch.finfo(actual.dtype).eps
    return max(float(abs(mpmath.mpf(a) - e) / abs(e)) / eps for a, e in zip(actual.tolist(), expected, strict=True))


def log_variances_near_zero(device: str, dtype: torch.dtype) -> torch.Tensor:
    """Of both signs and down to where the squares leave the normal numbers."""
    smallest = max(1e-9, torch.finfo(dtype).tiny ** 0.5 * 8)
    magnitudes = torch.logspace(math.log10(smallest), math.log10(8.0), 199, dtype=torch.float64)
    return torch.cat([magnitudes, -magnitudes]).to(device, dtype)


def check_near_the_prior(device: str, dtype: torch.dtype, logvar_clamp: tuple[float, float] | None = (-30.0, 20.0)) -> None:
    """e^d - 1 - d and e^d - 1 keep their relative accuracy where the difference d of two log variances is small.

    Without a prior, and with one whose log variance differs by d; a prior is at 1 so that d is exact.
    """
    logvar = leaf(log_variances_near_zero(device, dtype))
    zeros, ones = torch.zeros_like(logvar), torch.ones_like(logvar)
    shifted, prior = leaf(logvar.detach() + 1), leaf(ones)
    for inputs, kl in (
        ((logvar,), FV.kl_normal(zeros, logvar, reduction="none", logvar_clamp=logvar_clamp)),
        ((shifted, prior), FV.kl_normal(zeros, shifted, zeros, prior, reduction="none", logvar_clamp=logvar_clamp)),
    ):
        with mpmath.workdps(60):
            differences = [mpmath.mpf(v) - len(inputs) + 1 for v in inputs[0].tolist()]
            exact = [mpmath.expm1(d) for d in differences]
            divergences = [0.5 * (e - d) for e, d in zip(exact, differences, strict=True)]
        gradients = torch.autograd.grad(kl, inputs, torch.ones_like(kl))
        kept = [i for i, d in enumerate(differences) if d != 0]
        bound = 5 if dtype.itemsize >= 4 else 0.51
        for actual, expected, factor in ((kl.detach(), divergences, 1), (gradients[0], exact, 0.5), (gradients[-1], exact, 0.5)):
            sign = -1 if actual is gradients[-1] and len(inputs) == 2 else 1
            assert relative_error(actual[kept], [sign * factor * expected[i] for i in kept]) <= bound


def check_a_kl_is_never_negative(device: str, rows: int = 4096, scales=(1e-6, 1e-4, 1e-2, 0.3, 1.0)) -> None:
    source = Source(device)
    for scale in scales:
        mu, logvar, prior_mu, prior_logvar = source.normal(4, rows, 3) * scale
        for prior in ((), (prior_mu, prior_logvar), (mu, prior_logvar), (mu, logvar)):
            for reduction in ("none", "sample", "mean"):
                for free_bits in (0.0, 1e-12):
                    kl = FV.kl_normal(mu, logvar, *prior, reduction=reduction, free_bits=free_bits)
                    assert (kl >= 0).all()


@each_place_and_dtype(OPERATOR)
def test_near_the_prior_the_kl_is_as_accurate_as_its_dtype(place, dtype):
    check_near_the_prior(place.device, dtype)


@pytest.mark.parametrize("logvar_clamp", [(-30.0, 20.0), None])
def test_near_the_prior_on_each_instruction_set(instruction_set, logvar_clamp):
    """Limits that rule out an overflow have loops of their own."""
    check_near_the_prior("cpu", torch.float32, logvar_clamp)


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_log_variances_that_overflow_without_limits(place, reduction):
    logvar = torch.tensor([-1e4, -250.0, -175.0, 80.0, 150.0], device=place.device)
    mu, eps = torch.ones_like(logvar), torch.full_like(logvar, 0.5)
    for prior in ((), (mu - 1, logvar.flip(0))):
        z, kl = FV.reparameterize_kl(mu, logvar, *prior, eps=eps, reduction=reduction, logvar_clamp=None)
        wide = [t.double() for t in (mu, logvar, *prior)]
        expected = reference.reparameterize_kl(*wide, eps=eps.double(), reduction=reduction, logvar_clamp=None)
        torch.testing.assert_close((z, kl), tuple(t.float() for t in expected))


@each_place(OPERATOR)
def test_a_kl_is_never_negative(place):
    check_a_kl_is_never_negative(place.device)


@each_place(OPERATOR)
def test_free_bits_of_a_posterior_near_the_prior(place):
    """Which dimensions are above a small limit, and their sum, are not decided by rounding."""
    logvar = torch.tensor([1e-6, -1e-5, 1e-4, -1e-3, 1e-2], device=place.device).expand(64, 5)
    divergences = logvar[0].double().square() / 4
    for free_bits in (1e-14, 1e-11, 1e-8):
        kl = FV.kl_normal(torch.zeros_like(logvar), logvar, free_bits=free_bits)
        torch.testing.assert_close(kl.double(), divergences.clamp(min=free_bits).sum(), rtol=4e-3, atol=0)


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("num_samples", [None, 2])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("free_bits", [0.0, 0.3])
def test_gradcheck(place, num_samples, prior, free_bits):
    source = Source(place.device, torch.float64, seed=3)
    inputs = [leaf(source.normal(5, 4)) for _ in range(4 if prior else 2)]

    def function(*tensors):
        return FV.reparameterize_kl(*tensors, num_samples=num_samples, seed=1, free_bits=free_bits)

    assert torch.autograd.gradcheck(function, inputs)


@each_place(OPERATOR)
def test_gradient_of_twice_the_loss(place):
    mu, logvar = (leaf(Source(place.device, seed=seed).normal(33, 7)) for seed in range(2))
    once = torch.autograd.grad(FV.kl_normal(mu, logvar), [mu, logvar])
    twice = torch.autograd.grad(2 * FV.kl_normal(mu, logvar), [mu, logvar])
    for a, b in zip(once, twice, strict=True):
        torch.testing.assert_close(2 * a, b)


@each_place(OPERATOR)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_incoming_gradients_in_every_layout(place, layout):
    source = Source(place.device, seed=5)
    mu, logvar = (leaf(source.normal(6, 4, 5, 3)) for _ in range(2))
    z, kl = FV.reparameterize_kl(mu, logvar, reduction="none", seed=2)
    cotangents = [lay_out(source.normal(*z.shape), layout) for _ in range(2)]
    ours = torch.autograd.grad([z, kl], [mu, logvar], cotangents, retain_graph=True)
    dense = torch.autograd.grad([z, kl], [mu, logvar], [c.contiguous() for c in cotangents])
    for a, b in zip(ours, dense, strict=True):
        assert torch.equal(a, b)


@each_place(OPERATOR)
def test_chunks_of_an_encoder_head(place):
    """``h.chunk(2, dim=1)``: strided rows in, and the gradient arrives in ``h``."""
    head = leaf(Source(place.device, seed=6).normal(50, 2 * 20))
    z, kl = FV.reparameterize_kl(*head.chunk(2, dim=1), seed=3)
    (z.sum() + kl).backward()
    mu, logvar = (leaf(part.contiguous()) for part in head.detach().chunk(2, dim=1))
    dense_z, dense_kl = FV.reparameterize_kl(mu, logvar, seed=3)
    (dense_z.sum() + dense_kl).backward()
    assert torch.equal(z, dense_z)
    torch.testing.assert_close(kl, dense_kl)
    torch.testing.assert_close(head.grad, torch.cat([mu.grad, logvar.grad], dim=1))


@each_place(OPERATOR)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (1, 2), (4,)], ids=str)
def test_only_the_wanted_gradients(place, wanted):
    """Any subset of mu, logvar, prior_mu, prior_logvar and eps may require a gradient."""
    source = Source(place.device, seed=7)
    tensors = [source.normal(2, 9) for _ in range(5)]
    leaves = [leaf(t) if i in wanted else t for i, t in enumerate(tensors)]
    twins = [leaf(t) if i in wanted else t for i, t in enumerate(tensors)]
    z, kl = FV.reparameterize_kl(*leaves[:4], eps=leaves[4])
    oracle_z, oracle_kl = reference.reparameterize_kl(*twins[:4], eps=twins[4])
    (z.square().sum() + kl).backward()
    (oracle_z.square().sum() + oracle_kl).backward()
    for i in wanted:
        torch.testing.assert_close(leaves[i].grad, twins[i].grad)


@each_place_and_dtype(OPERATOR)
def test_noise_of_another_dtype_and_its_gradient(place, dtype):
    source = Source(place.device, dtype)
    mu, logvar = source.normal(2, 6, 8)
    eps = leaf(source.normal(3, 6, 8, dtype=torch.float32))
    z = FV.reparameterize(mu, logvar, eps=eps, num_samples=3)
    assert z.dtype == dtype
    cotangent = source.normal(*z.shape)
    (gradient,) = torch.autograd.grad(z, eps, cotangent)
    assert gradient.dtype == torch.float32
    expected = cotangent.double() * logvar.double().mul(0.5).exp()
    coarser = dtype if dtype.itemsize == 2 else torch.float32
    torch.testing.assert_close(gradient.double(), expected, **TOLERANCES[coarser])


@each_place(OPERATOR)
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_wanted_nothing_recorded(place, seed):
    mu, logvar = Source(place.device, seed=seed).normal(2, 5, 3)
    z, kl = FV.reparameterize_kl(mu, logvar)
    assert not z.requires_grad
    assert not kl.requires_grad
    with torch.no_grad():
        assert not FV.kl_normal(leaf(mu), leaf(logvar)).requires_grad


@each_place(OPERATOR)
def test_memory_kept_for_the_backward_pass(place):
    """The inputs; and the noise only where drawing it again is slower than reading it."""
    mu, logvar = (leaf(Source(place.device, seed=seed).normal(64, 100)) for seed in range(2))
    noise = 8 * mu.nbytes if _backend.BACKENDS[place.backend].keeps_noise else 0
    assert kept_bytes(lambda: FV.reparameterize_kl(mu, logvar, num_samples=8), mu, logvar) <= noise + 8 * 4


@each_place_and_dtype(OPERATOR)
def test_at_and_outside_the_clamp(place, dtype):
    """On a limit the gradient is that of the formula, outside it is 0."""
    logvar = leaf(torch.tensor([-1e4, -31.0, -30.0, -29.0, 0.0, 8.0, 9.0, 1e4], dtype=dtype, device=place.device))
    mu = leaf(torch.ones_like(logvar))
    eps = torch.full_like(mu, 0.5)
    wide = [wide_leaf(mu), wide_leaf(logvar)]
    clamp = (-30.0, 8.0)
    z, kl = FV.reparameterize_kl(mu, logvar, eps=eps, reduction="none", logvar_clamp=clamp)
    oracle = reference.reparameterize_kl(*wide, eps=eps.double(), reduction="none", logvar_clamp=clamp)
    for actual, expected in zip((z, kl), oracle, strict=True):
        assert_close(actual, expected, dtype)
    ones = [torch.ones_like(z), torch.ones_like(kl)]
    gradients = torch.autograd.grad([z, kl], [mu, logvar], ones)
    expected = torch.autograd.grad(oracle, wide, [one.double() for one in ones])
    for actual, oracle_gradient in zip(gradients, expected, strict=True):
        assert_close(actual, oracle_gradient, dtype)
    outside = (logvar < clamp[0]) | (logvar > clamp[1])
    assert (gradients[1][outside] == 0).all()
    assert (gradients[1][~outside] != 0).all()


@each_place(OPERATOR)
def test_a_prior_outside_the_clamp(place):
    prior_logvar = leaf(torch.tensor([-1e4, -2.0, 0.0, 1e4], device=place.device))
    mu, logvar, prior_mu = Source(place.device).normal(3, 4)
    FV.kl_normal(mu, logvar, prior_mu, prior_logvar, logvar_clamp=(-3.0, 3.0)).backward()
    assert prior_logvar.grad[[0, 3]].tolist() == [0.0, 0.0]
    assert (prior_logvar.grad[1:3] != 0).all()


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("clamp", [(-30.0, 20.0), None], ids=str)
def test_extreme_log_variances(place, dtype, clamp):
    """As the formula in float64 rounded to the dtype: finite inside the clamp, infinite where exp overflows without it."""
    logvar = torch.tensor([1e4, -1e4, 80.0, -80.0, math.inf, -math.inf], dtype=dtype, device=place.device)
    mu = torch.tensor([0.5, -0.5, 0.0, 2.0, 1.0, 1.0], dtype=dtype, device=place.device)
    eps = torch.tensor([1.0, 1.0, -1.0, 2.0, 1.0, -1.0], dtype=dtype, device=place.device)
    z, kl = FV.reparameterize_kl(mu, logvar, eps=eps, reduction="none", logvar_clamp=clamp)
    oracle = reference.reparameterize_kl(mu.double(), logvar.double(), eps=eps.double(), reduction="none", logvar_clamp=clamp)
    assert_close(z, oracle[0], dtype)
    assert_close(kl, oracle[1], dtype)
    if clamp is not None and dtype != torch.float16:
        assert z.isfinite().all()
        assert kl.isfinite().all()


@each_place_and_dtype(OPERATOR)
@pytest.mark.parametrize("poisoned", ["mu", "logvar", "prior_mu", "prior_logvar", "eps"])
@pytest.mark.parametrize("free_bits", [0.0, 0.1])
def test_nan_in_nan_out(place, dtype, poisoned, free_bits):
    source = Source(place.device, dtype)
    tensors = {name: source.normal(40, 30) for name in ("mu", "logvar", "prior_mu", "prior_logvar", "eps")}
    tensors[poisoned][7, 11] = math.nan
    leaves = {name: leaf(t) for name, t in tensors.items()}
    z, kl = FV.reparameterize_kl(**leaves, reduction="sample", free_bits=free_bits)
    in_z, in_kl = poisoned in ("mu", "logvar", "eps"), poisoned != "eps"
    assert z.isnan().nonzero().tolist() == ([[7, 11]] if in_z else [])
    assert kl.isnan().nonzero().tolist() == ([[7]] if in_kl else [])
    (z.float().sum() + kl.sum()).backward()
    nan_places = {name: tensor.grad.isnan().nonzero().tolist() for name, tensor in leaves.items()}
    assert nan_places["logvar" if poisoned == "eps" else poisoned] == [[7, 11]]
    assert all(places in ([], [[7, 11]]) for places in nan_places.values())


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("free_bits", [0.0, 0.1])
def test_nan_reaches_a_reduced_kl(place, reduction, free_bits):
    mu, logvar = Source(place.device).normal(2, 300, 70)
    mu[299, 69] = math.nan
    assert FV.kl_normal(mu, logvar, reduction=reduction, free_bits=free_bits).isnan()


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_empty_batch(place, reduction, free_bits):
    mu, logvar = (leaf(torch.empty(0, 20, device=place.device)) for _ in range(2))
    prior = [leaf(torch.zeros(20, device=place.device)) for _ in range(2)]
    z, kl = FV.reparameterize_kl(mu, logvar, *prior, reduction=reduction, free_bits=free_bits, num_samples=2)
    assert z.shape == (2, 0, 20)
    assert kl.shape == {"none": (0, 20), "sample": (0,)}.get(reduction, ())
    assert kl.sum() == 0
    (z.sum() + kl.sum()).backward()
    assert mu.grad.shape == (0, 20)
    assert (prior[0].grad == 0).all()


@each_place(OPERATOR)
def test_reductions_of_one_another(place):
    mu, logvar = Source(place.device).normal(2, 12, 5, 3)
    for free_bits in (0.0, 0.4):
        kl = {name: FV.kl_normal(mu, logvar, reduction=name, free_bits=free_bits) for name in REDUCTIONS}
        torch.testing.assert_close(kl["none"].sum((1, 2)), kl["sample"])
        torch.testing.assert_close(kl["sample"].mean(), kl["batchmean"])
        torch.testing.assert_close(kl["sample"].sum(), kl["sum"])
        torch.testing.assert_close(kl["sum"] / mu.numel(), kl["mean"])


@each_place(OPERATOR)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_free_bits_per_dimension(place, reduction):
    """sum_d max(lambda, mean_b KL): dimensions below count lambda without a gradient, those above count in full."""
    source = Source(place.device, seed=1)
    scale = torch.tensor([0.01, 3.0, 0.02, 2.0], device=place.device)
    mu = leaf(source.normal(50, 4) * scale)
    logvar = leaf(torch.zeros_like(mu))
    free_bits = 0.5
    means = FV.kl_normal(mu.detach(), logvar.detach(), reduction="none").mean(0)
    expected = torch.where(means > free_bits, means, free_bits).sum()
    assert (means > free_bits).tolist() == [False, True, False, True]
    kl = FV.kl_normal(mu, logvar, reduction=reduction, free_bits=free_bits)
    total = kl.sum() * {"batchmean": 50, "mean": mu.numel()}.get(reduction, 1)
    torch.testing.assert_close(total / 50, expected)
    total.backward()
    torch.testing.assert_close(mu.grad, torch.where(means > free_bits, mu.detach(), 0.0))
    assert (logvar.grad == 0).all()


@each_place(OPERATOR)
def test_free_bits_at_the_threshold_have_no_gradient(place):
    mu = leaf(torch.ones(4, 3, device=place.device))
    kl = FV.kl_normal(mu, torch.zeros_like(mu), free_bits=0.5)
    kl.backward()
    assert kl == 1.5
    assert (mu.grad == 0).all()


@each_place(OPERATOR)
def test_num_samples(place):
    mu, logvar = (leaf(Source(place.device, seed=seed).normal(30, 4)) for seed in range(2))
    z, kl = FV.reparameterize_kl(mu, logvar, num_samples=5, seed=1)
    assert z.shape == (5, 30, 4)
    assert torch.unique(z, dim=0).shape[0] == 5
    torch.testing.assert_close(kl, FV.kl_normal(mu, logvar))
    assert FV.reparameterize(mu, logvar, num_samples=1).shape == (1, 30, 4)
    many = FV.reparameterize(mu.detach(), logvar.detach(), num_samples=20_000, seed=2)
    sigma = logvar.detach().mul(0.5).exp()
    assert ((many.mean(0) - mu.detach()).abs() < 5 * sigma / 20_000**0.5).all()
    assert ((many.std(0) / sigma - 1).abs() < 5 / 40_000**0.5).all()


@each_place(OPERATOR)
@pytest.mark.parametrize("shape", [(), (20,), (1, 20), (64, 1), (64, 20)], ids=str)
def test_learned_prior(place, shape):
    source = Source(place.device, seed=2)
    tensors = [source.normal(64, 20), source.normal(64, 20), source.normal(*shape), source.normal(*shape)]
    leaves, twins = ([leaf(t) for t in tensors] for _ in range(2))
    kl = FV.kl_normal(*leaves)
    posterior, prior = (Normal(m, v.mul(0.5).exp()) for m, v in (twins[:2], twins[2:]))
    expected = kl_divergence(posterior, prior).sum(1).mean()
    torch.testing.assert_close(kl, expected)
    (3 * kl).backward()
    (3 * expected).backward()
    for ours, theirs in zip(leaves, twins, strict=True):
        assert ours.grad.shape == ours.shape
        torch.testing.assert_close(ours.grad, theirs.grad)


@each_place(OPERATOR)
def test_a_prior_equal_to_the_posterior_costs_nothing(place):
    mu, logvar = (leaf(t) for t in Source(place.device).normal(2, 64, 20))
    kl = FV.kl_normal(mu, logvar, mu, logvar, reduction="none")
    assert kl.abs().max() < 1e-6
    kl.sum().backward()
    assert mu.grad.abs().max() < 1e-6


@each_place(OPERATOR)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_draws_the_same_noise_again(place, use_reentrant):
    def loss(mu, logvar):
        z, kl = FV.reparameterize_kl(mu, logvar)
        return z.sin().sum() + kl

    gradients = []
    for run in (loss, lambda *tensors: checkpoint(loss, *tensors, use_reentrant=use_reentrant)):
        mu, logvar = (leaf(Source(place.device, seed=seed).normal(40, 6)) for seed in range(2))
        torch.manual_seed(11)
        run(mu, logvar).backward()
        gradients.append((mu.grad, logvar.grad))
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@each_place(OPERATOR)
def test_a_retained_graph_gives_the_same_gradient_twice(place):
    mu, logvar = (leaf(Source(place.device, seed=seed).normal(40, 6)) for seed in range(2))
    z, kl = FV.reparameterize_kl(mu, logvar)
    loss = z.sin().sum() + kl
    first = torch.autograd.grad(loss, [mu, logvar], retain_graph=True)
    first[0].mul_(3)
    second = torch.autograd.grad(loss, [mu, logvar])
    torch.testing.assert_close(first[0], 3 * second[0])
    assert torch.equal(first[1], second[1])


def run_once(place, shape, num_samples=None):
    source = Source(place.device, seed=9)
    tensors = [leaf(source.normal(*shape)) for _ in range(4)]
    z, kl = FV.reparameterize_kl(*tensors, seed=5, num_samples=num_samples, free_bits=0.7)
    return [z, kl, *torch.autograd.grad([z, kl], tensors, [torch.ones_like(z), torch.ones_like(kl)])]


@each_place(OPERATOR)
@pytest.mark.parametrize("shape", [(41, 401), (1000, 1001)], ids=str)
def test_two_runs_agree_bitwise(place, shape):
    assert all(torch.equal(a, b) for a, b in zip(run_once(place, shape, 2), run_once(place, shape, 2), strict=True))


@pytest.mark.parametrize("place", compiled_places(OPERATOR), ids=str)
@pytest.mark.parametrize("shape", [(41, 401), (1000, 1001), (3, 100_001)], ids=str)
def test_the_number_of_threads_changes_no_bit(place, shape):
    runs = []
    for count in (1, 2):
        with threads(count):
            runs.append(run_once(place, shape, 2))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_each_instruction_set(instruction_set, dtype):
    for shape in ((1,), (63,), (41, 401), (7, 1, 1030)):
        for options in ({"num_samples": 2, "prior": "full"}, {"free_bits": True, "given_eps": True}, {"prior": "row", "reduction": "none"}):
            check("cpu", dtype, Case(shape, **options))
            assert fastvae._C.last_instruction_set("latent") == compiled_path("latent", instruction_set)
