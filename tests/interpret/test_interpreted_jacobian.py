"""The kernels of the contractive penalty and of the Gram form against float64, against the C++ backend and against the reference."""

import pytest
import test_jacobian
import torch
from _helpers import LAYOUTS, Place, Source, leaf, places
from test_jacobian import SCALAR_REDUCTIONS, Case, check, each_activation, hidden_values
from test_jacobian_encoders import mlp

import fastvae
from fastvae import functional as FV
from fastvae.kernels import _device, _launch, jacobian
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.jacobian import ACTIVATIONS

OTHER_BACKENDS = [place.backend for place in places("jacobian_forward") if place.backend != "triton"]
HERE = Place("cpu", "triton")
WANTED = (True, True), (True, False), (False, True)

# A program of the interpreter takes 1024 elements, of a sum over samples 128 columns of them; 16 programs run at the same time. Samples,
# units or inputs are beyond one program in turn, with few enough of the others that several programs share them.
SIZES = (1, 1, 1), (5, 7, 3), (300, 20, 5), (20, 130, 33), (3, 4, 2500), (2, 1500, 3)

CASES = [
    *(Case("sigmoid", *sizes, reduction=reduction) for sizes in SIZES for reduction in REDUCTIONS),
    *(Case(activation, 9, 20, 5, reduction=reduction) for activation in ACTIVATIONS for reduction in ("none", "sample", "mean")),
    *(Case("tanh", 9, 40, 33, reduction=reduction, layout=layout, grad_layout=layout)
      for layout in LAYOUTS for reduction in ("none", "sample", "sum")),
    *(Case("elu", 9, 40, 33, reduction=reduction, wanted=wanted, factor=factor)
      for reduction in ("none", "sample", "batchmean") for wanted in WANTED for factor in (1.0, -0.5)),
    *(Case("gelu", *sizes, reduction=reduction)
      for sizes in ((0, 20, 5), (5, 0, 7), (3, 33, 0), (0, 0, 0)) for reduction in ("none", "sample", "mean")),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check("cpu", torch.float32, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_matches_float64_in_16_bits(dtype, reduction):
    for case in (Case("sigmoid", 20, 130, 33), Case("silu", 3, 4, 4500), Case("softplus", 2, 2500, 3, layout="sliced")):
        check("cpu", dtype, Case(**{**vars(case), "reduction": reduction}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_hidden_values_and_a_float32_weight(dtype):
    test_jacobian.test_16_bit_hidden_values_and_a_float32_weight(HERE, dtype)


@each_activation
def test_far_from_zero(activation):
    test_jacobian.test_far_from_zero(HERE, activation)


@each_activation
@pytest.mark.parametrize("poisoned", ["hidden", "weight"])
def test_nan_in_nan_out(activation, poisoned):
    test_jacobian.test_nan_in_nan_out(HERE, activation, poisoned)


def operands(activation="sigmoid", batch=20, units=33, inputs=70):
    source = Source("cpu")
    return hidden_values(source, activation, batch, units), source.normal(units, inputs)


@pytest.mark.parametrize("backend", OTHER_BACKENDS)
@each_activation
def test_every_backend(backend, activation):
    for reduction in REDUCTIONS:
        results = []
        for name in ("triton", backend):
            with fastvae.use_backend(name):
                leaves = [leaf(t) for t in operands(activation)]
                penalty = FV.contractive_penalty(*leaves, activation, reduction)
                results.append((penalty, *torch.autograd.grad(3 * penalty.sum(), leaves)))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(float(b.detach().abs().max()), 1.0))


@pytest.mark.parametrize("sizes", [(20, 33, 70), (3, 4, 2500), (0, 5, 3), (5, 3, 0)], ids=str)
@pytest.mark.parametrize("reduction", SCALAR_REDUCTIONS)
@pytest.mark.parametrize("wanted", WANTED)
def test_either_pass_gives_the_gradients(sizes, reduction, wanted):
    """The forward pass for a gradient of ``grad_scale``, the backward pass for the one that comes in."""
    hidden, weight = operands("tanh", *sizes)
    numbers = ACTIVATIONS["tanh"].number, 0.0, REDUCTIONS[reduction]
    penalty, norms, *written = OPERATORS["jacobian_forward"].overloads["triton"](hidden, weight, *numbers, -0.25, *wanted)
    plain, plain_norms, *none = OPERATORS["jacobian_forward"].overloads["triton"](hidden, weight, *numbers, 1.0, False, False)
    grads = OPERATORS["jacobian_backward"].overloads["triton"](torch.tensor(-0.25), hidden, weight, norms, *numbers, *wanted)
    assert torch.equal(penalty, plain)
    assert torch.equal(norms, plain_norms)
    assert [t.shape for t in none] == [(0,), (0,)]
    for ours, theirs, like, asked in zip(written, grads, (hidden, weight), wanted, strict=True):
        assert ours.shape == theirs.shape == (like.shape if asked else (0,))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_what_is_launched(monkeypatch):
    """One pass over the weight, and one over the hidden values, in each direction; another of the latter where a forward pass writes their
    gradient, which takes the norms."""
    launched = []
    for name in ("units", "weight", "penalty"):
        kernel = getattr(jacobian, f"jacobian_{name}_kernel")
        run = kernel.run
        monkeypatch.setattr(kernel, "run", lambda *args, run=run, name=name, **kwargs: (launched.append(name), run(*args, **kwargs)))

    def launches(op, *arguments):
        launched.clear()
        OPERATORS[f"jacobian_{op}"].overloads["triton"](*arguments)
        return launched

    hidden, weight = operands()
    norms, numbers = weight.square().sum(1), (ACTIVATIONS["sigmoid"].number, 0.0)
    for name, number in REDUCTIONS.items():
        scalar = name in SCALAR_REDUCTIONS
        expected = ["units", "weight"] if scalar else ["weight", "penalty"]
        assert launches("forward", hidden, weight, *numbers, number, 1.0, False, False) == expected
        grad = {"none": hidden, "sample": hidden[:, 0]}.get(name, torch.tensor(1.0))
        for wanted, kernels in zip(WANTED, (["units", "weight"], ["units"], ["units", "weight"]), strict=True):
            assert launches("backward", grad, hidden, weight, norms, *numbers, number, *wanted) == kernels
            if scalar:
                assert launches("forward", hidden, weight, *numbers, number, 1.0, *wanted) == expected + ["units"] * wanted[0]


@pytest.mark.parametrize("layout", ["expanded", "permuted", "chunked"])
@pytest.mark.parametrize("reduction", ["none", "sample"])
def test_an_incoming_gradient_in_any_layout(layout, reduction):
    case = Case("sigmoid", 40, 20, 5, reduction=reduction, grad_layout=layout, factor=2.0)
    check("cpu", torch.float32, case)


GRAM_SHAPES = (5, 6, 7), (3, 64, 130), (1, 1, 1), (0, 3, 4), (9, 3, 1100), (40, 5, 7), (2, 40, 64)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", GRAM_SHAPES, ids=str)
def test_epilogues_of_the_gram_form(batched, shape):
    test_jacobian.test_epilogues_of_the_gram_form(HERE, batched, shape)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_norms_of_scaled_matrices(monkeypatch, batched, weighted):
    """In several chunks."""
    monkeypatch.setattr("fastvae.ops._gram_chunks.gram_elements", lambda device: 3 * 6 * 7)
    test_jacobian.check_norms(HERE, torch.float32, batched, weighted, (10, 6, 7))


def gram_operands(batched, shape):
    batch, rows, columns = shape
    source = Source("cpu")
    left = source.normal(*(shape if batched else shape[1:]), layout="sliced")
    return left, source.normal(batch, columns), source.normal(batch, rows, layout="permuted"), source.normal(batch * rows, columns)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("shape", GRAM_SHAPES, ids=str)
def test_epilogues_of_both_backends(batched, shape):
    left, inner, outer, product = gram_operands(batched, shape)
    for with_grad in (True, False):
        results = [
            OPERATORS["jacobian_gram_reduce"].overloads[name](left, inner, outer, product, with_grad) for name in ("triton", "reference")
        ]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    results = [OPERATORS["jacobian_gram_scale"].overloads[name](left, inner, outer) for name in ("triton", "reference")]
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@pytest.mark.parametrize("reduction", ["batchmean", "sample"])
@pytest.mark.parametrize("sizes", [(20, 8, 5), (16, 9, 7, 5)], ids=str)
def test_gram_form_of_an_encoder(sizes, reduction):
    """Float32 kernels against the reference in float64."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        with fastvae.use_backend(backend):
            encoder, x = mlp(sizes).to(dtype), Source("cpu").normal(11, sizes[0]).to(dtype)
            norms = FV.jacobian_frobenius(encoder, x, method="gram", reduction=reduction)
            grads = torch.autograd.grad(3 * norms.sum(), list(encoder.parameters()), allow_unused=True, materialize_grads=True)
            results.append([t.double() for t in (norms, *grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sizes", [(300, 20, 5), (3, 4, 2500)], ids=str)
def test_deterministic(reduction, sizes):
    results = []
    for _ in range(2):
        leaves = [leaf(t) for t in operands("sigmoid", *sizes)]
        penalty = FV.contractive_penalty(*leaves, reduction=reduction)
        results.append((penalty, *torch.autograd.grad(penalty.sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("programs", [8, 24, 320])
@pytest.mark.parametrize("sizes", [(300, 20, 5), (3, 4, 2500), (2, 1500, 3)], ids=str)
@pytest.mark.parametrize("reduction", ["sample", "sum"])
def test_any_number_of_programs(monkeypatch, programs, sizes, reduction):
    machine = _launch.Machine("interpreter", 2, programs)
    monkeypatch.setattr(_device, "machine", lambda device: machine)
    check("cpu", torch.float32, Case("sigmoid", *sizes, reduction=reduction))


@pytest.mark.parametrize("programs", [8, 320])
@pytest.mark.parametrize("batched", [False, True])
def test_epilogues_by_any_number_of_programs(monkeypatch, programs, batched):
    machine = _launch.Machine("interpreter", 2, programs)
    monkeypatch.setattr(_device, "machine", lambda device: machine)
    for shape in ((9, 3, 1100), (40, 5, 7)):
        test_jacobian.test_epilogues_of_the_gram_form(HERE, batched, shape)


def test_float64_is_refused():
    hidden, weight = (t.double() for t in operands())
    with pytest.raises(fastvae.BackendError, match=r"triton.*float64.*Backends that can: .*reference"):
        FV.contractive_penalty(hidden, weight)
