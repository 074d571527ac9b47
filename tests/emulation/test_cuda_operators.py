"""Every CUDA operator and option, emulated, against the reference: values and gradients."""

import itertools

import pytest
import torch
from _calls import ENTROPIES
from test_latent import check_a_kl_is_never_negative, check_near_the_prior
from test_reconstruction import check_written_over

import fastvae
from fastvae import _backend
from fastvae import functional as FV
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS
from fastvae.ops.reconstruction import LIKELIHOODS

TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
# Rows shorter than a vector, of a vector's odd multiple, longer than a block's step; tensors below a noise tile and across several.
SHAPES = ((128, 20), (7, 33), (3, 5000), (2, 700), (1, 40), (300, 7), (5,), (), (4, 3, 8, 8), (64, 784))


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(backend, function, inputs):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    with fastvae.use_backend(backend):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((o.float() * random(*o.shape, seed=9)).sum() for o in outputs)
        return *outputs, *torch.autograd.grad(loss, leaves)


def assert_same(function, *inputs):
    tolerance = TOLERANCES[inputs[0].dtype]
    for actual, expected in zip(run("cuda", function, inputs), run("reference", function, inputs), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance, equal_nan=True)


def test_the_emulated_backend_has_every_operator():
    # The entropies of binary codes are torch's products.
    assert {op for op in OPERATORS if "cuda" not in _backend._served[op, "cpu"]} == {*ENTROPIES}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sampling_and_kl(shape, reduction):
    mu, logvar = random(*shape), random(*shape, seed=1)
    assert_same(lambda m, v: FV.reparameterize_kl(m, v, seed=5, reduction=reduction), mu, logvar)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("free_bits", [0.0, 0.3])
def test_learned_prior_clamp_and_free_bits(dtype, free_bits):
    for shape in ((7, 33), (130, 20), (3, 2500)):
        inputs = [random(*shape, dtype=dtype, seed=i) for i in range(4)]
        for reduction in ("none", "sample", "batchmean"):
            options = {"reduction": reduction, "free_bits": free_bits, "logvar_clamp": (-0.75, 0.75)}
            assert_same(lambda m, v, p, q, o=options: FV.reparameterize_kl(m, v, p, q, seed=3, **o), *inputs)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_near_the_prior_the_kl_is_as_accurate_as_its_dtype(dtype):
    with fastvae.use_backend("cuda"):
        check_near_the_prior("cpu", dtype)


def test_a_kl_is_never_negative():
    with fastvae.use_backend("cuda"):
        check_a_kl_is_never_negative("cpu")


@pytest.mark.parametrize("samples", [1, 2, 3, 9, 50])
@pytest.mark.parametrize("shape", [(128, 20), (7, 33), (2, 512), (1, 3)], ids=str)
@pytest.mark.parametrize("given_eps", [False, True])
def test_several_samples(samples, shape, given_eps):
    mu, logvar = random(*shape), random(*shape, seed=1)
    noise = {"eps": random(samples, *shape, seed=2)} if given_eps else {"seed": 11}
    assert_same(lambda m, v: FV.reparameterize_kl(m, v, num_samples=samples, reduction="sample", **noise), mu, logvar)


@pytest.mark.parametrize("width", [20, 33, 512])
def test_halves_of_one_tensor_and_an_expanded_prior(width):
    both, prior = random(40, 2 * width), random(1, width, seed=1)
    assert_same(lambda h, p: FV.reparameterize_kl(*h.chunk(2, 1), p, p, seed=1), both, prior)


def test_memory_that_is_not_aligned():
    flat = random(2 * 4000 + 1)

    def shifted(t):
        mu, logvar = t[1:4001].view(40, 100), t[4001:].view(40, 100)
        return (*FV.reparameterize_kl(mu, logvar, seed=1), FV.mse_loss(mu, logvar.detach()))

    assert_same(shifted, flat)


def test_noise_is_kept_where_it_is_asked_for():
    arguments = (random(40, 33), random(40, 33, seed=1), None, None, None, torch.tensor(4), 3, True, 2, 0.0, -30.0, 20.0, True)
    actual, expected = (OPERATORS["latent_forward"].overloads[backend](*arguments)[3] for backend in ("cuda", "reference"))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


LOSSES = {
    "bce_with_logits": FV.binary_cross_entropy_with_logits,
    "bce": lambda x, *a, **k: FV.binary_cross_entropy(x.sigmoid(), *a, **k),
    "mse": FV.mse_loss,
    "gaussian": lambda x, t, **k: FV.gaussian_nll(x, t, 0.5, **k),
}


# The proofs have the pairs of a 16-bit input and a target of another dtype.
PAIRS = [
    pytest.param(dtype, target, marks=pytest.mark.prove if dtype is not torch.float32 and target != "same" else ())
    for dtype in TOLERANCES
    for target in ("same", "float32", "uint8")
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("dtype", "target"), PAIRS, ids=str)
def test_losses(loss, dtype, target):
    for shape, reduction in itertools.product(((7, 33), (3, 5000), (5,), (4, 3, 8, 8), (64, 784)), REDUCTIONS):
        t = random(*shape, seed=1).sigmoid()
        t = (t * 255).to(torch.uint8) if target == "uint8" else t.to(dtype if target == "same" else torch.float32)
        assert_same(lambda x, t=t, r=reduction: LOSSES[loss](x, t, reduction=r), random(*shape, dtype=dtype))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shared", [(6, 5, 9, 11), (5, 1, 1), (6, 1, 1, 1), (9, 11), (1,)], ids=str)
def test_weights(weight_dtype, shared):
    x, t, w = random(6, 5, 9, 11), random(6, 5, 9, 11, seed=1).sigmoid(), random(*shared, seed=2).abs().to(weight_dtype)
    for reduction in ("none", "sample", "mean"):
        assert_same(lambda x, r=reduction: FV.binary_cross_entropy_with_logits(x, t, w, r, pos_weight=w + 0.5), x)


@pytest.mark.parametrize("shared", [(6, 5, 9, 11), (11,), (5, 1, 1), (6, 1, 1, 1), (9, 11), (1,), ()], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_learned_log_variance(shared, reduction):
    x, t, logvar = random(6, 5, 9, 11), random(6, 5, 9, 11, seed=1), random(*shared, seed=2)
    assert_same(lambda x, v: FV.gaussian_nll(x, t, v, reduction=reduction), x, logvar)


def test_gradient_of_the_target():
    assert_same(lambda x, t: FV.binary_cross_entropy_with_logits(x, t.sigmoid(), reduction="sample"), random(9, 70), random(9, 70, seed=1))


@pytest.mark.parametrize("incoming", [1.0, 0.0, 3.0])
def test_rescaling(incoming):
    grad, number = random(4099), torch.tensor(incoming)
    for expected in (1.0, 2.0):
        rescaled = grad.clone()
        OPERATORS["reconstruction_rescale_"].overloads["cuda"](rescaled, number, expected)
        torch.testing.assert_close(rescaled, grad * (number / expected))


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_gradients_written_over_in_place(likelihood):
    check_written_over("cpu", "cuda", likelihood)


@pytest.mark.parametrize("shape", [(3, 2_100_000), (9000, 500)], ids=str)
def test_rows_over_chunks_of_several_steps(shape):
    x = random(*shape)
    with fastvae.use_backend("cuda"):
        actual = FV.mse_loss(x, torch.zeros_like(x), reduction="sample")
    torch.testing.assert_close(actual, x.double().square().sum(1).float(), rtol=2e-6, atol=0)


@pytest.mark.parametrize("reduction", ["sample", "mean"])
def test_sums_are_the_same_in_whatever_order_blocks_run(emulated, reduction):
    """Also while a graph is captured, with a workspace of its own."""
    x, zeros = random(33, 3001), torch.zeros(33, 3001)
    with fastvae.use_backend("cuda"):
        results = [FV.mse_loss(x, zeros, reduction=reduction) for _ in range(3)]
        emulated.set_capturing(1)
        results.append(FV.mse_loss(x, zeros, reduction=reduction))
        emulated.set_capturing(0)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)], ids=str)
def test_empty_tensors(shape):
    x = torch.zeros(shape)
    with fastvae.use_backend("cuda"):
        for reduction in REDUCTIONS:
            z, kl = FV.reparameterize_kl(x, x, reduction=reduction, free_bits=0.1)
            loss = FV.mse_loss(x, x, reduction=reduction)
            assert z.shape == x.shape
            assert kl.sum() == 0
            assert loss.sum() == 0


def test_nan_and_infinities_pass_through():
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 100.0, -100.0] * 20)
    assert_same(lambda m, v: FV.reparameterize_kl(m, v, seed=1, reduction="none"), special, special.flip(0))
    assert_same(lambda x: FV.binary_cross_entropy_with_logits(x, torch.full_like(x, 0.25), reduction="none"), special)
