"""The reconstruction kernels against float64, against the C++ backend and against the reference."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from _helpers import LAYOUTS, Source, leaf, places
from test_reconstruction import FORMS, SCALAR_REDUCTIONS, Case, check, check_written_over, evaluate, make_inputs

import fastvae
from fastvae import functional as FV
from fastvae.kernels import _device, _launch
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.reconstruction import LIKELIHOODS

OTHER_BACKENDS = [place.backend for place in places("reconstruction_forward") if place.backend != "triton"]
HALVES = torch.bfloat16, torch.float16

# A program of the interpreter takes 1024 elements (float32; 2048 beside narrower ones), then chunks of 128.
CASES = [
    *(Case(likelihood, shape, reduction) for likelihood in LIKELIHOODS for shape in ((5, 7), (3, 1111)) for reduction in REDUCTIONS),
    *(Case(likelihood, shape, "mean") for likelihood in LIKELIHOODS for shape in ((1,), (63,), (2, 2048))),
    *(Case(likelihood, (3, 1111), reduction, torch.uint8) for likelihood in LIKELIHOODS for reduction in ("none", "sample", "mean")),
    *(Case("bce_with_logits", (4, 3, 6, 5), reduction, weight=form, pos_weight=other)
      for (form, other) in itertools.pairwise((*FORMS, FORMS[0])) for reduction in ("sample", "sum")),
    *(Case("gaussian", (4, 3, 6, 5), reduction, logvar=form) for form in FORMS for reduction in ("none", "sample", "batchmean")),
    # Shared operands whose values are used more often than a block has elements, and which have more values than one.
    *(Case(likelihood, shape, reduction, weight=form, pos_weight=form, logvar=form)
      for likelihood in ("bce_with_logits", "gaussian") for shape in ((2, 3, 40, 40), (3, 2500)) for form in ("channel", "batch", "last")
      for reduction in ("sample", "mean")),
    *(Case("bce_with_logits", (4, 3, 6, 5), "mean", target_dtype, shared_dtype=shared_dtype, weight="channel", pos_weight="last")
      for target_dtype in HALVES for shared_dtype in (torch.float32, torch.float64)),
    *(Case("mse", (6, 4, 5, 3), "sum", layout=layout, target_layout=other) for layout, other in itertools.pairwise((*LAYOUTS, LAYOUTS[0]))),
    *(Case("gaussian", (4, 3, 6, 5), "none", layout="channels_last", logvar=form, grad_layout="sliced") for form in FORMS),
    *(Case(likelihood, (5, 7), reduction, target_gradient=True) for likelihood in LIKELIHOODS for reduction in ("none", "sample", "mean")),
    *(Case(likelihood, (5, 300), reduction, grad_scale=scale, incoming=incoming, logvar=logvar)
      for likelihood, logvar in (("bce", "full"), ("gaussian", "scalar"), ("gaussian", "last")) for reduction in SCALAR_REDUCTIONS[:2]
      for scale, incoming in ((1.0, 1.0), (1.0, -3.0), (0.25, 0.25), (0.25, 0.0))),
    *(Case(likelihood, shape, reduction, logvar=logvar)
      for likelihood, logvar in (("bce", "full"), ("gaussian", "scalar"), ("gaussian", "last"), ("gaussian", "full"))
      for shape in ((), (0,), (0, 20), (20, 0)) for reduction in ("none", "sample", "mean")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check("cpu", torch.float32, case)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("target_dtype", [None, torch.float32, torch.uint8])
def test_matches_float64_in_16_bits(dtype, likelihood, target_dtype):
    for reduction in REDUCTIONS:
        check("cpu", dtype, Case(likelihood, (3, 1111), reduction, target_dtype, weight="last", logvar="last"))


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_backend(backend, likelihood, reduction):
    case = Case(likelihood, (4, 3, 20, 20), reduction, torch.uint8, weight="suffix", pos_weight="channel", logvar="batch")
    input, target, weight, pos_weight, logvar = make_inputs(Source("cpu"), case)
    results = []
    for name in ("triton", backend):
        with fastvae.use_backend(name):
            leaves = [leaf(t) for t in (input, logvar) if t is not None]
            loss = evaluate(FV, case, leaves[0], target, weight, pos_weight, leaves[-1])
            results.append((loss, *torch.autograd.grad(3 * loss.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def against_float64(loss, input: torch.Tensor, target: torch.Tensor, **tolerances) -> None:
    """A loss and its gradient, elementwise, against the reference in float64."""
    results = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        with fastvae.use_backend(name):
            x = leaf(input.to(dtype))
            losses = loss(x, target.to(dtype))
            results.append([losses.double(), *(g.double() for g in torch.autograd.grad(losses.sum(), x))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, **tolerances)


TARGETS = 0.0, 1.0, 0.25


@pytest.mark.parametrize("target", TARGETS)
def test_at_the_borders_of_probabilities(target):
    """Each logarithm is clamped at -100, the gradient's denominator at 1e-12, and small probabilities keep their precision."""
    input = torch.tensor([0.0, 1.0, 1e-45, 1e-30, 1e-10, 1e-4, 0.5, 1 - 2**-24, 0.3, float("nan")])
    loss = partial(FV.binary_cross_entropy, reduction="none")
    against_float64(loss, input, torch.full_like(input, target), rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pos_weight", [None, 0.0, 2.5])
def test_extreme_logits(pos_weight, target):
    inf = float("inf")
    input = torch.tensor([-inf, -1e30, -200.0, -90.0, -20.0, -1e-20, 0.0, 1e-20, 20.0, 90.0, 200.0, 1e30, inf, float("nan")])
    weight = None if pos_weight is None else torch.tensor(pos_weight)
    loss = partial(FV.binary_cross_entropy_with_logits, reduction="none", pos_weight=weight)
    against_float64(loss, input, torch.full_like(input, target), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_nan_in_nan_out(likelihood):
    case = Case(likelihood, (4, 300), "sample")
    input, target, *_, logvar = make_inputs(Source("cpu"), case)
    input[2, 150] = torch.nan
    assert evaluate(FV, case, input, target, None, None, logvar).isnan().tolist() == [False, False, True, False]
    for reduction in SCALAR_REDUCTIONS:
        x = leaf(input)
        loss = evaluate(FV, replace(case, reduction=reduction), x, target, None, None, logvar)
        loss.backward()
        assert loss.isnan()
        assert torch.equal(x.grad.isnan(), input.isnan())


def test_all_bytes_of_an_image():
    image = torch.arange(256, dtype=torch.uint8)
    losses = FV.mse_loss(torch.zeros(256), image, reduction="none")
    torch.testing.assert_close(losses.double(), (image.double() / 255) ** 2, rtol=2.5e-7, atol=0)
    assert losses[255] == 1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_deterministic(reduction):
    case = Case("gaussian", (3, 2500), reduction, logvar="scalar")
    input, target, *_, logvar = make_inputs(Source("cpu"), case)
    results = []
    for _ in range(2):
        leaves = leaf(input), leaf(logvar)
        loss = evaluate(FV, case, leaves[0], target, None, None, leaves[1])
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("programs", [8, 24, 320])
@pytest.mark.parametrize("reduction", ["sample", "sum"])
def test_any_number_of_programs(monkeypatch, programs, reduction):
    machine = _launch.Machine("interpreter", 2, programs)
    monkeypatch.setattr(_device, "machine", lambda device: machine)
    check("cpu", torch.float32, Case("gaussian", (3, 5000), reduction, logvar="scalar"))


RESCALES = [(1.0, 1.0), (1.0, 0.5), (4.0, 4.0), (4.0, -3.0), (2.0, 0.0), (1.0, float("nan"))]


@pytest.mark.parametrize(("expected", "incoming"), RESCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 700), (5, 1000)])
def test_rescale(expected, incoming, dtype, shape):
    grad = Source("cpu", dtype).normal(*shape)
    wanted = (grad.float() * (incoming / expected)).to(dtype)
    torch.ops.fastvae.reconstruction_rescale_.triton(grad, torch.tensor(incoming), expected)
    torch.testing.assert_close(grad, wanted, equal_nan=True)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_written_over_in_place(likelihood):
    check_written_over("cpu", "triton", likelihood)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rescale_in_any_layout(layout):
    grad = Source("cpu").normal(4, 3, 6, 5, layout=layout)
    if layout == "expanded":
        grad = grad.clone(memory_format=torch.preserve_format)
    wanted = grad * 2
    torch.ops.fastvae.reconstruction_rescale_.triton(grad, torch.tensor(2.0), 1.0)
    torch.testing.assert_close(grad, wanted)


def test_float64_is_refused():
    input, target = Source("cpu", torch.float64).normal(2, 3, 5)
    with pytest.raises(fastvae.BackendError, match=r"triton.*float64.*Backends that can: .*reference"):
        FV.mse_loss(input, target)
