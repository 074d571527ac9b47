"""Forward-mode differentiation: directional derivatives, Jacobians of many outputs, Hessians."""

import pytest
import torch
from _helpers import Source, brief, leaf
from torch import nn
from torch.autograd import forward_ad

import fastvae
from fastvae import functional as FV
from fastvae.reference import reconstruction

UPPER = Source("cpu", torch.float64, seed=7).normal(3, 4)
LOWER = Source("cpu", torch.float64, seed=8).normal(4, 5)
EPS = Source("cpu", torch.float64, seed=9).normal(6, 4)


ENCODER = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double().requires_grad_(False)
ENCODER.load_state_dict({"0.weight": LOWER, "0.bias": LOWER[:, 0], "2.weight": UPPER, "2.bias": UPPER[:, 0]})


# Functions of one float64 tensor (6, 4) that is in (0, 1).
FUNCTIONS = {
    "BCE from logits": lambda x: FV.binary_cross_entropy_with_logits(x, EPS.sigmoid(), pos_weight=EPS.exp(), reduction="none"),
    "BCE": lambda x: FV.binary_cross_entropy(x, torch.full_like(x, 0.3), reduction="sample"),
    "MSE": lambda x: FV.mse_loss(x, torch.full_like(x, 0.3)),
    "Gaussian": lambda x: FV.gaussian_nll(x, torch.full_like(x, 0.3), x),
    "mixture of logistics": lambda x: FV.logistic_mixture_nll(x.reshape(2, 6, 2), torch.full((2, 1, 2), 0.3), 2, "sample"),
    "ELBO": lambda x: FV.elbo_loss(x, torch.full_like(x, 0.3), x, x, free_bits=0.2).loss,
    "sample": lambda x: FV.reparameterize(x, x, seed=3),
    "samples of given noise": lambda x: FV.reparameterize(x, x, eps=EPS.expand(2, 6, 4), num_samples=2),
    "KL": lambda x: FV.kl_normal(x, x - 0.5, reduction="none"),
    "KL, prior": lambda x: FV.kl_normal(x, x, 2 * x, x.flip(0), reduction="sample"),
    "sample and KL": lambda x: FV.reparameterize_kl(x, x, eps=EPS),
    "GroupNorm": lambda x: FV.group_norm_silu(x.view(3, 4, 2), 2, x[0], x[1]),
    "RMS norm": lambda x: FV.rms_norm_silu(x.view(3, 4, 2), x[0], x[1]),
    "snake": lambda x: FV.snake(x, x[0].detach().abs() + 0.5),
    "entropies of binary codes": lambda x: FV.binary_code_entropy(x, 0.7),
    "GroupNorm, channels last": lambda x: FV.group_norm_silu(x.view(3, 2, 4).movedim(1, 2), 2, activation="none"),
    "vector quantization": lambda x: FV.vector_quantize(x, UPPER)[::2],
    "vector quantization, rotation": lambda x: FV.vector_quantize(x, UPPER, gradient="rotation", reduction="sample")[::2],
    "residual vector quantization": lambda x: FV.residual_quantize(x, torch.stack([UPPER, 0.1 * UPPER]))[::2],
    "contractive penalty": lambda x: FV.contractive_penalty(x, UPPER.T, reduction="none"),
    "Gram form": lambda x: FV.jacobian_frobenius(ENCODER, torch.cat([x, x[:, :1]], 1), method="gram", reduction="sample"),
}
# The gradient that vector quantization hands through is not its derivative.
SMOOTH = {name: function for name, function in FUNCTIONS.items() if "vector quantization" not in name}
each_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def point(seed: int = 0) -> torch.Tensor:
    return Source("cpu", torch.float64, seed).uniform(6, 4) * 0.8 + 0.1


def flat(function):
    """All outputs in one vector."""

    def flattened(x):
        outputs = function(x)
        return torch.cat([o.flatten() for o in (outputs if isinstance(outputs, tuple) else (outputs,))])

    return flattened


@each_function
def test_jvp(function):
    """The directional derivative of torch.func, against the backward pass of the kernels; the value is theirs too."""
    x, direction = point(), point(1)
    value, tangent = torch.func.jvp(flat(function), (x,), (direction,))
    torch.testing.assert_close(value, flat(function)(x))
    jacobian = torch.autograd.functional.jacobian(flat(function), x).flatten(1)
    torch.testing.assert_close(tangent, jacobian @ direction.flatten())


@each_function
def test_dual_numbers(function):
    x, direction = point(), point(1)
    with forward_ad.dual_level():
        value, tangent = forward_ad.unpack_dual(flat(function)(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close((value, tangent), torch.func.jvp(flat(function), (x,), (direction,)))


@each_function
def test_jacfwd_is_jacrev(function):
    torch.testing.assert_close(torch.func.jacfwd(flat(function))(point()), torch.func.jacrev(flat(function))(point()))


@pytest.mark.parametrize("function", SMOOTH.values(), ids=SMOOTH)
def test_a_hessian(function):
    """Forward over reverse, for which the reference, plain PyTorch, is differentiated: as is reverse over forward."""

    def total(x):
        return flat(function)(x).sin().sum()

    hessian = torch.func.hessian(total)(point()).view(24, 24)
    torch.testing.assert_close(hessian, hessian.T)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(total))(point()).view(24, 24), hessian)
    step = 1e-5 * torch.eye(24, dtype=torch.float64)[5].view(6, 4)
    gradient = torch.func.grad(total)
    torch.testing.assert_close((gradient(point() + step) - gradient(point() - step)).flatten() / 2e-5, hessian[5], rtol=1e-5, atol=1e-5)


@each_function
def test_per_sample_directional_derivatives(function):
    """vmap of jvp and jvp of vmap."""
    x, directions = torch.stack([point(s) for s in range(3)]), torch.stack([point(s) for s in range(3, 6)])
    singles = [torch.func.jvp(flat(function), (a,), (b,))[1] for a, b in zip(x, directions, strict=True)]
    mapped = torch.func.vmap(lambda a, b: torch.func.jvp(flat(function), (a,), (b,))[1])(x, directions)
    torch.testing.assert_close(mapped, torch.stack(singles))
    torch.testing.assert_close(torch.func.jvp(torch.func.vmap(flat(function)), (x,), (directions,))[1], torch.stack(singles))


def test_drawn_noise_is_held_while_a_sample_is_differentiated():
    x = torch.zeros(5)
    torch.manual_seed(1)
    z = FV.reparameterize(x, x)
    torch.manual_seed(1)
    value, tangent = torch.func.jvp(lambda v: FV.reparameterize(x, v), (x,), (torch.ones(5),))
    torch.testing.assert_close((value, tangent), (z, 0.5 * z))


def test_a_group_norm_keeps_its_memory_layout():
    x = torch.rand(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    value, _ = torch.func.jvp(lambda x: FV.group_norm_silu(x, 2), (x,), (torch.ones_like(x),))
    assert value.is_contiguous(memory_format=torch.channels_last)


def test_a_vectorised_jacobian_of_either_mode():
    x = point()
    for mode in ("reverse-mode", "forward-mode"):
        jacobian = torch.autograd.functional.jacobian(FUNCTIONS["KL"], x, vectorize=True, strategy=mode)
        torch.testing.assert_close(jacobian, torch.func.jacrev(FUNCTIONS["KL"])(x))


def test_a_forced_backend_without_a_rule_says_so():
    x = point()
    with fastvae.use_backend("reference"):
        torch.func.jvp(FUNCTIONS["KL"], (x,), (x,))
    if fastvae._backend.resolve("latent_forward", x.device, x.dtype) != "reference":
        with fastvae.use_backend("cpp"), pytest.raises(fastvae.BackendError, match=r"'cpp' .* forward-mode .*: reference"):
            torch.func.jvp(FUNCTIONS["KL"], (x,), (x,))


def test_forward_mode_through_a_backward_pass_names_the_reference():
    """The forward pass ran before: a kernel's backward pass drops no tangent silently."""
    x, target = leaf(point()), point(1)
    loss = FV.mse_loss(x, target)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"use fastvae\.reference\.reconstruction"):
        torch.autograd.grad(loss, x, forward_ad.make_dual(torch.ones_like(loss), torch.ones_like(loss)))
    _, pull_back = torch.func.vjp(lambda x: FV.mse_loss(x, target), x.detach())
    one = torch.ones((), dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"use fastvae\.reference\.reconstruction"):
        torch.func.jvp(pull_back, (one,), (one,))
    _, pull_back = torch.func.vjp(lambda x: reconstruction.mse_loss(x, target), x.detach())
    torch.func.jvp(pull_back, (one,), (one,))


@each_function
@pytest.mark.parametrize("transform", brief(["grad", "jvp", "vmap"], ["grad"]))
def test_a_transformation_inside_compiled_code(function, transform):
    """Where torch.compile would trace a forward pass and leave its gradient out, silently."""

    def total(x):
        return flat(function)(x).sin().sum()

    def transformed(x):
        if transform == "grad":
            return torch.func.grad(total)(x)
        if transform == "jvp":
            return torch.func.jvp(total, (x,), (x.square(),))[1]
        return torch.func.vmap(total)(torch.stack([x, x.square()]))

    x = point()
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    # The noise of a seed is float32, and that of another backend to 2e-6.
    torch.testing.assert_close(compiled(x), transformed(x), rtol=1e-5, atol=1e-5)
