"""What torch asks of an operator: opcheck, torch.compile, torch.export, torch.func, autocast; and that a second derivative is refused."""

import contextlib
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from _helpers import Place, Source, leaf, places
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

import fastvae
from fastvae import functional as FV
from fastvae.ops import OPERATORS
from fastvae.ops._results import REDUCTIONS, reduced_shape
from fastvae.ops.reconstruction import LIKELIHOODS


@dataclass(frozen=True)
class Call:
    """A public function as one of its tensors: the operators it runs, what it is called with, and how many of the tensors learn."""

    operators: tuple[str, ...]
    function: Any
    make: Any
    learns: int


def gaussians(count: int):
    return lambda source, batch: [source.normal(batch, 6) for _ in range(count)]


def images(source: Source, batch: int):
    return [source.uniform(batch, 6) * 0.9 + 0.05, source.uniform(batch, 6)]


def bytes_(source: Source, batch: int):
    return [source.normal(batch, 6), source.image(batch, 6)]


def everything(source: Source, batch: int):
    return [source.normal(batch, 6), source.normal(batch, 3), source.normal(batch, 3), source.image(batch, 6)]


LATENT, RECONSTRUCTION = ("latent_forward",), ("reconstruction_forward",)

CALLS = {
    "reparameterize": Call(LATENT, lambda mu, logvar: FV.reparameterize(mu, logvar, seed=7), gaussians(2), 2),
    "reparameterize_eps": Call(LATENT, lambda mu, logvar, eps: FV.reparameterize(mu, logvar, eps=eps), gaussians(3), 3),
    "kl_normal": Call(LATENT, FV.kl_normal, gaussians(2), 2),
    "kl_normal_prior": Call(
        LATENT,
        lambda *tensors: FV.kl_normal(*tensors, reduction="sample", free_bits=0.4),
        gaussians(4),
        4,
    ),
    "reparameterize_kl": Call(LATENT, lambda *tensors: FV.reparameterize_kl(*tensors, num_samples=3, seed=7), gaussians(4), 4),
    "bce_with_logits": Call(RECONSTRUCTION, FV.binary_cross_entropy_with_logits, bytes_, 1),
    "bce_with_logits_none": Call(RECONSTRUCTION, lambda x, t: FV.binary_cross_entropy_with_logits(x, t, reduction="none"), images, 2),
    "bce": Call(RECONSTRUCTION, FV.binary_cross_entropy, images, 1),
    "mse": Call(RECONSTRUCTION, lambda x, t: FV.mse_loss(x, t, reduction="batchmean"), images, 1),
    "gaussian_nll": Call(RECONSTRUCTION, FV.gaussian_nll, gaussians(3), 3),
    "gaussian_nll_shared": Call(RECONSTRUCTION, lambda x, t, v: FV.gaussian_nll(x, t, v[0]), gaussians(3), 3),
    "elbo_loss": Call(
        LATENT + RECONSTRUCTION,
        lambda recon, mu, logvar, x: tuple(FV.elbo_loss(recon, x, mu, logvar, beta=2.0, capacity=1.0)),
        everything,
        3,
    ),
    "vae_loss": Call(LATENT + RECONSTRUCTION, lambda x, mu, logvar, t: fastvae.vae_loss(t / 255, x.sigmoid(), mu, logvar), everything, 3),
}

each_call = pytest.mark.parametrize(
    ("place", "call"),
    [pytest.param(place, call, id=f"{name}-{place}") for name, call in CALLS.items() for place in places(*call.operators)],
)
each_place = pytest.mark.parametrize("place", places(*LATENT, *RECONSTRUCTION), ids=str)

# One reduction for each shape of a result; the numbers of the operators.
SHAPES_OF_REDUCTIONS = (REDUCTIONS["none"], REDUCTIONS["sample"], REDUCTIONS["mean"])

# The loop that runs an operator without a batching rule once a sample is what is wanted: nobody vmaps these on a hot path.
vmap_loops = pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")


def inputs(call: Call, place: Place, batch: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    tensors = call.make(Source(place.device, dtype, seed), batch)
    return [leaf(t) if i < call.learns else t for i, t in enumerate(tensors)]


def as_tuple(output) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def run(function, tensors, factor: float = 2.0) -> list[torch.Tensor]:
    """Outputs and gradients; the incoming gradient of a scalar is ``factor``."""
    outputs = as_tuple(function(*tensors))
    cotangents = [torch.full_like(o, factor) for o in outputs]
    learners = [t for t in tensors if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, learners, cotangents)]


def assert_same(actual, expected) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles from nothing: the limit on recompilations is not used up by the tests before it."""
    torch.compiler.reset()


class Executed:
    """A compiler that runs graphs as they are and notes whose operators a call executes."""

    def __init__(self):
        self.backends: set[str] = set()
        self.compilations = 0
        self.backend = aot_autograd(fw_compiler=self._compile, bw_compiler=self._compile)

    def _compile(self, graph, _):
        self.compilations += 1
        backends = {n.target._overloadname for n in graph.graph.nodes if getattr(n.target, "namespace", None) == "fastvae"}

        def execute(*args):
            self.backends |= backends
            return graph(*args)

        return make_boxed_func(execute)

    def during(self, function, *args) -> set[str]:
        self.backends = set()
        function(*args)
        return self.backends


def latent_samples(source: Source):
    mu, logvar, prior_mu, prior_logvar = (source.normal(5, 6) for _ in range(4))
    seed, active = torch.tensor(3, device=source.device), torch.rand(6, device=source.device) > 0.5
    none = torch.empty(0, dtype=torch.bool, device=source.device)
    clamp = (-30.0, 20.0)
    fields = [a.name for a in OPERATORS["latent_forward"].overloads["reference"]._schema.arguments]
    for reduction in SHAPES_OF_REDUCTIONS:
        for chosen in (
            {"seed": seed, "with_kl": True},
            {"eps": source.normal(2, 5, 6), "num_samples": 2, "with_kl": True, "prior_mu": prior_mu, "prior_logvar": prior_logvar},
            {"seed": seed, "num_samples": 2, "with_kl": False, "keep_noise": True},
            {"with_kl": True, "free_bits": 0.3, "prior_mu": prior_mu, "prior_logvar": prior_logvar},
        ):
            defaults = {"reduction": reduction, "free_bits": 0.0, "clamp_min": clamp[0], "clamp_max": clamp[1], "keep_noise": False}
            values = {"mu": mu, "logvar": logvar, **defaults, **chosen}
            yield "latent_forward", tuple(values.get(field) for field in fields)
        grad_kl = source.normal(*reduced_shape(mu.shape, reduction))
        for grad_z, given, prior, mask, samples in (
            (source.normal(5, 6), (None, seed), (None, None), none, None),
            (source.normal(2, 5, 6), (source.normal(2, 5, 6), None), (prior_mu, prior_logvar), active, 2),
            (None, (None, None), (prior_mu, prior_logvar), active, None),
        ):
            yield "latent_backward", (grad_z, grad_kl, mu, logvar, *prior, *given, mask, samples, reduction, *clamp)


def reconstruction_samples(source: Source):
    target, byte, weight = source.uniform(5, 6), source.image(5, 6), source.uniform(1, 6)
    for likelihood in LIKELIHOODS.values():
        input = source.uniform(5, 6) * 0.9 + 0.05
        logvar = source.normal(5, 1) if likelihood == LIKELIHOODS["gaussian"] else None
        weights = (weight, None) if likelihood < LIKELIHOODS["mse"] else (None, None)
        for reduction in SHAPES_OF_REDUCTIONS:
            scalar = reduction == REDUCTIONS["mean"]
            yield "reconstruction_forward", (input, byte, *weights, logvar, likelihood, reduction, 1.0, scalar)
            yield "reconstruction_forward", (input, target, *weights, logvar, likelihood, reduction, 1.0, False)
            grad = source.normal(*reduced_shape(input.shape, reduction))
            yield "reconstruction_backward", (grad, input, target, *weights, logvar, likelihood, reduction, True)
            yield "reconstruction_backward", (grad, input, byte, *weights, logvar, likelihood, reduction, False)
    logvar, operands = source.normal(5, 1), (source.normal(5, 6), target, None, None)
    for incoming in (1.0, 2.0):
        grad_output = torch.tensor(incoming, device=source.device)
        yield "reconstruction_rescale_", (source.normal(5, 6), grad_output, 2.0)
        written, numbers = (source.normal(5, 6), source.normal(5, 1)), (LIKELIHOODS["gaussian"], REDUCTIONS["mean"])
        yield "reconstruction_backward_", (*written, grad_output, 2.0, *operands, logvar, *numbers)


@pytest.mark.parametrize(
    ("place", "samples"),
    [
        pytest.param(place, samples, id=f"{op}-{place}")
        for op, samples in (("latent_forward", latent_samples), ("reconstruction_forward", reconstruction_samples))
        for place in places(op)
    ],
)
@pytest.mark.parametrize(
    ("dtype", "checks"),
    [
        (torch.float32, ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")),
        (torch.bfloat16, ("test_schema", "test_faketensor")),
    ],
    ids=["float32", "bfloat16"],
)
def test_opcheck(place, samples, dtype, checks):
    """Schema, shape function and tracing of every overload that serves; what sums are kept in differs from a 16-bit input."""
    seen = set()
    for op, arguments in samples(Source(place.device, dtype)):
        if place not in places(op):
            continue
        assert set(opcheck(OPERATORS[op].overloads[place.backend], arguments, test_utils=checks).values()) == {"SUCCESS"}
        seen.add(op)
    family = samples.__name__.split("_")[0]
    assert seen == {op for op in OPERATORS if op.startswith(family) and place in places(op)}


@each_call
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(place, call, dynamic):
    """Forward and backward; with dynamic shapes one compilation serves another batch."""
    compiled = torch.compile(call.function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    tensors = inputs(call, place)
    assert_same(run(compiled, tensors, 1.0), run(call.function, tensors, 1.0))
    other = inputs(call, place, batch=7 if dynamic else 5, seed=1)
    with torch.compiler.set_stance("fail_on_recompile"):
        actual = run(compiled, other)
    assert_same(actual, run(call.function, other))


@each_place
def test_inductor(place):
    """Both families in one training step, through torch's own code generator."""

    def step(head, recon, target):
        z, _ = FV.reparameterize_kl(*head.chunk(2, dim=1), seed=3)
        loss = FV.elbo_loss(recon + z.sum(1, keepdim=True), target, *head.chunk(2, dim=1)).loss
        return loss * 2 + FV.mse_loss(recon, target)

    source = Source(place.device)
    tensors = [leaf(source.normal(9, 8)), leaf(source.normal(9, 30)), source.image(9, 30)]
    compiled = torch.compile(step, fullgraph=True)
    assert_same(run(compiled, tensors), run(step, tensors))


@each_place
def test_drawn_noise_under_compile(place):
    """A compiled call draws its seed from torch's generator: reproducible, and different the next time."""
    compiled = torch.compile(lambda mu: FV.reparameterize(mu, mu), fullgraph=True, backend="aot_eager")
    mu = torch.zeros(100, device=place.device)
    torch.manual_seed(0)
    first, second = compiled(mu), compiled(mu)
    torch.manual_seed(0)
    assert torch.equal(compiled(mu), first)
    assert not (first == second).any()
    torch.manual_seed(0)
    assert torch.equal(FV.reparameterize(mu, mu), first)


@pytest.mark.parametrize("call", [CALLS["reparameterize_kl"], CALLS["mse"]], ids=["latent", "reconstruction"])
def test_compiled_code_follows_the_forced_backend(call):
    executed = Executed()
    compiled = torch.compile(call.function, fullgraph=True, backend=executed.backend)
    tensors = inputs(call, Place("cpu", "auto"))
    automatic = places(*call.operators)[0].backend
    assert executed.during(run, compiled, tensors) == {automatic}
    for place in places(*call.operators):
        if place.device == "cpu":
            with fastvae.use_backend(place.backend):
                assert executed.during(run, compiled, tensors) == {place.backend}
                assert executed.during(run, compiled, tensors) == {place.backend}
    compilations = executed.compilations
    assert executed.during(run, compiled, tensors) == {automatic}
    with fastvae.use_backend("reference"):
        assert executed.during(run, compiled, tensors) == {"reference"}
    assert executed.compilations == compilations


def test_compiled_code_follows_the_forced_backend_of_its_thread():
    call = CALLS["mse"]
    executed = Executed()
    compiled = torch.compile(call.function, fullgraph=True, backend=executed.backend)
    tensors = inputs(call, Place("cpu", "auto"))
    automatic = places(*call.operators)[0].backend
    seen = []

    def other(backend):
        with fastvae.use_backend(backend):
            seen.append(executed.during(run, compiled, tensors))

    def in_a_thread(backend):
        thread = threading.Thread(target=other, args=(backend,))
        thread.start()
        thread.join()

    with fastvae.use_backend("reference"):
        assert executed.during(run, compiled, tensors) == {"reference"}
        in_a_thread(None)
        assert executed.during(run, compiled, tensors) == {"reference"}
    in_a_thread("reference")
    assert executed.during(run, compiled, tensors) == {automatic}
    assert seen == [{automatic}, {"reference"}]


@each_call
def test_export(place, call):
    """An exported program holds the overload that served."""

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return call.function(*tensors)

    tensors = tuple(t.detach() for t in inputs(call, place))
    program = torch.export.export(Module(), tensors)
    held = {n.target._overloadname for n in program.graph.nodes if getattr(n.target, "namespace", None) == "fastvae"}
    assert held == {place.backend}
    assert_same(as_tuple(program.module()(*tensors)), as_tuple(call.function(*tensors)))


def second_derivative(function, call: Call, place: Place) -> None:
    tensors = inputs(call, place)
    total = sum(o.sin().sum() for o in as_tuple(function(*tensors)))
    gradients = torch.autograd.grad(total, [t for t in tensors if t.requires_grad], create_graph=True)
    sum(g.square().sum() for g in gradients).backward()


@each_call
def test_a_second_derivative_names_the_reference(place, call):
    with pytest.raises(RuntimeError, match=r"use fastvae\.reference\.(latent|reconstruction), which is plain PyTorch"):
        second_derivative(call.function, call, place)


@each_place
@pytest.mark.parametrize("name", ["kl_normal", "mse"])
def test_a_second_derivative_of_compiled_code_is_an_error(place, name):
    """torch's own: it differentiates no compiled code twice."""
    compiled = torch.compile(CALLS[name].function, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        second_derivative(compiled, CALLS[name], place)


@each_call
def test_a_gradient_of_a_gradient_is_usable_without_a_second_derivative(place, call):
    """``create_graph=True`` alone does no harm."""
    tensors = inputs(call, place)
    learners = [t for t in tensors if t.requires_grad]
    plain, graphed = (
        torch.autograd.grad(sum(o.sum() for o in as_tuple(call.function(*tensors))), learners, create_graph=create_graph)
        for create_graph in (False, True)
    )
    assert_same(graphed, plain)


def scalar(call: Call):
    return lambda *tensors: sum(o.sin().sum() for o in as_tuple(call.function(*tensors)))


@each_call
def test_func_grad(place, call):
    tensors = inputs(call, place)
    argnums = tuple(range(call.learns))
    actual = torch.func.grad(scalar(call), argnums)(*[t.detach() for t in tensors])
    expected = torch.autograd.grad(scalar(call)(*tensors), [t for t in tensors if t.requires_grad])
    assert_same(actual, expected)


@each_call
def test_func_grad_of_grad_names_the_reference(place, call):
    tensors = [t.detach() for t in inputs(call, place)]

    def first(*tensors):
        return torch.func.grad(scalar(call))(*tensors).square().sum()

    with pytest.raises(RuntimeError, match=r"fastvae\.reference\.(latent|reconstruction)"):
        torch.func.grad(first)(*tensors)


@each_call
@vmap_loops
def test_vmap(place, call):
    """Over a new leading dimension, values and gradients of each slice."""
    stacked = [torch.stack(ts).detach() for ts in zip(*(inputs(call, place, seed=seed) for seed in range(3)), strict=True)]
    actual = as_tuple(torch.func.vmap(call.function)(*stacked))
    expected = [as_tuple(call.function(*slices)) for slices in zip(*stacked, strict=True)]
    assert_same(actual, [torch.stack(outputs) for outputs in zip(*expected, strict=True)])

    gradient = torch.func.grad(scalar(call))
    actual = torch.func.vmap(gradient)(*stacked)
    torch.testing.assert_close(actual, torch.stack([gradient(*slices) for slices in zip(*stacked, strict=True)]))


@each_place
@vmap_loops
def test_vmap_over_drawn_noise(place):
    mu = torch.zeros(4, 50, device=place.device)
    same, different = (torch.func.vmap(lambda m: FV.reparameterize(m, m), randomness=r)(mu) for r in ("same", "different"))
    assert all(torch.equal(same[0], row) for row in same)
    assert torch.unique(different, dim=0).shape[0] == 4


@each_place
@vmap_loops
def test_gradients_of_single_samples(place):
    """vmap over grad, as for per-sample gradient clipping."""
    source = Source(place.device)
    logits, target = source.normal(6, 10), source.image(6, 10)

    def loss(x, t):
        return FV.binary_cross_entropy_with_logits(x, t, reduction="sum")

    actual = torch.func.vmap(torch.func.grad(loss))(logits, target)
    x = leaf(logits)
    loss(x, target).backward()
    torch.testing.assert_close(actual, x.grad)


@each_place
@vmap_loops
def test_jacrev(place):
    mu, logvar, eps = Source(place.device).normal(3, 4)
    jacobian = torch.func.jacrev(lambda m, v: FV.reparameterize(m, v, eps=eps), (0, 1))(mu, logvar)
    torch.testing.assert_close(jacobian[0], torch.eye(4, device=place.device))
    torch.testing.assert_close(jacobian[1], torch.diag(0.5 * logvar.mul(0.5).exp() * eps))


@each_place
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(place, dtype, compiled):
    """16-bit activations against a float32 target, losses in float32; BCE from probabilities too, which torch refuses on a GPU."""
    torch.manual_seed(0)
    encoder, decoder = (torch.nn.Linear(i, o, device=place.device) for i, o in ((30, 8), (4, 30)))
    data = Source(place.device).uniform(16, 30)

    def step(data):
        mu, logvar = encoder(data).chunk(2, dim=1)
        z, kl = FV.reparameterize_kl(mu, logvar, seed=1)
        recon = decoder(z)
        losses = (
            kl,
            FV.binary_cross_entropy_with_logits(recon, data, reduction="batchmean"),
            FV.binary_cross_entropy(recon.sigmoid(), data, reduction="batchmean"),
            FV.mse_loss(recon, data, reduction="batchmean"),
            FV.elbo_loss(recon, data, mu, logvar).loss,
        )
        return recon, losses

    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with torch.autocast(place.device, dtype):
        recon, losses = function(data)
    assert recon.dtype == dtype
    assert all(loss.dtype == torch.float32 for loss in losses)
    gradients = torch.autograd.grad(sum(losses), encoder.weight)[0]
    _, expected_losses = step(data)
    expected = torch.autograd.grad(sum(expected_losses), encoder.weight)[0]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected_losses), rtol=0.02, atol=0)
    assert torch.nn.functional.cosine_similarity(gradients.flatten(), expected.flatten(), dim=0) > 0.99


@each_place
def test_inference_mode_and_no_grad(place):
    call = CALLS["elbo_loss"]
    tensors = inputs(call, place)
    expected = [o.detach() for o in call.function(*tensors)]
    for mode in (torch.inference_mode(), torch.no_grad(), contextlib.nullcontext()):
        with mode:
            assert_same([o.detach() for o in call.function(*tensors)], expected)
