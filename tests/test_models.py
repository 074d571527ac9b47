"""The VAEs against their formulas, and the networks against their specification."""

import math

import pytest
import torch
from _helpers import Source, each_place
from torch import nn

from fastvae.distributions import GaussianLikelihood
from fastvae.models import VAE, VAEOutput
from fastvae.nn import CapacitySchedule, LinearSchedule
from fastvae.reference import latent, reconstruction

EACH_PLACE = each_place("reconstruction_forward")
EACH_NETWORK = pytest.mark.parametrize("make", [VAE.conv, VAE.mlp], ids=["conv", "mlp"])


def images(count=5, device="cpu"):
    return Source(device).image(count, 1, 28, 28)


def tiny_vae(**options):
    torch.manual_seed(0)
    return VAE.mlp(data_shape=(1, 4, 4), hidden=(8,), latent_dim=2, **options)


def tiny_batch(count=6):
    source = Source("cpu")
    return source.uniform(count, 1, 4, 4), source.normal(count, 2)


def layers_of(module):
    return [part for part in module.modules() if not list(part.children())]


def describe(layer):
    """A layer as the specification writes it."""
    if isinstance(layer, nn.ConvTranspose2d):
        return "ConvT", layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.output_padding
    if isinstance(layer, nn.Conv2d):
        return "Conv", layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding
    if isinstance(layer, nn.Linear):
        return "Linear", layer.in_features, layer.out_features
    return (type(layer).__name__,)


def test_conv_vae_is_the_network_of_the_specification():
    model = VAE.conv(latent_dim=20)
    pairs = (3, 3), (2, 2), (1, 1)
    assert [describe(layer) for layer in layers_of(model.encoder)] == [
        ("Conv", 1, 32, *pairs),
        ("ReLU",),
        ("Conv", 32, 64, *pairs),
        ("ReLU",),
        ("Flatten",),
        ("Linear", 3136, 256),
        ("ReLU",),
        ("Linear", 256, 40),
    ]
    assert [describe(layer) for layer in layers_of(model.decoder)] == [
        ("Linear", 20, 256),
        ("ReLU",),
        ("Linear", 256, 3136),
        ("ReLU",),
        ("Unflatten",),
        ("ConvT", 64, 32, *pairs, (1, 1)),
        ("ReLU",),
        ("ConvT", 32, 1, *pairs, (1, 1)),
    ]
    encoder = (1 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + (3136 + 1) * 256 + (256 + 1) * 40
    decoder = (20 + 1) * 256 + (256 + 1) * 3136 + (64 * 9 * 32 + 32) + (32 * 9 + 1)
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder


def test_mlp_vae_is_784_400_20():
    layers = layers_of(VAE.mlp())
    linear = [describe(layer)[1:] for layer in layers if isinstance(layer, nn.Linear)]
    assert linear == [(784, 400), (400, 40), (20, 400), (400, 784)]
    assert VAE.mlp(784)(torch.rand(3, 784)).recon.shape == (3, 784)


@EACH_NETWORK
@EACH_PLACE
def test_shapes_and_gradients(place, make):
    model, x = make(latent_dim=3).to(place.device), images(device=place.device)
    output = model(x)
    assert isinstance(output, VAEOutput)
    assert [tuple(t.shape) for t in output] == [(), (), (), (5, 1, 28, 28), (5, 3), (5, 3), (5, 3)]
    output.loss.backward()
    for parameter in model.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0


OPTIONS = [
    {},
    {"beta": 4.0},
    {"free_bits": 0.05},
    {"beta": 3.0, "capacity": 0.1},
    {"beta": 3.0, "capacity": 50.0},
    {"num_samples": 3, "beta": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("likelihood", ["bernoulli_logits", "gaussian"])
def test_loss_is_its_formula(likelihood, options):
    model = tiny_vae(likelihood=likelihood, **options).double()
    x, _ = tiny_batch()
    samples = options.get("num_samples", 1)
    eps = torch.randn(samples, 6, 2, dtype=torch.float64)
    output = model(x.double(), eps=eps if "num_samples" in options else eps[0])

    mu, logvar = model.encode(x.double())
    terms = []
    for noise in eps:
        recon = model.decode(mu + torch.exp(0.5 * logvar) * noise)
        if likelihood == "gaussian":
            terms.append((0.5 * (recon - x) ** 2 + 0.5 * math.log(2 * math.pi)).sum() / 6)
        else:
            terms.append(reconstruction.binary_cross_entropy_with_logits(recon, x.double(), reduction="batchmean"))
    kl = latent.kl_normal(mu, logvar, free_bits=options.get("free_bits", 0.0))
    capacity = options.get("capacity")
    penalty = kl if capacity is None else abs(kl - capacity)
    torch.testing.assert_close(output.recon_loss, sum(terms) / samples)
    torch.testing.assert_close(output.kl, kl)
    torch.testing.assert_close(output.loss, sum(terms) / samples + options.get("beta", 1.0) * penalty)


def test_num_samples_are_the_first_dimension():
    x, _ = tiny_batch()
    output = tiny_vae(num_samples=3)(x)
    assert output.z.shape == (3, 6, 2)
    assert output.recon.shape == (3, 6, 1, 4, 4)


@EACH_NETWORK
@EACH_PLACE
def test_8_bit_images_are_their_values_over_255(place, make):
    model, x = make(latent_dim=3).to(place.device), images(device=place.device)
    eps = torch.randn(5, 3, device=place.device)
    from_bytes, from_floats = model(x, eps=eps), model(x.float() / 255, eps=eps)
    torch.testing.assert_close(from_bytes, from_floats, rtol=1e-6, atol=1e-5)
    assert torch.equal(model.reconstruct(x), model.reconstruct(x.float() / 255))


def test_bernoulli_takes_probabilities():
    logits, x = tiny_vae(), tiny_batch()[0]
    probabilities = VAE(logits.encoder, nn.Sequential(logits.decoder, nn.Sigmoid()), 2, likelihood="bernoulli")
    eps = torch.randn(6, 2)
    torch.testing.assert_close(probabilities(x, eps=eps).loss, logits(x, eps=eps).loss)
    torch.testing.assert_close(probabilities.reconstruct(x), logits.reconstruct(x))


def test_learned_variance_is_trained_with_the_model():
    model = tiny_vae(likelihood=GaussianLikelihood("global", logvar=-1.0)).double()
    x, eps = (t.double() for t in tiny_batch())
    output = model(x, eps=eps)
    squared_error = (output.recon - x) ** 2
    density = 0.5 * (math.log(2 * math.pi) - 1.0 + squared_error * math.e)
    torch.testing.assert_close(output.recon_loss, density.sum() / 6)
    output.loss.backward()
    torch.testing.assert_close(model.likelihood.logvar.grad, 0.5 * (1.0 - squared_error * math.e).sum() / 6)
    assert "likelihood.logvar" in dict(model.named_parameters())


def test_encoder_may_give_a_pair():
    class Pair(nn.Module):
        def forward(self, x):
            return x[:, :2], x[:, 2:]

    x, decoder = torch.randn(3, 4), nn.Linear(2, 4)
    for given, expected in zip(VAE(Pair(), decoder).encode(x), VAE(nn.Identity(), decoder).encode(x), strict=True):
        assert torch.equal(given, expected)


def test_an_encoder_that_cannot_be_split_is_named():
    with pytest.raises(ValueError, match=r"^encoder: gave shape \(3, 5\)"):
        VAE(nn.Identity(), nn.Identity()).encode(torch.randn(3, 5))


def test_unknown_likelihood_is_named():
    with pytest.raises(ValueError, match=r"^likelihood: got 'poisson', takes one of"):
        VAE.conv(likelihood="poisson")


def test_sampling_without_a_latent_shape_is_an_error():
    with pytest.raises(ValueError, match=r"^latent_shape: got None"):
        VAE(nn.Identity(), nn.Linear(2, 4)).sample(3)


def test_latents_may_have_any_shape():
    encoder, decoder = nn.Conv2d(1, 6, 2, stride=2), nn.ConvTranspose2d(3, 1, 2, stride=2)
    model, x = VAE(encoder, decoder, (3, 4, 4), num_samples=2), torch.rand(5, 1, 8, 8)
    output = model(x)
    assert output.z.shape == (2, 5, 3, 4, 4)
    assert model.sample(7).shape == (7, 1, 8, 8)
    assert model.interpolate(x[:2], x[2:4], steps=6).shape == (2, 6, 1, 8, 8)
    torch.testing.assert_close(output.kl, latent.kl_normal(output.mu, output.logvar))


def test_sample_decodes_draws_from_the_prior():
    model = tiny_vae()
    drawn = [model.sample(4, torch.Generator().manual_seed(1)) for _ in range(2)]
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(*drawn)
    torch.testing.assert_close(drawn[0], model.decode(z).sigmoid())
    assert not drawn[0].requires_grad


def test_reconstruct_decodes_the_mean():
    model, x = tiny_vae(), tiny_batch()[0]
    torch.testing.assert_close(model.reconstruct(x), model.decode(model.encode(x)[0]).sigmoid().detach())
    gaussian = tiny_vae(likelihood="gaussian")
    torch.testing.assert_close(gaussian.reconstruct(x), gaussian.decode(gaussian.encode(x)[0]).detach())


def test_interpolation_runs_from_one_reconstruction_to_the_other():
    model, x = tiny_vae(), tiny_batch()[0]
    path = model.interpolate(x[:3], x[3:], steps=5)
    assert path.shape == (3, 5, 1, 4, 4)
    torch.testing.assert_close(path[:, 0], model.reconstruct(x[:3]))
    torch.testing.assert_close(path[:, -1], model.reconstruct(x[3:]))
    middle = (model.encode(x[:3])[0] + model.encode(x[3:])[0]) / 2
    torch.testing.assert_close(path[:, 2], model.decode_mean(middle).detach())


def test_anomaly_score_is_the_negative_bound_of_each_sample():
    class Constant(nn.Module):
        def forward(self, z):
            return z.new_full((len(z), 1, 4, 4), 0.5)

    x, _ = tiny_batch()
    model = VAE(tiny_vae().encoder, Constant(), 2, beta=5.0, free_bits=9.0)
    mu, logvar = model.encode(x)
    nats = reconstruction.binary_cross_entropy_with_logits(torch.full_like(x, 0.5), x, reduction="sample")
    torch.testing.assert_close(model.anomaly_score(x, num_samples=3), nats + latent.kl_normal(mu, logvar, reduction="sample").detach())


def test_anomaly_score_averages_over_samples():
    model, x = tiny_vae(), tiny_batch()[0]
    score = model.anomaly_score(x, num_samples=2, generator=torch.Generator().manual_seed(3))
    assert torch.equal(score, model.anomaly_score(x, num_samples=2, generator=torch.Generator().manual_seed(3)))
    many = model.anomaly_score(x, num_samples=4000)
    mean_loss = torch.stack([model(x).loss for _ in range(400)]).mean()
    torch.testing.assert_close(many.mean(), mean_loss.detach(), rtol=1e-2, atol=0)


def test_training_learns():
    torch.manual_seed(0)
    model, x = tiny_vae(), tiny_batch()[0].round()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = model(x).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_checkpoint_keeps_the_schedules():
    options = {"beta": LinearSchedule(4), "capacity": CapacitySchedule(4, end=8.0)}
    model, resumed = tiny_vae(**options), tiny_vae(**options)
    model.kl_penalty.step()
    resumed.load_state_dict(model.state_dict())
    x, eps = tiny_batch()
    output = resumed(x, eps=eps)
    torch.testing.assert_close(output.loss, output.recon_loss + 0.25 * (output.kl - 2.0).abs())
    assert torch.equal(output.loss, model(x, eps=eps).loss)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.uint8], ids=str)
def test_whole_loss_compiles(x_dtype):
    model, (x, eps) = tiny_vae(beta=LinearSchedule(4, start=0.5), free_bits=0.01), tiny_batch()
    x = (255 * x).to(torch.uint8) if x_dtype == torch.uint8 else x
    compiled = torch.compile(lambda x, eps: model(x, eps).loss, fullgraph=True)
    expected = model(x, eps).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = compiled(x, eps)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients)


@pytest.mark.parametrize("options", [{}, {"num_samples": 2, "likelihood": "gaussian"}], ids=str)
def test_whole_loss_compiles_with_drawn_noise(options):
    model, (x, _) = tiny_vae(**options), tiny_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first.z, second.z)
    first.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


@EACH_NETWORK
@EACH_PLACE
def test_autocast(place, make):
    torch.manual_seed(0)
    model, x = make(latent_dim=3).to(place.device), images(device=place.device)
    eps = torch.randn(5, 3, device=place.device)
    with torch.autocast(place.device, torch.bfloat16):
        output = model(x, eps=eps)
    assert output.recon.dtype == output.z.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(x, eps=eps).loss, rtol=1e-2, atol=0)
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_model_takes_8_bit_images():
    model = VAE.conv(latent_dim=3).to(torch.bfloat16)
    output = model(images())
    assert output.recon.dtype == torch.bfloat16
    assert output.loss.isfinite()
