"""torch.compile, torch.func and autocast around whole steps, with drawn noise and forced backends; single functions: test_contracts.py."""

import threading

import pytest
import torch
from _helpers import Source, leaf, places
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fastvae
from fastvae import functional as FV

OPERATORS = ("latent_forward", "reconstruction_forward")
each_place = pytest.mark.parametrize("place", places(*OPERATORS), ids=str)


def sample_and_kl(mu, logvar):
    return FV.reparameterize_kl(mu, logvar, num_samples=3, seed=7)


def step(function, *tensors) -> list[torch.Tensor]:
    """The outputs and gradients of ``function(*tensors)``; the gradient of each output is 2."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [*outputs, *torch.autograd.grad(outputs, [t for t in tensors if t.requires_grad], [torch.full_like(o, 2.0) for o in outputs])]


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


def test_inductor():
    """Three families in one training step, through torch's own code generator."""

    def train(head, recon, codebook, target):
        z, _ = FV.reparameterize_kl(*head.chunk(2, dim=1), seed=3)
        quantized = FV.vector_quantize(z, codebook)
        loss = FV.elbo_loss(recon + quantized.quantized.sum(1, keepdim=True), target, *head.chunk(2, dim=1)).loss
        return loss * 2 + FV.mse_loss(recon, target) + quantized.loss

    source = Source("cpu")
    tensors = [leaf(source.normal(9, 8)), leaf(source.normal(9, 30)), leaf(source.normal(7, 4)), source.image(9, 30)]
    compiled = torch.compile(train, fullgraph=True)
    for ours, eager in zip(step(compiled, *tensors), step(train, *tensors), strict=True):
        torch.testing.assert_close(ours, eager)


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


FAMILIES = {
    "latent_forward": (sample_and_kl, lambda source: [leaf(source.normal(5, 6)), leaf(source.normal(5, 6))]),
    "reconstruction_forward": (FV.mse_loss, lambda source: [leaf(source.uniform(5, 6)), source.uniform(5, 6)]),
}


@pytest.mark.parametrize("operator", FAMILIES)
def test_compiled_code_follows_the_forced_backend(operator):
    function, make = FAMILIES[operator]
    executed = Executed()
    compiled = torch.compile(function, fullgraph=True, backend=executed.backend)
    tensors = make(Source("cpu"))
    automatic = places(operator)[0].backend
    assert executed.during(step, compiled, *tensors) == {automatic}
    for place in places(operator):
        if place.device == "cpu":
            with fastvae.use_backend(place.backend):
                assert executed.during(step, compiled, *tensors) == {place.backend}
                assert executed.during(step, compiled, *tensors) == {place.backend}
    compilations = executed.compilations
    assert executed.during(step, compiled, *tensors) == {automatic}
    with fastvae.use_backend("reference"):
        assert executed.during(step, compiled, *tensors) == {"reference"}
    assert executed.compilations == compilations


def test_compiled_code_follows_the_forced_backend_of_its_thread():
    function, make = FAMILIES["reconstruction_forward"]
    executed = Executed()
    compiled = torch.compile(function, fullgraph=True, backend=executed.backend)
    tensors = make(Source("cpu"))
    automatic = places("reconstruction_forward")[0].backend
    seen = []

    def other(backend):
        with fastvae.use_backend(backend):
            seen.append(executed.during(step, compiled, *tensors))

    def in_a_thread(backend):
        thread = threading.Thread(target=other, args=(backend,))
        thread.start()
        thread.join()

    with fastvae.use_backend("reference"):
        assert executed.during(step, compiled, *tensors) == {"reference"}
        in_a_thread(None)
        assert executed.during(step, compiled, *tensors) == {"reference"}
    in_a_thread("reference")
    assert executed.during(step, compiled, *tensors) == {automatic}
    assert seen == [{automatic}, {"reference"}]


def test_a_second_derivative_of_compiled_code_is_an_error():
    """torch's own: it differentiates no compiled code twice."""
    compiled = torch.compile(FV.kl_normal, fullgraph=True, backend="aot_eager")
    mu, logvar = (leaf(t) for t in Source("cpu").normal(2, 5, 6))
    (gradient,) = torch.autograd.grad(compiled(mu, logvar), mu, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.square().sum().backward()


@each_place
def test_vmap_over_drawn_noise(place):
    mu = torch.zeros(4, 50, device=place.device)
    same, different = (torch.func.vmap(lambda m: FV.reparameterize(m, m), randomness=r)(mu) for r in ("same", "different"))
    assert all(torch.equal(same[0], row) for row in same)
    assert torch.unique(different, dim=0).shape[0] == 4


@each_place
def test_jacrev(place):
    mu, logvar, eps = Source(place.device).normal(3, 4)
    jacobian = torch.func.jacrev(lambda m, v: FV.reparameterize(m, v, eps=eps), (0, 1))(mu, logvar)
    torch.testing.assert_close(jacobian[0], torch.eye(4, device=place.device))
    torch.testing.assert_close(jacobian[1], torch.diag(0.5 * logvar.mul(0.5).exp() * eps))


@each_place
@pytest.mark.parametrize(("dtype", "compiled"), [(torch.float16, False), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str)
def test_a_training_step_under_autocast(place, dtype, compiled):
    """16-bit activations against a float32 target, losses in float32; BCE from probabilities too, which torch refuses on a GPU."""
    torch.manual_seed(0)
    encoder, decoder = (torch.nn.Linear(i, o, device=place.device) for i, o in ((30, 8), (4, 30)))
    data = Source(place.device).uniform(16, 30)

    def train(data):
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

    function = torch.compile(train, fullgraph=True, backend="aot_eager") if compiled else train
    with torch.autocast(place.device, dtype):
        recon, losses = function(data)
    assert recon.dtype == dtype
    assert all(loss.dtype == torch.float32 for loss in losses)
    gradients = torch.autograd.grad(sum(losses), encoder.weight)[0]
    _, expected_losses = train(data)
    expected = torch.autograd.grad(sum(expected_losses), encoder.weight)[0]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected_losses), rtol=0.02, atol=0)
    assert torch.nn.functional.cosine_similarity(gradients.flatten(), expected.flatten(), dim=0) > 0.99
