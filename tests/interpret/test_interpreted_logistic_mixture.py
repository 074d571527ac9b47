"""The logistic mixture kernel in the interpreter against float64 and against the C++ backend."""

import pytest
import torch
from _helpers import Source, leaf, places
from test_logistic_mixture import Case, check, check_written_over, make_inputs

import fastvae
from fastvae import functional as FV
from fastvae.kernels import _launch
from fastvae.ops._results import REDUCTIONS

OTHER_BACKENDS = [place.backend for place in places("logistic_mixture_forward") if place.backend != "triton"]

# A program of the interpreter takes 128 positions at a time, and 16 programs share a tensor.
CASES = [
    *(Case(2, 3, 2, (3, 5), reduction) for reduction in REDUCTIONS),
    *(Case(1, 1, 3, (150,), reduction) for reduction in ("none", "sample", "mean")),
    Case(2, 1, 1, (2100,), "sum"),
    Case(1, 9, 2, (), "sample"),
    *(Case(2, 2, target_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)),
    Case(2, 2, reduction="none", layout="channels_last", grad_layout="expanded"),
    *(Case(2, 1, batch, spatial, "sample") for batch, spatial in ((0, (4,)), (3, (0,)))),
    *(Case(1, 2, grad_scale=2.0, incoming=incoming) for incoming in (2.0, 0.5)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check("cpu", torch.float32, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_matches_float64_in_16_bits(dtype, reduction):
    check("cpu", dtype, Case(2, 3, reduction=reduction))


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_every_backend(backend):
    input, target = make_inputs(Source("cpu"), Case(2, 3))
    results = []
    for name in ("triton", backend):
        with fastvae.use_backend(name):
            x = leaf(input)
            loss = FV.logistic_mixture_nll(x, target, 2)
            results.append((loss, *torch.autograd.grad(3 * loss, x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_gradient_written_over_in_place():
    check_written_over("cpu", "triton")


def test_log_scales_beyond_every_limit():
    x = torch.tensor([[[0.5] * 5, [-1e4, -8.0, 60.0, 100.0, 1e4]]])
    image = torch.tensor([[[0, 255, 7, 128, 254]]], dtype=torch.uint8)
    expected = []
    for backend in ("triton", "reference"):
        with fastvae.use_backend(backend):
            expected.append(FV.logistic_mixture_nll(x, image, 1, "none"))
    torch.testing.assert_close(*expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "groups", "splits"), [(1, 1, 1, 1), (1, 129, 1, 2), (1, 10**7, 1, 1056), (32, 1024, 32, 8), (5000, 300, 5000, 1)]
)
def test_programs_of_positions(rows, columns, groups, splits):
    """A thread has one position at a time; rows are split among programs as long as some would be idle."""
    config = _launch.positions(rows, columns, _launch.Machine("sm_90", 132))
    assert (config.groups, config.splits, config.columns) == (groups, splits, 128)
