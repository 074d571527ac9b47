"""The CUDA kernels of the contractive penalty and of the Gram form, emulated: what tests/test_jacobian.py asks of every backend."""

from dataclasses import replace

import pytest
import test_jacobian as contract
import torch
from _helpers import LAYOUTS, Place, Source
from test_jacobian import Case, check, each_activation
from test_jacobian_encoders import mlp

import fastvae
from fastvae import functional as FV
from fastvae.functional import _chain
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMULATED = Place("cpu", "cuda")

# With this argument the backend is forced.
pytestmark = pytest.mark.parametrize("place", [EMULATED], ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@each_dtype
@each_activation
def test_every_activation_and_reduction(place, dtype, activation):
    for reduction in REDUCTIONS:
        case = Case(activation, 9, 70, 33, reduction=reduction)
        check(place.device, dtype, case)
        check(place.device, dtype, replace(case, layout="sliced", grad_layout="expanded", factor=3.0))


# Below a vector; rows of the weight shorter than a step, as long as several, across chunks; more samples than a block of a column takes.
SIZES = [(1, 1, 1), (63, 41, 401), (1, 1023, 17), (130, 64, 512), (300, 33, 7), (2, 20, 5000), (70, 512, 1), (3, 1, 2049)]
EMPTY = [(0, 20, 5), (5, 0, 7), (3, 33, 0), (0, 0, 0)]


@each_dtype
@pytest.mark.parametrize("sizes", SIZES + EMPTY, ids=str)
def test_sizes(place, dtype, sizes):
    for reduction in ("none", "sample", "mean"):
        check(place.device, dtype, Case("sigmoid", *sizes, reduction=reduction))


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_alignments(place, dtype, layout):
    for reduction in ("none", "sample", "sum"):
        for units in (24, 21):
            check(place.device, dtype, Case("tanh", 7, units, 36, reduction, layout=layout, grad_layout=layout, factor=-0.5))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_wanted_gradients(place, wanted, reduction):
    check(place.device, torch.float32, Case("elu", 20, 33, 12, reduction, wanted=wanted))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_hidden_values_and_a_float32_weight(place, dtype):
    contract.test_16_bit_hidden_values_and_a_float32_weight(place, dtype)


@each_activation
def test_far_from_zero_and_nan(place, activation):
    contract.test_far_from_zero(place, activation)
    for poisoned in ("hidden", "weight"):
        contract.test_nan_in_nan_out(place, activation, poisoned)


@pytest.mark.parametrize("incoming", [1.0, 0.5])
def test_whatever_comes_in(place, incoming):
    contract.test_the_result_is_right_whatever_comes_in(place, incoming, -3.0)
    contract.test_a_retained_graph_gives_the_same_gradient_again(place, incoming)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 6, 7), (3, 64, 130), (1, 1, 1), (0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 64), (40, 9, 64), (1, 5, 5000)], ids=str
)
def test_epilogues_of_the_gram_form(place, batched, shape):
    contract.test_epilogues_of_the_gram_form(place, batched, shape)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_norms_of_scaled_matrices(place, monkeypatch, batched, weighted):
    """In several chunks."""
    monkeypatch.setattr("fastvae.ops._gram_chunks.gram_elements", lambda device: 3 * 6 * 70)
    contract.check_norms(place, torch.float32, batched, weighted, (10, 6, 70))


def test_epilogues_of_operands_that_are_not_aligned(place):
    def shifted(*shape, seed):
        source = Source(place.device, seed=seed)
        return source.normal(*shape, layout="offset")

    tensors = shifted(6, 8, seed=0), shifted(5, 8, seed=1), shifted(5, 6, seed=2), shifted(30, 8, seed=3)
    for op, arguments in (("scale", tensors[:3]), ("reduce", (*tensors, True))):
        aligned = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]
        actual, expected = (OPERATORS[f"jacobian_gram_{op}"].overloads[place.backend](*t) for t in (arguments, aligned))
        for a, b in zip(actual, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("sizes", [(20, 8, 5), (9, 7, 8, 5)], ids=str)
def test_the_norm_of_an_mlp(place, sizes, monkeypatch):
    """Several chunks of samples, and a shared left matrix."""
    monkeypatch.setattr("fastvae.ops._gram_chunks.gram_elements", lambda device: 3 * 5 * 8)
    monkeypatch.setattr(_chain, "plan", lambda *_: _chain.Plan(1, 1, 0))
    encoder, x = mlp(sizes), Source(place.device).normal(11, sizes[0])
    results = []
    for backend in (place.backend, "reference"):
        with fastvae.use_backend(backend):
            norm = FV.jacobian_frobenius(encoder, x, method="gram")
            results.append([norm, *torch.autograd.grad(norm, [p for p in encoder.parameters() if p.ndim == 2])])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_rows_over_chunks_of_several_steps(place):
    source = Source(place.device)
    weight, hidden = source.normal(3, 1_450_000), source.uniform(1, 3)
    penalty, norms, *_ = OPERATORS["jacobian_forward"].overloads[place.backend](
        hidden, weight, 1, 0.0, REDUCTIONS["sum"], 1.0, False, False
    )
    exact, slopes = weight.double().square().sum(1), (hidden * (1 - hidden)).double().square()
    torch.testing.assert_close(norms.double(), exact, rtol=2e-6, atol=0)
    torch.testing.assert_close(penalty.double(), (slopes @ exact).squeeze(0), rtol=2e-6, atol=0)


def test_sums_are_the_same_in_whatever_order_blocks_run(place, emulated):
    """Also while a graph is captured, with a workspace of its own."""
    results = [contract.run_once(place) for _ in range(2)]
    emulated.set_capturing(1)
    results.append(contract.run_once(place))
    emulated.set_capturing(0)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
