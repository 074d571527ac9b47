"""The reference by its public names: the functions of fastvae.functional, with their arguments and results, and with every derivative."""

import inspect

import pytest
import torch
from torch import nn

from fastvae import functional as FV
from fastvae import reference
from fastvae.functional.codebook import GRADIENTS

FUNCTIONS = [name for name in FV.__all__ if not inspect.isclass(getattr(FV, name))]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def uniform(*shape: int) -> torch.Tensor:
    return torch.sigmoid(normal(*shape)).detach().requires_grad_()


class Encoder(nn.Module):
    """A small MLP without weights of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 3, device="meta"), nn.Tanh(), nn.Linear(3, 2, device="meta"), nn.Sigmoid())

    def forward(self, x, **options):
        return reference.jacobian_frobenius(self.layers, x, **options)


def penalised(**options):
    """The norm as a function of the batch and of the weights, which ``functional_call`` hands to the module."""

    def function(x, *weights):
        names = ("layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias")
        generator = torch.Generator().manual_seed(3)
        return torch.func.functional_call(Encoder(), dict(zip(names, weights, strict=True)), (x,), {"generator": generator, **options})

    return function


POSTERIOR = (normal(3, 2), normal(3, 2) * 0.5, normal(2), normal(2) * 0.5)
IMAGES = (normal(3, 2, 2), uniform(3, 2, 2))
LAYERS = (normal(2, 4), normal(3, 4), normal(3), normal(2, 3), normal(2))

# A function of tensors for each public name, and the tensors, with respect to all of which it is differentiated twice.
DIFFERENTIATED = {
    "reparameterize": (lambda *t: reference.reparameterize(*t, num_samples=2, seed=5), POSTERIOR[:2]),
    "kl_normal": (lambda *t: reference.kl_normal(*t, reduction="none"), POSTERIOR),
    "kl_normal with free bits": (lambda *t: reference.kl_normal(*t, free_bits=0.1), POSTERIOR),
    "reparameterize_kl": (lambda *t: reference.reparameterize_kl(*t, seed=5), POSTERIOR),
    "binary_cross_entropy_with_logits": (
        lambda x, t, w, p: reference.binary_cross_entropy_with_logits(x, t, w, "sample", p), (*IMAGES, uniform(2), uniform(2, 2))
    ),
    "binary_cross_entropy": (lambda x, t, w: reference.binary_cross_entropy(x, t, w), (uniform(3, 4), uniform(3, 4), uniform(4))),
    "mse_loss": (lambda *t: reference.mse_loss(*t, "batchmean"), IMAGES),
    "gaussian_nll": (reference.gaussian_nll, (*IMAGES, normal(2, 1))),
    "logistic_mixture_nll": (
        lambda x: reference.logistic_mixture_nll(x, torch.tensor([[[0, 100, 255]] * 2] * 2, dtype=torch.uint8), 2), (normal(2, 12, 3),)
    ),
    "elbo_loss": (lambda *t: reference.elbo_loss(*t, beta=2.0, capacity=0.3), (*IMAGES, *POSTERIOR[:2])),
    "vae_loss": (reference.vae_loss, (uniform(3, 4), uniform(3, 4), *POSTERIOR[:2])),
    "vector_quantize, vectors": (lambda x: reference.vector_quantize(x, normal(5, 2).detach())[::2], (normal(7, 2),)),
    "vector_quantize, codes": (lambda c: reference.vector_quantize(normal(7, 2).detach(), c).loss, (normal(5, 2),)),
    "residual_quantize, vectors": (
        lambda x: reference.residual_quantize(x, normal(3, 5, 2).detach(), mask=torch.arange(7) > 0)[::2], (normal(7, 2),)
    ),
    "residual_quantize, codes": (
        lambda c: reference.residual_quantize(normal(7, 2).detach(), c, codebook_cost=0.5).losses, (normal(1, 5, 2),)
    ),
    "binary_code_entropy": (lambda x: reference.binary_code_entropy(x, 0.5, mask=torch.tensor([True, True, False])), (normal(3, 4),)),
    "contractive_penalty": (lambda *t: reference.contractive_penalty(*t, "tanh", "sample"), (uniform(3, 4), normal(4, 2))),
    "contractive_penalty of gelu": (lambda *t: reference.contractive_penalty(*t, "gelu"), (normal(3, 4), normal(4, 2))),
    "jacobian_frobenius": (penalised(), LAYERS),
    "jacobian_frobenius by projection": (penalised(method="projection", num_projections=2, chunk_size=1), LAYERS),
    "group_norm_silu": (lambda x, w, b: reference.group_norm_silu(x, 2, w, b), (normal(2, 4, 3), normal(4), normal(4))),
    "rms_norm_silu": (lambda x, *parameters: reference.rms_norm_silu(x, *parameters), (normal(2, 4, 3), normal(4), normal(4))),
    "rms_norm_silu, modulated": (
        lambda x, s, t: reference.rms_norm_silu(x, eps=0.5, eps_mode="clamp", scale=s, shift=t),
        (normal(2, 4, 3), normal(2, 4), normal(2, 4)),
    ),
    "snake": (reference.snake, (normal(2, 4, 3), uniform(4), uniform(4))),
    "norm_act_conv": (
        lambda x, *parameters: reference.norm_act_conv(x, 2, *parameters, padding=1),
        (normal(2, 4, 3), normal(4), normal(4), normal(2, 4, 3), normal(2)),
    ),
}  # fmt: skip
NOT_DIFFERENTIABLE = {"vq_nearest", "codebook_ema_update_", "explain_jacobian_method"}


def test_the_reference_has_the_public_names():
    assert reference.__all__ == FV.__all__
    assert all(getattr(reference, name) is getattr(FV, name) for name in set(FV.__all__) - set(FUNCTIONS))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_of_the_reference_has_the_signature(name):
    assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(FV, name))


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_a_function_of_the_reference_is_differentiable_twice(name):
    function, tensors = DIFFERENTIATED[name]
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(function, leaves)


def test_every_function_with_a_derivative_is_among_them():
    assert {name.split(" ")[0].strip(",") for name in DIFFERENTIATED} | NOT_DIFFERENTIABLE == set(FUNCTIONS)


def test_a_third_derivative():
    x, target = uniform(4), uniform(4).detach()
    value = reference.binary_cross_entropy_with_logits(x, target, reduction="sum")
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    s = torch.sigmoid(x)
    torch.testing.assert_close(value, s * (1 - s) * (1 - 2 * s))


NOISE = {
    "int": {"seed": 5},
    "tensor": {"seed": torch.tensor(5)},
    "generator": {"generator": 11},
    "eps": {"eps": normal(2, 3, 2).detach()},
    "global": {},
}


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise_is_that_of_the_functional(noise):
    torch.manual_seed(0)
    results = []
    for module in (FV, reference):
        torch.manual_seed(1)
        source = {"generator": torch.Generator().manual_seed(11)} if "generator" in noise else noise
        results.append(module.reparameterize_kl(*POSTERIOR, num_samples=2, **source))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
@pytest.mark.parametrize("likelihood", ["bernoulli_logits", "bernoulli", "gaussian"])
def test_the_bound_is_that_of_the_functional(likelihood, reduction):
    arguments = (uniform(3, 4), uniform(3, 4).detach(), *POSTERIOR[:2])
    options = {"likelihood": likelihood, "reduction": reduction, "beta": 3.0, "capacity": 0.5, "free_bits": 0.1}
    for ours, theirs in zip(reference.elbo_loss(*arguments, **options), FV.elbo_loss(*arguments, **options), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_tutorials_loss_is_that_of_the_functional():
    arguments = uniform(3, 4), uniform(3, 4), *POSTERIOR[:2]
    torch.testing.assert_close(reference.vae_loss(*arguments), FV.vae_loss(*arguments))


ENCODERS = {
    "one layer": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sigmoid()),
    "MLP": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "numbers": lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0)),
}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2, "with_output": True}, {"reduction": "sample"}], ids=str)
def test_the_norm_is_that_of_the_functional(name, options):
    torch.manual_seed(0)
    encoder, x = ENCODERS[name]().double(), normal(5, 2, 2).detach()
    method = "autograd" if name == "numbers" else "auto"
    expected = FV.jacobian_frobenius(encoder, x, method=method, **options)
    torch.testing.assert_close(reference.jacobian_frobenius(encoder, x, **options), expected)
    assert reference.explain_jacobian_method(encoder, x).method == "autograd"
    with torch.no_grad():
        torch.testing.assert_close(reference.jacobian_frobenius(encoder, x, **options), expected)


def test_projections_are_those_of_the_functional():
    torch.manual_seed(0)
    encoder, x = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.SiLU()).double(), normal(5, 1, 3, 3).detach()
    assert reference.explain_jacobian_method(encoder, x).method == "projection"
    norms = [
        module.jacobian_frobenius(encoder, x, method=method, num_projections=3, generator=torch.Generator().manual_seed(2))
        for module, method in ((FV, "projection"), (reference, "projection"), (reference, "auto"))
    ]
    torch.testing.assert_close(norms[1], norms[0])
    torch.testing.assert_close(norms[2], norms[0])


def test_an_empty_batch_has_no_norm():
    encoder = nn.Linear(4, 3)
    for method in ("auto", "projection"):
        assert reference.jacobian_frobenius(encoder, torch.zeros(0, 4), method=method) == 0
        assert reference.jacobian_frobenius(encoder, torch.zeros(0, 4), method=method, reduction="sample").shape == (0,)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_quantization_is_that_of_the_functional(heads, gradient):
    lead = () if heads is None else (heads,)
    x, codebook = normal(*lead, 6, 5, 3).detach(), normal(*lead, 7, 3).detach()
    for ours, theirs in zip(
        reference.vector_quantize(x, codebook, gradient=gradient, reduction="none"),
        FV.vector_quantize(x, codebook, gradient=gradient, reduction="none"),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    ours, theirs = (module.vq_nearest(x, codebook, return_distance=True) for module in (reference, FV))
    torch.testing.assert_close(ours, theirs)
    states = []
    for module in (reference, FV):
        state = codebook.clone(), torch.ones(codebook.shape[:-1], dtype=torch.float64), codebook.clone()
        states.append((module.codebook_ema_update_(*state, x, ours[0]), *state))
    torch.testing.assert_close(*states)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reference.mse_loss(*IMAGES, "average"), "reduction: got 'average', takes one of 'none', 'sample', 'batchmean'"),
        (lambda: reference.elbo_loss(*IMAGES, *POSTERIOR[:2], reduction="mean"), "reduction: got 'mean', takes one of 'batchmean'"),
        (lambda: reference.elbo_loss(*IMAGES, *POSTERIOR[:2], likelihood="poisson"), "likelihood: got 'poisson', takes one of"),
        (lambda: reference.vector_quantize(normal(3, 2), normal(4, 2), gradient="none"), "gradient: got 'none', takes one of"),
        (lambda: reference.jacobian_frobenius(nn.Identity(), normal(3, 2), method="exact"), "method: got 'exact', takes one of"),
        (lambda: reference.contractive_penalty(normal(3, 2), normal(2, 4), "step"), "activation: got 'step', takes one of"),
        (lambda: reference.group_norm_silu(normal(3, 2), 1, activation="tanh"), "activation: got 'tanh', takes one of"),
        (lambda: reference.binary_cross_entropy(IMAGES[0], IMAGES[1], validate=True), r"input: got values outside \[0, 1\]"),
        (lambda: reference.vq_nearest(normal(3, 2), normal(4, 2) * torch.nan), "codebook: got NaN or infinite values"),
    ],
)  # fmt: skip
def test_an_option_that_does_not_exist_is_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
