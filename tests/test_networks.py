"""The ready-made networks: their shapes, the options of their layers, and that models of them learn, compile and are stored."""

import math

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source, brief
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.parametrize import is_parametrized

from fastvae.distributions import CholeskyPosterior, DiscretizedLogisticLikelihood, LaplaceLikelihood, LogisticMixtureLikelihood
from fastvae.models import AE, VAE, WAE, DeepVAE, ImageVAE, StackedAE, networks
from fastvae.models.networks import KeyValueCache, Layers, TransformerBlock
from fastvae.models.networks.layers import activation_gain
from fastvae.nn import GroupNormSiLU

pytestmark = pytest.mark.usefixtures("one_thread")

ACTIVATIONS = ("sigmoid", "tanh", "relu", "leaky_relu", "silu")
SMALL = {
    "mlp": lambda **options: VAE.mlp((1, 8, 8), (32,), 4, **options),
    "strided_conv": lambda **options: VAE.strided_conv(8, 1, (8, 16), (32,), 4, **options),
    "transformer": lambda **options: VAE.transformer(8, 1, 4, 32, 2, 2, 4, **options),
    "transformer_mean": lambda **options: VAE.transformer(8, 1, 4, 32, 2, 2, 4, pooling="mean", **options),
    "residual": lambda **options: ImageVAE.residual(1, (8, 16), 1, 4, 2, image_size=8, precision="float32", **options),
}
OFTEN = ["mlp", "strided_conv"]
EACH_NETWORK = pytest.mark.parametrize("make", SMALL.values(), ids=SMALL)


def weighted(module: nn.Module) -> list[nn.Module]:
    return [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]


def pictures(count: int = 64) -> torch.Tensor:
    """Blocks of 4 x 4 pixels that are on or off."""
    coarse = torch.randint(2, (count, 1, 2, 2), generator=torch.Generator().manual_seed(0)).float()
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("image_size", [(7, 10), (28, 28), (1, 33)], ids=str)
@pytest.mark.parametrize("hidden", [(), (12,)], ids=str)
def test_strided_convolutions_serve_every_size(image_size, hidden):
    encoder, decoder = networks.strided_conv(image_size, 3, (4, 6), hidden, 5, code_dim=9, output="sigmoid")
    x = Source("cpu").uniform(2, 3, *image_size)
    assert encoder(x).shape == (2, 9)
    recon = decoder(torch.randn(2, 5))
    assert recon.shape == x.shape
    assert ((recon > 0) & (recon < 1)).all()
    assert len(encoder) == len(decoder) == 3 + len(hidden)


def test_by_default_strided_convolutions_are_the_network_of_the_tutorials():
    general, tutorial = VAE.strided_conv(), VAE.conv()
    assert repr(general.encoder) == repr(tutorial.encoder)
    assert repr(general.decoder) == repr(tutorial.decoder)


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_a_transformer_sees_every_patch_and_where_it_is(pooling):
    torch.manual_seed(0)
    encoder, decoder = networks.transformer((8, 12), 2, 4, 16, 2, 4, 5, code_dim=10, pooling=pooling)
    x = Source("cpu").uniform(1, 2, 8, 12)
    code = encoder(x)
    assert code.shape == (1, 10)
    for row, column in ((0, 0), (4, 8)):
        changed = x.clone()
        changed[:, :, row : row + 4, column : column + 4] = 0
        assert not torch.allclose(encoder(changed), code, atol=1e-5)
    assert not torch.allclose(encoder(x.roll(4, 3)), code, atol=1e-5)
    recon = decoder(torch.randn(3, 5))
    assert recon.shape == (3, 2, 8, 12)
    # Each patch depends on the code.
    patches = recon.unfold(2, 4, 4).unfold(3, 4, 4)
    assert ((patches[0] - patches[1]).abs().amax((0, 3, 4)) > 1e-4).all()


def test_patches_are_put_back_where_they_were_cut():
    *_, unpatch = networks.transformer((6, 9), 2, 3, 18, 1, 1, 4, pooling="mean")[1]
    unpatch.norm, unpatch.project = nn.Identity(), nn.Identity()
    x = Source("cpu").normal(2, 2, 6, 9)
    patches = F.unfold(x, 3, stride=3).mT
    assert torch.equal(unpatch(patches), x)


def test_a_block_is_its_formula():
    torch.manual_seed(0)
    block, x = TransformerBlock(8, 2, causal=True).double(), torch.randn(3, 5, 8, dtype=torch.float64)
    query, key, value = block.qkv(block.norm1(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) / 2
    weights = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -math.inf).softmax(-1)
    h = x + block.out(torch.einsum("bhij,bhjd->bihd", weights, value).flatten(2))
    torch.testing.assert_close(block(x), h + block.mlp(block.norm2(h)))


def test_a_cache_gives_what_the_whole_sequence_gives():
    torch.manual_seed(0)
    block, x, cache = TransformerBlock(8, 2, causal=True), torch.randn(3, 5, 8), KeyValueCache(5)
    steps = torch.cat([block(x[:, i : i + 1], cache) for i in range(5)], dim=1)
    torch.testing.assert_close(steps, block(x))


def test_the_gain_keeps_the_scale_of_an_activation():
    """E[(gain * f(a))^2] = 1 for a ~ N(0, 1), where the gain is one that follows from that."""
    a = torch.linspace(-12, 12, 100_001, dtype=torch.float64)
    density = torch.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
    for name, function in (("identity", lambda t: t), ("relu", F.relu), ("leaky_relu", F.leaky_relu), ("silu", F.silu)):
        moment = torch.trapezoid(density * function(a) ** 2, a)
        assert float(moment) * activation_gain(name) ** 2 == pytest.approx(1, abs=2e-6)
    assert activation_gain("tanh") == nn.init.calculate_gain("tanh")


LAYERS = {
    "linear": (lambda: nn.Linear(200, 300), (64, 200), 200),
    "conv": (lambda: nn.Conv2d(30, 40, 3, stride=2), (8, 30, 33, 33), 270),
    "transposed": (lambda: nn.ConvTranspose2d(40, 30, 4, stride=2), (8, 40, 16, 16), 160),
}


@pytest.mark.parametrize(("make", "shape", "inputs"), LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_he_weights_follow_the_number_of_inputs(make, shape, inputs, activation):
    torch.manual_seed(0)
    layer = Layers(activation, init="he").prepare(make(), activation)
    assert float(layer.weight.detach().std()) == pytest.approx(activation_gain(activation) / math.sqrt(inputs), rel=0.03)
    assert (layer.bias == 0).all()
    inner = layer(torch.randn(shape)).detach()[(..., *[slice(4, -4)] * (len(shape) - 2))]
    assert float(inner.std()) == pytest.approx(activation_gain(activation), rel=0.1)


@pytest.mark.parametrize(("make", "shape", "inputs"), LAYERS.values(), ids=LAYERS)
def test_xavier_weights_are_those_of_torch(make, shape, inputs):
    layer, expected = make(), make()
    torch.manual_seed(0)
    Layers(init="xavier").prepare(layer, "tanh")
    torch.manual_seed(0)
    nn.init.xavier_uniform_(expected.weight, nn.init.calculate_gain("tanh"))
    assert torch.equal(layer.weight, expected.weight)
    assert (layer.bias == 0).all()


@EACH_NETWORK
def test_every_option_reaches_every_layer(make):
    torch.manual_seed(0)
    plain, model = make(), make(activation="tanh", init="he", dropout=0.25, spectral_norm=True)
    kinds = [type(module) for module in model.modules()]
    assert nn.Tanh in kinds
    assert not {nn.ReLU, nn.SiLU} & set(kinds)
    assert all(norm.activation == "none" for norm in model.modules() if isinstance(norm, GroupNormSiLU))
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}
    assert not [module for module in plain.modules() if isinstance(module, nn.Dropout)]
    assert len(weighted(model)) == len(weighted(plain)) > 0
    for layer in weighted(model):
        assert is_parametrized(layer, "weight")
        assert (layer.bias == 0).all()
    model.eval()
    assert all(torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < 1.5 for layer in weighted(model) if isinstance(layer, nn.Linear))
    x = pictures(3)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x))
    assert model.sample(2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@EACH_NETWORK
def test_every_activation_trains(make, activation):
    torch.manual_seed(0)
    model = make(activation=activation, init="xavier")
    model(pictures(4)).loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("make", brief(SMALL, OFTEN))
def test_models_overfit_64_pictures(make):
    torch.manual_seed(0)
    model, x = make(init="xavier", beta=0.1), pictures()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(180):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    assert F.mse_loss(model.reconstruct(x), x).item() < 0.03


@EACH_NETWORK
def test_posteriors_and_likelihoods_set_the_sizes(make):
    torch.manual_seed(0)
    x = pictures(3)
    model = make(likelihood=LaplaceLikelihood("per_element"))
    output = model(x)
    assert output.recon.shape == (3, 2, 8, 8)
    assert model.sample(2).shape == (2, 1, 8, 8)
    if len(model.latent_shape) == 1:
        covariance = make(posterior=CholeskyPosterior())
        assert covariance.encode(x).factor.shape == (3, 4, 4)
        assert covariance(x).loss.isfinite()


@EACH_NETWORK
def test_models_are_stored_with_their_options(make, tmp_path):
    pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model, x = make(activation="leaky_relu", init="he", dropout=0.1, spectral_norm=True), pictures(3)
    model(x)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.recipe.options["activation"] == "leaky_relu"
    assert torch.equal(loaded.reconstruct(x), model.reconstruct(x))


@pytest.mark.parametrize("make", brief(SMALL, OFTEN))
def test_the_loss_compiles(make):
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = make(spectral_norm=True).eval(), pictures(3)
    eps = torch.randn_like(model(x).z)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, eps).loss, model(x, eps).loss)


@EACH_NETWORK
def test_models_run_in_bfloat16(make):
    torch.manual_seed(0)
    model, x = make(), pictures(8)
    eps = torch.randn_like(model(x).z)
    expected = model(x, eps)
    output = model.bfloat16()(x.bfloat16(), eps.bfloat16())
    assert output.recon.dtype == torch.bfloat16
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=3e-2, atol=0)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@EACH_NETWORK
def test_models_are_made_and_run_without_data(make):
    with FakeTensorMode():
        model = make(init="he", dropout=0.1)
        output = model(torch.rand(5, 1, 8, 8))
        output.loss.backward()
    assert output.recon.shape == (5, 1, 8, 8)


@pytest.mark.parametrize("kind", [AE, StackedAE, WAE])
def test_autoencoders_have_the_networks(kind):
    torch.manual_seed(0)
    x = pictures(5)
    for model in (kind.strided_conv(8, 1, (4,), (8,), 3, code="tanh"), kind.transformer(8, 1, 4, 16, 1, 2, 3, code="tanh")):
        assert type(model) is kind
        assert model(x).recon.shape == x.shape
        assert model.encode(x).abs().max() < 1
        assert ((model.reconstruct(x) > 0) & (model.reconstruct(x) < 1)).all()


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_each_stage_of_a_transformer_is_an_autoencoder(pooling):
    torch.manual_seed(0)
    model, x = StackedAE.transformer(8, 1, 4, 16, 2, 2, 3, pooling=pooling, dropout=0.1), pictures(4)
    history = model.pretrain([x], epochs=2)
    assert [len(losses) for losses in history] == [2] * 4
    assert all(math.isfinite(loss) for losses in history for loss in losses)


BAD = {
    "activation": (lambda: VAE.mlp(activation="gelu"), "activation: got 'gelu', takes one of 'identity', 'sigmoid', 'tanh'"),
    "output": (lambda: AE.strided_conv(output="softmax"), "output: got 'softmax', takes one of"),
    "code": (lambda: AE.transformer(code="softmax"), "code: got 'softmax', takes one of"),
    "init": (lambda: VAE.transformer(init="kaiming"), "init: got 'kaiming', takes one of 'default', 'xavier', 'he'"),
    "dropout": (lambda: ImageVAE.residual(dropout=1.0), r"dropout: got 1.0, takes a number in \[0, 1\)"),
    "pooling": (lambda: VAE.transformer(pooling="max"), "pooling: got 'max', takes one of 'token', 'mean'"),
    "patch_size": (lambda: VAE.transformer(28, patch_size=5), "patch_size: got 5 for images of 28 x 28, takes a divisor of both"),
    "heads": (lambda: VAE.transformer(heads=3), "heads: got 3, takes a divisor of width, 64"),
    "channels": (lambda: VAE.strided_conv(channels=()), "channels: got none, takes"),
    "image_size": (lambda: VAE.strided_conv((0, 4)), r"image_size: got \(0, 4\), takes integers >= 1"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


COLOURED = {
    "mlp": lambda **options: VAE.mlp((3, 8, 8), (32,), 4, **options),
    "strided_conv": lambda **options: VAE.strided_conv(8, 3, (8, 16), (32,), 4, **options),
    "transformer": lambda **options: VAE.transformer(8, 3, 4, 32, 2, 2, 4, **options),
    "residual": lambda **options: ImageVAE.residual(3, (8, 16), 1, 4, 2, image_size=8, precision="float32", **options),
    "deep": lambda **options: DeepVAE.residual(8, 3, (8, 16), 1, 2, 4, **options),
}


@pytest.mark.parametrize("make", COLOURED.values(), ids=COLOURED)
@pytest.mark.parametrize(
    "likelihood",
    [LogisticMixtureLikelihood(2), DiscretizedLogisticLikelihood(), LaplaceLikelihood("per_element")],
    ids=lambda one: type(one).__name__,
)
def test_a_decoder_gives_what_the_likelihood_of_colours_takes(make, likelihood):
    """Ten numbers of two logistics for three channels are no multiple of three."""
    model = make(likelihood=likelihood)
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    output = model(x)
    assert output.recon.shape == (2, likelihood.parameters_for(3), 8, 8)
    assert output.loss.isfinite()
    assert model.sample(2).shape == model.reconstruct(x).shape == (2, 3, 8, 8)
