"""The logistic mixture kernel, emulated, against float64: values, gradients, sums in several splits."""

import itertools

import pytest
import torch
from test_logistic_mixture import Case, check, check_written_over

import fastvae
from fastvae import functional as FV
from fastvae.ops._results import REDUCTIONS

pytestmark = pytest.mark.usefixtures("forced")


@pytest.fixture
def forced():
    with fastvae.use_backend("cuda"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_matches_float64(dtype, reduction):
    for (mixtures, channels), spatial in itertools.product(((1, 1), (3, 3)), ((), (3, 5), (300,))):
        check("cpu", dtype, Case(mixtures, channels, spatial=spatial, reduction=reduction))


def test_many_channels():
    check("cpu", torch.float32, Case(2, 9, reduction="sample"))


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_floating_targets(target_dtype):
    check("cpu", torch.float32, Case(target_dtype=target_dtype))


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "offset", "expanded"])
def test_layouts(layout):
    for reduction in ("none", "sample", "mean"):
        check("cpu", torch.float32, Case(2, 3, reduction=reduction, layout=layout, grad_layout=layout))


def test_a_gradient_written_over_in_place():
    check_written_over("cpu", "cuda")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(reduction):
    for batch, spatial in ((0, (4,)), (3, (0,))):
        check("cpu", torch.float32, Case(2, 1, batch, spatial, reduction))


@pytest.mark.parametrize("reduction", ["sample", "mean"])
def test_sums_are_the_same_in_whatever_order_blocks_run(emulated, reduction):
    """Also while a graph is captured, with a workspace of its own."""
    x = torch.randn(3, 2, 1500, generator=torch.Generator().manual_seed(0))
    target = torch.randint(256, (3, 1, 1500), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    results = [FV.logistic_mixture_nll(x, target, 1, reduction) for _ in range(3)]
    emulated.set_capturing(1)
    results.append(FV.logistic_mixture_nll(x, target, 1, reduction))
    emulated.set_capturing(0)
    assert all(torch.equal(result, results[0]) for result in results)
    with fastvae.use_backend("reference"):
        torch.testing.assert_close(results[0], FV.logistic_mixture_nll(x, target, 1, reduction))
