"""The latent kernels against float64, against the C++ backend and against the reference with the same seed."""

import pytest
import torch
from _helpers import LAYOUTS, NOISE_TOLERANCE, Source, leaf, places
from test_latent import Case, check, check_a_kl_is_never_negative, check_near_the_prior

import fastvae
from fastvae import functional as FV
from fastvae.kernels import _device, _launch, latent
from fastvae.ops._results import REDUCTIONS
from fastvae.reference.latent import normal

OPERATOR = "latent_forward"
OTHER_BACKENDS = [place.backend for place in places(OPERATOR) if place.backend != "triton"]

# A program of the interpreter takes 2048 elements (float32), then tiles of 512: sizes below, between, at and beyond.
CASES = [
    *(Case(shape, reduction=reduction) for shape in ((5, 7), (3, 700)) for reduction in REDUCTIONS),
    *(Case(shape, reduction="mean") for shape in ((1,), (63,), (2, 2048))),
    *(Case((9, 33), reduction=reduction, free_bits=True) for reduction in REDUCTIONS),
    *(Case((9, 33), prior=prior, reduction=reduction) for prior in ("full", "row", "scalar") for reduction in ("none", "sample", "mean")),
    *(Case((9, 33), prior=prior, reduction="sample", free_bits=True) for prior in ("full", "row")),
    *(Case(shape, num_samples=samples) for shape in ((7, 20), (128, 20)) for samples in (1, 3)),
    *(Case((7, 20), num_samples=3, given_eps=True, reduction=reduction) for reduction in ("none", "sample", "batchmean")),
    *(Case((9, 33), logvar_clamp=clamp, prior="full") for clamp in ((-0.5, 0.5), None)),
    *(Case((6, 4, 5, 3), layout=layout, grad_layout=layout, prior="row") for layout in LAYOUTS),
    *(Case((6, 4, 5, 3), layout=layout, reduction="sample", free_bits=True) for layout in ("chunked", "channels_last", "expanded")),
    Case((3, 600), layout="chunked", prior="full", reduction="none", num_samples=2),
    *(Case(shape, reduction=reduction, free_bits=free_bits)
      for shape in ((), (0,), (0, 20), (20, 0)) for reduction in ("none", "sample", "batchmean") for free_bits in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check("cpu", torch.float32, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [
    Case((5, 7)),
    Case((3, 700), reduction="none"),
    Case((9, 33), prior="full", reduction="sample", free_bits=True),
    Case((7, 20), num_samples=3, given_eps=True),
    Case((1, 4500), layout="chunked", reduction="mean"),
], ids=str)  # fmt: skip
def test_matches_float64_in_16_bits(dtype, case):
    check("cpu", dtype, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_near_the_prior_the_kl_is_as_accurate_as_its_dtype(dtype):
    check_near_the_prior("cpu", dtype)


def test_a_kl_is_never_negative():
    check_a_kl_is_never_negative("cpu", rows=100, scales=(1e-4,))


DRAWS = [((1,), None), ((127,), None), ((3, 700), None), ((20_001,), None), ((7, 20), 5), ((128, 20), 2)]


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@pytest.mark.parametrize(("shape", "samples"), DRAWS)
def test_noise_of_every_backend(backend, shape, samples):
    zeros = torch.zeros(shape)
    ours = FV.reparameterize(zeros, zeros, num_samples=samples, seed=-7)
    with fastvae.use_backend(backend):
        theirs = FV.reparameterize(zeros, zeros, num_samples=samples, seed=-7)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=NOISE_TOLERANCE)
    torch.testing.assert_close(ours, normal(torch.tensor(-7), ours.shape), rtol=0, atol=NOISE_TOLERANCE)


def outputs_and_gradients(backend, inputs, **options):
    with fastvae.use_backend(backend):
        leaves = [leaf(t) for t in inputs]
        z, kl = FV.reparameterize_kl(*leaves, **options)
        return z, kl, *torch.autograd.grad(z.square().sum() + 3 * kl.sum(), leaves)


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("shape", "samples", "prior", "free_bits"), [
    ((9, 33), None, False, 0.0),
    ((9, 33), None, True, 0.7),
    ((2, 3, 16, 16), None, False, 0.7),
    ((7, 20), 3, True, 0.0),
])  # fmt: skip
def test_every_backend_with_the_same_seed(backend, reduction, shape, samples, prior, free_bits):
    inputs = Source("cpu").normal(4 if prior else 2, *shape)
    options = {"seed": 11, "num_samples": samples, "reduction": reduction, "free_bits": free_bits}
    ours, theirs = (outputs_and_gradients(name, inputs, **options) for name in ("triton", backend))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_what_a_call_did_not_ask_for_is_not_computed(monkeypatch):
    """Sampling alone and the KL alone launch one kernel each, both in one pass launch one too."""
    launched = []
    for name in ("latent_forward_kernel", "latent_rows_kernel", "latent_columns_kernel"):
        kernel = getattr(latent, name)
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *args, run=run, name=name, **kwargs: (launched.append(name), run(*args, **kwargs)))
    mu, logvar = Source("cpu").normal(2, 9, 33)
    FV.reparameterize_kl(mu, logvar, seed=1)
    FV.reparameterize(mu, logvar, seed=1)
    FV.kl_normal(mu, logvar)
    assert launched == ["latent_forward_kernel"] * 3
    launched.clear()
    FV.kl_normal(mu, logvar, reduction="sample")
    FV.kl_normal(mu, logvar, free_bits=0.5)
    assert launched == ["latent_rows_kernel", "latent_columns_kernel"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("free_bits", [0.0, 0.6])
def test_deterministic(reduction, free_bits):
    mu, logvar = Source("cpu").normal(2, 5, 1111)
    first, second = (FV.reparameterize_kl(mu, logvar, seed=3, reduction=reduction, free_bits=free_bits) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("programs", [8, 24, 320])
@pytest.mark.parametrize("reduction", ["sample", "batchmean"])
def test_any_number_of_programs(monkeypatch, programs, reduction):
    """The noise does not depend on it, and sums only in their rounding."""
    mu, logvar = Source("cpu").normal(2, 3, 5000)
    expected = FV.reparameterize_kl(mu, logvar, seed=3, reduction=reduction)
    machine = _launch.Machine("interpreter", 2, programs)
    monkeypatch.setattr(_device, "machine", lambda device: machine)
    z, kl = FV.reparameterize_kl(mu, logvar, seed=3, reduction=reduction)
    assert torch.equal(z, expected[0])
    torch.testing.assert_close(kl, expected[1])


def test_memory_is_poisoned():
    """What ``torch.empty`` gives is NaN in every test here (see tests/conftest.py), so an element that no kernel writes shows."""
    assert torch.empty(100).isnan().all()


def nan_at(tensor: torch.Tensor, *index: int) -> torch.Tensor:
    return tensor.index_put(tuple(torch.tensor(i) for i in index), torch.tensor(torch.nan))


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("free_bits", [0.0, 0.5])
def test_nan_in_nan_out(which, free_bits):
    inputs = list(Source("cpu").normal(4, 4, 6))
    inputs[which] = nan_at(inputs[which], 2, 3)
    ours, expected = (outputs_and_gradients(name, inputs, seed=1, free_bits=free_bits) for name in ("triton", "reference"))
    assert ours[1].isnan()
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


@pytest.mark.parametrize("samples", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_noise_may_be_kept(samples, dtype):
    """The operator gives it in float32, and takes it in the backward pass."""
    mu, logvar = Source("cpu", dtype).normal(2, 7, 20)
    seed = torch.tensor(5)
    call = torch.ops.fastvae.latent_forward.triton
    z, _, _, noise = call(mu, logvar, None, None, None, seed, samples, False, 0, 0.0, -30.0, 20.0, True)
    torch.testing.assert_close(noise, normal(seed, z.shape), rtol=0, atol=NOISE_TOLERANCE)
    call = torch.ops.fastvae.latent_backward.triton
    active = torch.empty(0, dtype=torch.bool)
    kept = call(z, None, mu, logvar, None, None, noise, None, active, samples, 0, -30.0, 20.0)
    drawn = call(z, None, mu, logvar, None, None, None, seed, active, samples, 0, -30.0, 20.0)
    for a, b in zip(kept, drawn, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("prior", [False, True])
def test_without_any_gradient_coming_in(prior):
    inputs = Source("cpu").normal(4, 3, 5) if prior else (*Source("cpu").normal(2, 3, 5), None, None)
    active = torch.empty(0, dtype=torch.bool)
    grads = torch.ops.fastvae.latent_backward.triton(None, None, *inputs, None, None, active, None, 2, -30.0, 20.0)
    assert all((gradient == 0).all() for gradient in grads)
    assert grads[2].shape == ((3, 5) if prior else (0,))


def test_float64_is_refused():
    mu, logvar = Source("cpu", torch.float64).normal(2, 3, 5)
    with pytest.raises(fastvae.BackendError, match=r"triton.*float64.*Backends that can: .*reference"):
        FV.reparameterize_kl(mu, logvar)
