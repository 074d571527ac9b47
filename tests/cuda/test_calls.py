"""The calls that test_on_cuda.py makes, on the CPU: that they run, are repeated bit by bit, and mean the same on every backend."""

import pytest
import torch
from _calls import CALLS, Call, calls_on, incoming_gradient

import fastvae
from fastvae.ops import OPERATORS

ON_CPU = pytest.mark.parametrize(("call", "place"), calls_on("cpu"), ids=str)


def test_every_operator_is_called():
    called = {operator for call in CALLS for operator in call.operators}
    # A backward pass on a GPU calls these where a gradient other than the expected one comes in.
    unexpected = {"reconstruction_rescale_", "reconstruction_backward_", "logistic_mixture_backward_"}
    # A backend may make jacobian_gram of these.
    inner = {"jacobian_gram_scale", "jacobian_gram_reduce"}
    assert called == set(OPERATORS) - unexpected - inner


@ON_CPU
def test_results_are_finite_and_repeated(call, place):
    tensors = call.tensors("cpu", 6)
    first, second = call.results(tensors), call.results(tensors)
    assert all(tensor.isfinite().all() for tensor in first.values())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name for name in first if name.startswith("gradient")} == {f"gradient of {name}" for name in call.leaves}


@ON_CPU
def test_results_are_those_of_the_reference(call, place):
    tensors = call.tensors("cpu", 6, seed=1)
    results = call.results(tensors)
    with fastvae.use_backend("reference"):
        expected = call.results(tensors)
    for name, tensor in expected.items():
        torch.testing.assert_close(results[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_other_seeds_give_other_tensors(call: Call):
    one, other = call.tensors("cpu", 6), call.tensors("cpu", 6, seed=1)
    assert all(not torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(tensor, call.tensors("cpu", 6)[name]) for name, tensor in one.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_incoming_gradients_differ_and_are_exact(dtype):
    gradient = incoming_gradient(torch.empty(3, 20, dtype=dtype))
    assert gradient.dtype == dtype
    assert gradient.flatten()[:16].tolist() == [(i - 7) / 8 for i in range(15)] + [-7 / 8]
    assert incoming_gradient(torch.empty((), dtype=dtype)) == 1
