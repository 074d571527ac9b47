"""The norm of an encoder's Jacobian against torch.func in float64: methods, encoders, plans, chunks, limits."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source, each_place, kept_bytes, leaf
from test_jacobian import GRAM, OPERATOR, each_activation
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvae import functional as FV
from fastvae import reference
from fastvae.functional import _chain
from fastvae.ops._gram_chunks import gram_elements

MODULES = {
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.3),
    "elu": lambda: nn.ELU(0.7),
    "softplus": lambda: nn.Softplus(2.5),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


def mlp(sizes: tuple[int, ...], activation: str = "sigmoid", last: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), MODULES[activation]()]
    return nn.Sequential(*(layers if last else layers[:-1]))


def oracle_norms(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The squared norm of each sample's Jacobian by ``torch.autograd.functional``, which shares no code with any method."""
    rows = []
    for sample in x:
        jacobian = torch.autograd.functional.jacobian(lambda s: encoder(s.unsqueeze(0)), sample, create_graph=True)
        rows.append(jacobian.square().sum())
    return torch.stack(rows)


def compare_with_the_oracle(encoder, x, method, **options) -> None:
    """Values and gradients, of the parameters and of x, in float64."""
    encoder, x = encoder.double(), leaf(x.double())
    weights = torch.linspace(0.5, 1.5, len(x), dtype=torch.float64, device=x.device)
    learners = [x, *encoder.parameters()]
    expected = oracle_norms(encoder, x)
    expected_gradients = torch.autograd.grad(weights @ expected, learners, allow_unused=True, materialize_grads=True)
    norms = FV.jacobian_frobenius(encoder, x, method=method, reduction="sample", **options)
    torch.testing.assert_close(norms, expected)
    gradients = torch.autograd.grad(weights @ norms, learners, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    mean = FV.jacobian_frobenius(encoder, x, method=method, **options)
    torch.testing.assert_close(mean, expected.mean())
    mean_gradients = torch.autograd.grad(3 * mean, learners, allow_unused=True, materialize_grads=True)
    expected_gradients = torch.autograd.grad(3 * oracle_norms(encoder, x).mean(), learners, allow_unused=True, materialize_grads=True)
    for ours, theirs in zip(mean_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@each_place(OPERATOR, dtype=torch.float64)
@each_activation
@pytest.mark.parametrize("method", ["closed_form", "gram", "auto"])
def test_one_layer(place, activation, method):
    compare_with_the_oracle(mlp((6, 9), activation).to(place.device), Source(place.device).normal(5, 6), method)


@each_place(GRAM, dtype=torch.float64)
@each_activation
@pytest.mark.parametrize("sizes", [(20, 8, 5), (3, 12, 7), (16, 9, 7, 5), (20, 6, 30, 25), (5, 9, 6, 8, 4)], ids=str)
def test_gram(place, activation, sizes):
    """Wide inputs, narrow inputs, waists: between them all orders of multiplication, see the next test."""
    compare_with_the_oracle(mlp(sizes, activation).to(place.device), Source(place.device).normal(4, sizes[0]), "gram")


@each_place(GRAM, dtype=torch.float64)
@pytest.mark.parametrize("sizes", [(20, 8, 5), (9, 7, 8, 5), (5, 9, 6, 8, 4)], ids=str)
def test_every_order_of_multiplication_gives_the_same(place, sizes, monkeypatch):
    depth = len(sizes) - 1
    orders = [(None, meet) for meet in range(1, depth + 1)] + [(g, meet) for meet in range(1, depth) for g in range(1, meet + 1)]
    for gram_at, meet in orders:
        monkeypatch.setattr(_chain, "plan", lambda *_, order=(gram_at, meet): _chain.Plan(*order, 0))
        compare_with_the_oracle(mlp(sizes).to(place.device), Source(place.device).normal(3, sizes[0]), "gram")


def test_a_gpu_takes_longer_chunks():
    """Eight times, so that launches do not count beside the work; 64 MiB of float32."""
    assert [gram_elements(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [1 << 21, 1 << 24, 1 << 24]


@each_place(GRAM, dtype=torch.float64)
def test_a_batch_of_many_chunks(place, monkeypatch):
    monkeypatch.setattr("fastvae.ops._gram_chunks.gram_elements", lambda device: 3 * 5 * 8)
    encoder, x = mlp((20, 8, 5)).to(place.device), Source(place.device).normal(11, 20)
    compare_with_the_oracle(encoder, x, "gram")
    compare_with_the_oracle(mlp((20, 8, 6, 5)).to(place.device), x, "gram")


@pytest.fixture
def rounded_products():
    """float32 products that torch may make of factors in TF32."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(previous)


@each_place(GRAM)
@pytest.mark.usefixtures("rounded_products")
@pytest.mark.parametrize("sizes", [(20, 8, 5), (5, 9, 6, 8, 4)], ids=str)
def test_gram_follows_the_precision_of_torchs_products(place, sizes):
    """The documented error, and the setting as the caller chose it."""
    encoder, x = mlp(sizes).to(place.device), Source(place.device).normal(40, sizes[0])
    norms = FV.jacobian_frobenius(encoder, x, method="gram", reduction="sample")
    assert torch.get_float32_matmul_precision() == "high"
    torch.testing.assert_close(norms.double(), oracle_norms(encoder.double(), x.double()), rtol=1e-3, atol=0)


@each_place(GRAM, dtype=torch.float64)
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
def test_gradcheck_of_gram(place, reduction):
    encoder = mlp((6, 4, 3), "tanh").double().to(place.device)
    x = leaf(Source(place.device, torch.float64).normal(3, 6))

    def function(x, *parameters):
        named = dict(zip(dict(encoder.named_parameters()), parameters, strict=True))
        with nn.utils.stateless._reparametrize_module(encoder, named):
            return FV.jacobian_frobenius(encoder, x, method="gram", reduction=reduction)

    assert torch.autograd.gradcheck(function, [x, *encoder.parameters()])


@pytest.mark.parametrize(
    ("sizes", "gram_at", "meet"),
    [
        ((784, 256, 64), 1, 1),
        ((784, 512, 256, 32), 1, 1),
        ((8, 256, 64), None, 1),
        ((8, 256, 64, 256), None, 2),
        ((784, 512, 8, 512), 2, 2),
        ((3072, 512, 8, 512), 1, 2),
        ((784, 16, 512, 512), 1, 1),
    ],
)
def test_the_order_of_multiplication_follows_from_the_sizes(sizes, gram_at, meet):
    assert _chain.plan(sizes, 128)[:2] == (gram_at, meet)


def test_operations_of_a_plan():
    """784-256-64 for 128 samples: G once, and V G for each."""
    assert _chain.plan((784, 256, 64), 128).operations == 256 * 256 * 784 + 128 * 64 * 256 * 256
    assert _chain.plan((8, 256, 64), 10).operations == 10 * 64 * 256 * 8
    assert _chain.plan((784, 256), 128) == (None, 1, 0)
    for sizes in ((9, 8, 7, 6, 5), (5, 6, 7, 8, 9), (50, 3, 40, 2, 30)):
        chosen = _chain.plan(sizes, 1).operations
        explicit = sum(a * b * sizes[0] for a, b in itertools.pairwise(sizes[1:]))
        assert chosen <= explicit


@each_place(GRAM, dtype=torch.float64)
def test_what_an_mlp_may_hold(place):
    """Nested Sequentials, Flatten, Identity, dropout and batch-norm in evaluation mode, layers without activation, without bias."""
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Flatten(),
        nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(inplace=True), nn.Dropout(0.5)),
        nn.Linear(9, 8, bias=False),
        nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.BatchNorm1d(7, affine=False)),
        nn.Identity(),
        nn.Linear(7, 5),
    ).to(place.device)
    x = Source(place.device).normal(6, 3, 4)
    encoder(x)
    compare_with_the_oracle(encoder.eval(), x, "gram")
    compare_with_the_oracle(nn.Linear(6, 3).to(place.device), Source(place.device).normal(6, 6), "closed_form")


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("encoder", ["mlp", "conv"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_autograd(place, encoder, chunk_size):
    encoder, x = (mlp((6, 5, 4)), torch.randn(5, 6)) if encoder == "mlp" else (conv_encoder(), torch.randn(5, 1, 6, 6))
    compare_with_the_oracle(encoder.to(place.device), x.to(place.device), "autograd", chunk_size=chunk_size)


def conv_encoder() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.SiLU(), nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(27, 4))


class Attention(nn.Module):
    """Self-attention between four vectors of four units, and one linear layer."""

    def __init__(self, outputs: int):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.last = nn.Linear(4, 12), nn.Linear(16, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.last(F.scaled_dot_product_attention(query, key, value).flatten(1))


@each_place(OPERATOR, dtype=torch.float64)
@pytest.mark.parametrize("method", ["projection", "autograd"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_attention(place, method, chunk_size):
    """torch's fused attention has no second derivative; projections of one output are exact."""
    encoder, x = Attention(1).to(place.device), torch.randn(5, 4, 4, device=place.device)
    options = {"method": method, "reduction": "sample", "chunk_size": chunk_size}
    for norm in (FV.jacobian_frobenius, reference.jacobian_frobenius):
        parameters = tuple(encoder.parameters())
        ours = torch.autograd.grad(norm(encoder, x, **options).sum(), parameters, allow_unused=True, materialize_grads=True)
        with sdpa_kernel(SDPBackend.MATH):
            theirs = torch.autograd.grad(oracle_norms(encoder, x).sum(), parameters, allow_unused=True, materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("num_projections", [1, 4])
def test_projection_is_unbiased(num_projections):
    """Over many draws, within 5 standard errors; n projections have an n-th of the variance of one, which has a closed form."""
    encoder, x, count = conv_encoder().double(), Source("cpu", torch.float64).normal(3, 1, 6, 6), 1500
    jacobians = torch.func.vmap(torch.func.jacrev(lambda s: encoder(s[None])[0]))(x).flatten(2)
    squares = torch.linalg.svdvals(jacobians).square().detach()
    exact, outputs = squares.sum(1), squares.shape[1]
    options = {"num_projections": num_projections, "reduction": "sample", "generator": torch.Generator().manual_seed(0)}
    # Each sample of a batch has directions of its own.
    with torch.no_grad():
        estimates = FV.jacobian_frobenius(encoder, x.repeat(count, 1, 1, 1), method="projection", **options).view(count, 3)
    # Of C sum_i lambda_i v_i^2, with v uniform on the sphere in C dimensions.
    variance = 2 * (outputs * squares.square().sum(1) - exact.square()) / (outputs + 2) / num_projections
    assert ((estimates.mean(0) - exact).abs() < 5 * (variance / count).sqrt()).all()
    torch.testing.assert_close(estimates.var(0), variance, rtol=0.25, atol=0)


def test_projections_of_one_output_are_exact():
    encoder, x = mlp((6, 5, 1)).double(), Source("cpu", torch.float64).normal(5, 6)
    torch.testing.assert_close(FV.jacobian_frobenius(encoder, x, method="projection"), FV.jacobian_frobenius(encoder, x))


@pytest.mark.parametrize("num_projections", [1, 3])
@pytest.mark.parametrize("chunk_size", [None, 2, 100])
def test_projection_and_its_gradients(num_projections, chunk_size):
    """Against the same directions by hand; the backward pass of a chunk, computed again, takes the directions of the forward pass."""
    encoder, x = conv_encoder().double(), leaf(Source("cpu", torch.float64).normal(5, 1, 6, 6))
    generator = torch.Generator().manual_seed(3)
    norms = FV.jacobian_frobenius(
        encoder, x, method="projection", num_projections=num_projections, generator=generator, reduction="sample", chunk_size=chunk_size
    )
    generator.manual_seed(3)
    sizes = [len(part) for part in x.split(chunk_size or 5)]
    parts = [F.normalize(torch.randn(num_projections, n, 4, generator=generator, dtype=torch.float64), dim=2) for n in sizes]
    directions = torch.cat(parts, dim=1)
    jacobians = torch.func.vmap(torch.func.jacrev(lambda s: encoder(s[None])[0]))(x).flatten(2)
    expected = 4 / num_projections * torch.einsum("nbc,bcd->nbd", directions, jacobians).square().sum((0, 2))
    torch.testing.assert_close(norms, expected)
    learners = [x, *encoder.parameters()]
    ours = torch.autograd.grad(norms.sum(), learners, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected.sum(), learners, allow_unused=True, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_projection_is_seeded():
    encoder, x = conv_encoder(), torch.randn(4, 1, 6, 6)

    def estimate():
        return FV.jacobian_frobenius(encoder, x, method="projection")

    torch.manual_seed(1)
    first, second = estimate(), estimate()
    torch.manual_seed(1)
    assert torch.equal(estimate(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_projection_takes_dropout_and_batch_norm_in_training_mode(chunk_size):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    norms = FV.jacobian_frobenius(encoder, torch.randn(6, 6), chunk_size=chunk_size)
    norms.backward()
    assert norms > 0
    assert encoder[0].weight.grad.isfinite().all()


def test_chunks_bound_what_the_backward_pass_keeps():
    """Gram and projection keep the same however many samples a batch has, but for the input itself."""
    deep, x = mlp((40, 30, 20, 30)), torch.randn(64, 40)

    def kept(method, chunk_size):
        return kept_bytes(lambda: FV.jacobian_frobenius(deep, x, method=method, chunk_size=chunk_size))

    for method in ("gram", "projection"):
        assert kept(method, 8) < 0.2 * kept(method, None)


@each_place(GRAM, dtype=torch.float64)
@pytest.mark.parametrize("method", ["gram", "closed_form"])
@pytest.mark.parametrize("chunk_size", [1, 3, 5, 64])
def test_chunks_of_exact_methods(place, method, chunk_size):
    encoder = mlp((9, 8, 5) if method == "gram" else (9, 5)).to(place.device)
    compare_with_the_oracle(encoder, Source(place.device).normal(5, 9), method, chunk_size=chunk_size)


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ["auto", "gram", "projection", "autograd"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "sample"])
def test_an_empty_batch(place, method, reduction):
    encoder = mlp((6, 5, 4)).to(place.device)
    norms = FV.jacobian_frobenius(encoder, torch.empty(0, 6, device=place.device), method=method, reduction=reduction)
    assert norms.shape == ((0,) if reduction == "sample" else ())
    assert norms.sum() == 0
    norms.sum().backward()
    assert (encoder[0].weight.grad == 0).all()


@pytest.mark.parametrize(
    ("encoder", "x", "method", "reason"),
    [
        (mlp((6, 5)), torch.zeros(3, 6), "closed_form", "one linear layer"),
        (mlp((784, 256, 64)), torch.zeros(128, 784), "gram", "Gram matrix of the first layer, 5.88e+08 multiplications for 128 samples"),
        (mlp((784, 512, 8, 512)), torch.zeros(128, 784), "gram", "the Gram matrix of layers 1 to 2"),
        (mlp((3, 50, 40)), torch.zeros(8, 3), "gram", "the first layer as it is"),
        (conv_encoder(), torch.zeros(2, 1, 6, 6), "projection", "layer '0', Conv2d"),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout()), torch.zeros(2, 4), "projection", "layer '1', Dropout"),
    ],
)
def test_auto_tells_what_it_picked_and_why(encoder, x, method, reason):
    explanation = FV.explain_jacobian_method(encoder, x)
    assert explanation.method == method
    assert reason in explanation.reason


class Own(nn.Module):
    def forward(self, x):
        return x.sin()


@pytest.mark.parametrize("method", ["closed_form", "gram"])
@pytest.mark.parametrize(
    ("encoder", "named"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.2)), r"layer '1', Dropout\(p=0.2.*is in training mode"),
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), r"layer '1', BatchNorm1d.*is in training mode"),
        (nn.Sequential(nn.Linear(6, 5), nn.Softsign()), r"layer '1', Softsign\(\), is not one of"),
        (nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.Mish())), r"layer '0.1', Mish"),
        (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Tanh()), r"layer '2', Tanh\(\), follows another activation"),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 5)), r"layer '0', ReLU\(\), comes before"),
        (Own(), "the encoder, Own, is not one of"),
        (nn.Sequential(nn.Identity()), "the encoder has no Linear layer"),
    ],
)
def test_encoders_that_cannot_be_served(encoder, named, method):
    with pytest.raises(ValueError, match=named + r".*use method='projection'"):
        FV.jacobian_frobenius(encoder, torch.zeros(3, 6), method=method)
    assert FV.explain_jacobian_method(encoder, torch.zeros(3, 6)).method == "projection"


@pytest.mark.parametrize("layer", [nn.Dropout(0.2), nn.BatchNorm1d(5)])
def test_autograd_refuses_layers_in_training_mode(layer):
    encoder = nn.Sequential(nn.Linear(6, 5), layer)
    with pytest.raises(ValueError, match=rf"layer '1', {type(layer).__name__}.*use method='projection', or encoder.eval"):
        FV.jacobian_frobenius(encoder, torch.zeros(3, 6), method="autograd")
    assert FV.jacobian_frobenius(encoder.eval(), torch.zeros(3, 6), method="autograd") > 0


W = torch.rand(3, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), [1.0]), TypeError, "x: got list, takes a tensor"),
        (lambda: FV.jacobian_frobenius("mlp", W), TypeError, "encoder: got str, takes a module"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, method="best"), ValueError, "method: got 'best', takes one of 'auto'"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, reduction="none"), ValueError, "reduction: got 'none', takes one of 'batchmean'"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, num_projections=0), ValueError, "num_projections: got 0, takes an integer >= 1"),
        (lambda: FV.jacobian_frobenius(mlp((5, 3)), W, chunk_size=0), ValueError, "chunk_size: got 0, takes an integer >= 1"),
        (lambda: FV.jacobian_frobenius(mlp((5, 4, 3)), W, method="closed_form"), ValueError, "use method='gram'"),
        (lambda: FV.jacobian_frobenius(nn.Linear(5, 4), W.view(3, 1, 5), method="gram"), ValueError, "gets an input of 3 dimensions"),
        (lambda: FV.jacobian_frobenius(lambda x: (x, x), W, method="projection"), TypeError, "encoder: gave tuple, has to give a tensor"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


ENCODERS = {
    "closed_form": lambda: (mlp((6, 5)), torch.randn(7, 6)),
    "gram": lambda: (mlp((20, 6, 4)), torch.randn(7, 20)),
    "projection": lambda: (conv_encoder(), torch.randn(7, 1, 6, 6)),
    "autograd": lambda: (conv_encoder(), torch.randn(7, 1, 6, 6)),
}


# The Gram form has a row in tests/_calls.py.
without_row = pytest.mark.parametrize("method", ["closed_form", "projection", "autograd"])


COMPILED = {method: (method, ENCODERS[method]) for method in ("closed_form", "projection", "autograd")}
COMPILED["attention"] = ("projection", lambda: (Attention(3), torch.randn(7, 4, 4)))


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_as_one_graph(name):
    torch.compiler.reset()
    method, make = COMPILED[name]
    encoder, x = make()
    parameters = list(encoder.parameters())

    def penalty(x):
        return FV.jacobian_frobenius(encoder, x, method=method, num_projections=2) * 2

    results = []
    for function in (torch.compile(penalty, fullgraph=True, backend="aot_eager"), penalty):
        torch.manual_seed(5)
        value = function(x)
        results.append([value, *torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@each_place(OPERATOR)
@without_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(place, method, dtype):
    encoder, x = (t.to(place.device) for t in ENCODERS[method]())
    results = []
    for enabled in (True, False):
        torch.manual_seed(2)
        with torch.autocast(place.device, dtype, enabled=enabled):
            norm = FV.jacobian_frobenius(encoder, x, method=method)
        assert norm.dtype == torch.float32
        results.append((norm, torch.autograd.grad(norm, next(encoder.parameters()))[0]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0.05, atol=0)
    assert F.cosine_similarity(results[0][1].flatten(), results[1][1].flatten(), dim=0) > 0.98


@each_place(GRAM)
def test_backward_under_autocast(place):
    """The gradients of single norms, which the backward pass computes again."""
    encoder, x = (t.to(place.device) for t in ENCODERS["gram"]())
    results = []
    for enabled in (True, False):
        with torch.autocast(place.device, torch.bfloat16, enabled=enabled):
            norms = FV.jacobian_frobenius(encoder, x, method="gram", reduction="sample")
            results.append(torch.autograd.grad(norms.sum(), next(encoder.parameters()))[0])
    assert F.cosine_similarity(results[0].flatten(), results[1].flatten(), dim=0) > 0.98


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ENCODERS)
def test_a_bfloat16_model(place, method):
    encoder, x = (t.to(place.device, torch.bfloat16) for t in ENCODERS[method]())
    norm = FV.jacobian_frobenius(encoder, x, method=method)
    norm.backward()
    assert norm.dtype == torch.float32
    assert next(encoder.parameters()).grad.dtype == torch.bfloat16


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ENCODERS)
def test_no_grad(place, method):
    encoder, x = (t.to(place.device) for t in ENCODERS[method]())
    torch.manual_seed(0)
    expected = FV.jacobian_frobenius(encoder, x, method=method)
    torch.manual_seed(0)
    with torch.no_grad():
        norm = FV.jacobian_frobenius(encoder, x, method=method)
    assert not norm.requires_grad
    torch.testing.assert_close(norm, expected.detach())


@each_place(OPERATOR)
@pytest.mark.parametrize("method", ENCODERS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_output_from_the_same_pass(place, method, chunk_size):
    encoder, x = (t.to(place.device) for t in ENCODERS[method]())
    calls = []
    if method in ("projection", "autograd"):  # the others do not call it
        encoder.register_forward_hook(lambda *_: calls.append(1))
    norm, output = FV.jacobian_frobenius(encoder, x, method=method, chunk_size=chunk_size, with_output=True)
    assert len(calls) == ((1 if chunk_size is None else 3) if method in ("projection", "autograd") else 0)
    assert norm.shape == ()
    expected = encoder(x)
    torch.testing.assert_close(output, expected)
    parameters = list(encoder.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(output.square().sum(), parameters), torch.autograd.grad(expected.square().sum(), parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
