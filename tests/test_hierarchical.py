"""The hierarchies of latents against their formulas: a ladder of linear networks has an exact log p(x)."""

import math

import pytest
import torch
from _helpers import brief
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from fastvae.distributions import GaussianLikelihood, LogisticMixtureLikelihood
from fastvae.distributions.normal import DiagonalNormal
from fastvae.models import DeepVAE, HierarchicalVAE, HierarchyOutput, LadderVAE, registry
from fastvae.models._top_down import SEED_STEP
from fastvae.models.deep_vae import ResidualLevel
from fastvae.models.ladder_vae import LadderEncoder, LadderLevel
from fastvae.nn import LinearSchedule

pytestmark = pytest.mark.usefixtures("one_thread")

TOP, BOTTOM, DATA, BATCH = 2, 3, 4, 5

NETWORKS = {
    "ladder": lambda **options: LadderVAE.mlp((1, 8, 8), (16, 12, 10), (4, 3, 2), **options),
    "plain ladder": lambda **options: LadderVAE.mlp((1, 8, 8), (16, 12), (4, 3), posterior="plain", **options),
    "deep": lambda **options: DeepVAE.residual(8, 1, (2, 4), (1, 2), 2, groups=2, **options),
    "deep without the finest": lambda **options: DeepVAE.residual((8, 4), 1, (4, 4, 8), (0, 1, 1), 2, groups=2, **options),
}
each_network = pytest.mark.parametrize("name", NETWORKS)
each_posterior = pytest.mark.parametrize("posterior", ["precision_weighted", "plain"])


def tiny(name: str, **options) -> HierarchicalVAE:
    torch.manual_seed(0)
    return NETWORKS[name](**options)


def batch(name: str, count: int = BATCH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (1, 8, 4) if name == "deep without the finest" else (1, 8, 8)
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def noise(model: HierarchicalVAE, x: torch.Tensor, seed: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(q.mu.shape, generator=generator, dtype=q.mu.dtype) for q in model.encode(x)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear_ladder(posterior: str = "precision_weighted", **options) -> LadderVAE:
    """Two levels of linear networks in float64 with a Gaussian likelihood of unit variance; the variances do not depend on anything."""
    torch.manual_seed(0)
    codes = [nn.Linear(DATA, 2 * BOTTOM), nn.Linear(DATA, 2 * TOP)]
    encoder = LadderEncoder([nn.Identity(), nn.Identity()], codes)
    prior = nn.Linear(TOP, 2 * BOTTOM)
    with torch.no_grad():
        prior.weight[BOTTOM:] = 0
    return LadderVAE(encoder, [prior], nn.Linear(BOTTOM, DATA), TOP, posterior=posterior, likelihood="gaussian", **options).double()


def moments(q: DiagonalNormal) -> Normal:
    return Normal(q.mu, (q.logvar / 2).exp())


@each_posterior
def test_the_bound_is_the_hand_written_sum(posterior):
    model, x = linear_ladder(posterior, beta=3.0), normal(BATCH, DATA)
    top_eps, bottom_eps = normal(BATCH, TOP, seed=1), normal(BATCH, BOTTOM, seed=2)
    output = model(x, eps=(top_eps, bottom_eps))

    bottom_code, top_code = model.encoder.codes
    top = moments(DiagonalNormal(*top_code(x).chunk(2, 1)))
    z_top = top.mean + top.stddev * top_eps
    prior = moments(DiagonalNormal(*model.levels[1].network(z_top).chunk(2, 1)))
    bottom = moments(DiagonalNormal(*bottom_code(x).chunk(2, 1)))
    if posterior == "precision_weighted":
        precision = 1 / bottom.variance + 1 / prior.variance
        mean = (bottom.mean / bottom.variance + prior.mean / prior.variance) / precision
        bottom = Normal(mean, precision.rsqrt())
    z_bottom = bottom.mean + bottom.stddev * bottom_eps
    recon = model.decoder(z_bottom)
    recon_loss = (0.5 * (x - recon).square() + 0.5 * math.log(2 * math.pi)).sum(1).mean()
    kls = kl_divergence(top, Normal(0.0, 1.0)).sum(1).mean(), kl_divergence(bottom, prior).sum(1).mean()

    assert isinstance(output, HierarchyOutput)
    torch.testing.assert_close(output.recon_loss, recon_loss)
    torch.testing.assert_close(output.kls, kls)
    torch.testing.assert_close(output.kl, sum(kls))
    torch.testing.assert_close(output.loss, recon_loss + 3 * sum(kls))
    torch.testing.assert_close(output.z, (z_top, z_bottom))
    torch.testing.assert_close(output.mu, (top.mean, bottom.mean))
    torch.testing.assert_close(output.logvar, (top.variance.log(), bottom.variance.log()))
    torch.testing.assert_close(output.recon, recon)


@each_network
def test_kls_of_all_levels_are_those_of_torch(name):
    model, x = tiny(name).double(), batch(name, dtype=torch.float64)
    output = model(x, eps=noise(model, x))
    assert len(output.kls) == len(model.levels)
    # The priors are those of the draws of the levels above.
    state = model.started(len(x))
    for level, z, kl, q in zip(model.levels, output.z, output.kls, zip(output.mu, output.logvar, strict=True), strict=True):
        expected = kl_divergence(moments(DiagonalNormal(*q)), moments(level.prior(state)))
        torch.testing.assert_close(kl, expected.flatten(1).sum(1).mean())
        state = level.merge(state, z)
    torch.testing.assert_close(output.kl, sum(output.kls))


@each_network
def test_the_bound_is_the_mean_of_log_weights(name):
    """By Monte Carlo: the KLs of the bound against the densities of the weights."""
    model, x = tiny(name).double(), batch(name, 2, torch.float64)
    with torch.no_grad():
        weights = model.log_weights(x, 1000, generator=torch.Generator().manual_seed(0))
    score = model.anomaly_score(x, 1000, torch.Generator().manual_seed(1))
    assert weights.shape == (1000, 2)
    error = 5 * 2**0.5 * weights.std(0) / 1000**0.5
    assert ((weights.mean(0) + score).abs() < error).all()
    first = model.log_weights(x, 1, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.log_prob_bound(x, 1, generator=torch.Generator().manual_seed(2)), first[0].detach())


def exact_log_prob(model: LadderVAE, x: torch.Tensor) -> torch.Tensor:
    """log p(x) of the linear ladder: all of its variables are jointly normal."""
    prior, decoder = model.levels[1].network, model.decoder
    mean = prior.bias[:BOTTOM]
    covariance = prior.weight[:BOTTOM] @ prior.weight[:BOTTOM].T + prior.bias[BOTTOM:].exp().diag()
    covariance = decoder.weight @ covariance @ decoder.weight.T + torch.eye(DATA, dtype=torch.float64)
    return MultivariateNormal(decoder(mean), covariance).log_prob(x).detach()


@each_posterior
def test_bounds_rise_to_the_exact_log_probability(posterior):
    model, x = linear_ladder(posterior), normal(BATCH, DATA)
    with torch.no_grad():
        # Where a posterior is narrower than p(z | x), the weights have an infinite variance and many samples do not help.
        for code in model.encoder.codes:
            code.weight.mul_(0.3)
            code.bias.copy_(torch.tensor([0.0, 0.5]).repeat_interleave(len(code.bias) // 2))
    exact = exact_log_prob(model, x)
    generator = torch.Generator().manual_seed(0)
    repeated = x.repeat(400, 1)
    bounds = [model.log_prob_bound(repeated, k, generator=generator).view(400, BATCH) for k in (1, 5, 50)]
    means = [bound.mean(0) for bound in bounds]
    slack = 5 * bounds[-1].std(0) / 400**0.5
    assert (means[0] < means[1]).all()
    assert (means[1] < means[2] + slack).all()
    assert (means[2] < exact + slack).all()
    with torch.no_grad():
        ratios = (model.log_weights(x, 20_000, generator=generator) - exact).exp()
    assert ((ratios.mean(0) - 1).abs() < 5 * ratios.std(0) / 20_000**0.5).all()


def test_precisions_of_encoder_and_prior_add_up():
    level = LadderLevel(nn.Identity(), "precision_weighted")
    p = level.prior(torch.tensor([[1.0, math.log(2.0)]]))
    q = level.posterior(torch.empty(0), torch.tensor([[4.0, math.log(0.5)]]), p)
    # Precisions 1/2 and 2 give 5/2, and the mean (1/2 * 1 + 2 * 4) / (5/2).
    torch.testing.assert_close(q.mu, torch.tensor([[3.4]]))
    torch.testing.assert_close(q.logvar, torch.tensor([[math.log(0.4)]]))


def test_a_residual_posterior_is_its_prior_where_the_encoder_adds_nothing():
    level = ResidualLevel(4, 2, groups=2)
    nn.init.zeros_(level.to_posterior[-1].weight)
    nn.init.zeros_(level.to_posterior[-1].bias)
    state, feature = torch.randn(2, 3, 4, 5, 5).unbind(0)
    p = level.prior(state)
    torch.testing.assert_close(level.posterior(state, feature, p), p)


class Given(nn.Module):
    """Gives the same for every x."""

    def __init__(self, *features: torch.Tensor):
        super().__init__()
        self.features = features

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(feature.expand(len(x), -1) for feature in self.features)


def test_free_bits_of_each_level():
    # KLs to N(0, 1) at unit variance are half the squared means: 2 and 0 at the top, 0.5 and 0.02 below.
    top, bottom = torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0.2, 0.0, 0.0])
    prior = nn.Linear(2, 4)
    nn.init.zeros_(prior.weight)
    nn.init.zeros_(prior.bias)

    def kls(free_bits):
        model = LadderVAE(Given(top, bottom), [prior], nn.Linear(2, 3), 2, posterior="plain", free_bits=free_bits)
        return model(torch.rand(4, 3)).kls

    torch.testing.assert_close(torch.stack(kls(0.0)), torch.tensor([2.0, 0.52]))
    torch.testing.assert_close(torch.stack(kls(0.1)), torch.tensor([2.1, 0.6]))
    torch.testing.assert_close(torch.stack(kls((0.3, 1.0))), torch.tensor([2.3, 2.0]))


def test_the_top_has_free_bits_and_no_gradient_below_them():
    model, x = linear_ladder(free_bits=(100.0, 0.0)), normal(BATCH, DATA)
    output = model(x)
    torch.testing.assert_close(output.kls[0].item(), 200.0)
    (gradient,) = torch.autograd.grad(output.kls[0], model.encoder.codes[1].weight)
    assert not gradient.any()


@each_network
def test_shapes_and_gradients(name):
    model, x = tiny(name), batch(name)
    output = model(x)
    assert output.recon.shape == x.shape
    assert all(z.shape == mu.shape == logvar.shape for z, mu, logvar in zip(output.z, output.mu, output.logvar, strict=True))
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(("image_size", "channels"), [(28, 1), (32, 3)])
def test_latent_images_of_the_usual_sizes(image_size, channels):
    model = DeepVAE.residual(image_size, channels, (4, 8, 8), (1, 2, 1), 3, groups=4)
    x = torch.randint(256, (2, channels, image_size, image_size), dtype=torch.uint8)
    output = model(x)
    sizes = [image_size // 4, image_size // 2, image_size // 2, image_size]
    assert [tuple(z.shape) for z in output.z] == [(2, 3, size, size) for size in sizes]
    assert output.recon.is_contiguous(memory_format=torch.channels_last)
    assert model.sample(2).shape == x.shape


def test_the_paper_has_five_levels():
    model = LadderVAE.mlp(hidden=(512, 256, 128, 64, 32), latent_dims=(64, 32, 16, 8, 4))
    assert [tuple(z.shape) for z in model(torch.rand(2, 1, 28, 28)).z] == [(2, 4), (2, 8), (2, 16), (2, 32), (2, 64)]


@each_network
def test_a_likelihood_may_have_several_parameters(name):
    model, x = tiny(name, likelihood=GaussianLikelihood("per_element")), batch(name)
    output = model(x)
    assert output.recon.shape == (len(x), 2, *x.shape[2:])
    expected = -moments(DiagonalNormal(*output.recon.chunk(2, 1))).log_prob(x).flatten(1).sum(1).mean()
    torch.testing.assert_close(output.recon_loss, expected)
    assert model.reconstruct(x).shape == model.sample(len(x)).shape == x.shape


def test_colours_may_have_a_mixture_of_discretized_logistics():
    model = DeepVAE.residual(8, 3, (2, 4), 1, 2, groups=2, likelihood=LogisticMixtureLikelihood(2))
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert model(x).loss.isfinite()
    assert model.sample(2).shape == model.reconstruct(x).shape == x.shape


@each_network
def test_8_bit_images_are_their_values_over_255(name):
    model, x = tiny(name), (255 * batch(name)).to(torch.uint8)
    eps = noise(model, x)
    torch.testing.assert_close(model(x, eps=eps), model(x.float() / 255, eps=eps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(x.float() / 255))
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    torch.testing.assert_close(*(model.anomaly_score(y, 2, g) for y, g in zip((x, x.float() / 255), generators, strict=True)))


@each_network
def test_decoding_and_interpolating(name):
    model, x = tiny(name), batch(name, 6)
    means = tuple(q.mean for q in model.encode(x))
    assert all(mean.requires_grad for mean in means)
    torch.testing.assert_close(model.decode_mean(means).detach(), model.reconstruct(x))
    torch.testing.assert_close(model.decode(means[0]), model.decode(means[:1]))
    path = model.interpolate(x[:3], x[3:], steps=5)
    assert path.shape == (3, 5, *x.shape[1:])
    torch.testing.assert_close(path[:, 0], model.reconstruct(x[:3]))
    torch.testing.assert_close(path[:, -1], model.reconstruct(x[3:]))
    middle = tuple((mean[:3] + mean[3:]) / 2 for mean in means)
    torch.testing.assert_close(path[:, 2], model.decode_mean(middle).detach(), rtol=1e-4, atol=1e-5)


@each_network
def test_samples(name):
    model = tiny(name)
    drawn = [model.sample(4, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn)
    assert not drawn[0].requires_grad
    z = model.sample_latents(4, torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.decode_mean(z).detach(), drawn[0])
    cold = model.sample_latents(4, temperature=0.0)
    torch.testing.assert_close(model.decode_mean(cold[0]).detach(), model.sample(4, temperature=0.0))
    torch.testing.assert_close(model.decode_mean(cold).detach(), model.sample(4, temperature=0.0))


@each_network
def test_lower_levels_are_drawn_for_upper_ones_that_are_given(name):
    model = tiny(name)
    z = model.sample_latents(3)
    again = model.sample_latents(3, given=z[:1])
    assert torch.equal(again[0], z[0])
    assert not torch.equal(again[1], z[1])
    torch.testing.assert_close(model.sample(3, given=z), model.decode_mean(z).detach())


def test_the_temperature_scales_the_deviation():
    model = linear_ladder()
    half, full = (model.sample_latents(50_000, torch.Generator().manual_seed(0), temperature=t) for t in (0.5, 1.0))
    torch.testing.assert_close(full[0].std(0), torch.ones(TOP, dtype=torch.float64), rtol=0.02, atol=0)
    torch.testing.assert_close(half[0], full[0] / 2)


def test_each_level_has_noise_of_its_own():
    model = LadderVAE(Given(torch.zeros(4), torch.zeros(4)), [nn.Linear(2, 4)], nn.Linear(2, 3), 2, posterior="plain")
    x = torch.rand(BATCH, 3)
    first, again, as_tensor = model(x, seed=7), model(x, seed=7), model(x, seed=torch.tensor(7))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first.z, again.z, as_tensor.z, strict=True))
    top, bottom = first.z
    assert not torch.equal(top, bottom)
    next_seed = model(x, seed=8)
    assert not torch.equal(next_seed.z[0], bottom)
    torch.testing.assert_close(model(x, seed=7 + SEED_STEP).z[0], bottom)
    drawn = [model(x, generator=torch.Generator().manual_seed(3)).z for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    assert not torch.equal(*drawn[0])


@pytest.mark.parametrize("backend", brief(["inductor", "aot_eager"], ["aot_eager"]))
def test_whole_loss_compiles(backend):
    name = "ladder" if backend == "inductor" else "deep without the finest"
    model, x = tiny(name, beta=LinearSchedule(4, start=0.5), free_bits=0.01), batch(name)
    eps = noise(model, x)
    compiled = torch.compile(lambda x, eps: model(x, eps).loss, fullgraph=True, backend=backend)
    expected = model(x, eps).loss
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    loss = compiled(x, eps)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients, rtol=1e-4, atol=1e-5)


def test_drawn_noise_compiles():
    model, x = tiny("plain ladder"), batch("plain ladder")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    first, second = compiled(x), compiled(x)
    assert all(not torch.equal(a, b) for a, b in zip(first.z, second.z, strict=True))
    torch.testing.assert_close(compiled(x, seed=5).loss, model(x, seed=5).loss)


@pytest.mark.parametrize("name", ["ladder", "deep"])
def test_a_model_in_bfloat16(name):
    model, x = tiny(name).to(torch.bfloat16), (255 * batch(name)).to(torch.uint8)
    output = model(x)
    assert output.recon.dtype == torch.bfloat16
    assert {z.dtype for z in output.z} == {torch.bfloat16}
    assert output.loss.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.sample(2).isfinite().all()
    exact = tiny(name)(x.float() / 255, eps=[torch.zeros_like(z, dtype=torch.float32) for z in output.z])
    torch.testing.assert_close(model(x, eps=[torch.zeros_like(z) for z in output.z]).loss, exact.loss, rtol=0.02, atol=0)


@each_network
def test_autocast(name):
    model, x = tiny(name), batch(name)
    eps = noise(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, eps=eps)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, model(x, eps=eps).loss, rtol=0.02, atol=0)


@each_network
def test_a_stored_model_is_the_same(name):
    model, x = tiny(name, beta=LinearSchedule(4), free_bits=[0.1] * len(tiny(name).levels)), batch(name)
    model.kl_penalty.step()
    other = registry.build(registry.describe(model))
    other.load_state_dict(model.state_dict())
    eps = noise(model, x)
    assert torch.equal(other(x, eps=eps).loss, model(x, eps=eps).loss)
    assert other.free_bits == model.free_bits


OVERFITTED = {
    "ladder": (lambda **options: LadderVAE.mlp((1, 8, 8), (64, 32), (16, 8), **options), 200, 1e-2),
    "deep": (lambda **options: DeepVAE.residual(8, 1, (8, 8), 1, 2, groups=2, **options), 100, 3e-3),
}


@pytest.mark.prove
@pytest.mark.parametrize("name", OVERFITTED)
def test_64_digits_are_learned_by_heart(name):
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed: pip install fastvae-kernels[train]")
    x = torch.tensor(datasets.load_digits().images[:64], dtype=torch.float32).unsqueeze(1) / 16
    make, steps, learning_rate = OVERFITTED[name]
    torch.manual_seed(0)
    model = make(likelihood="gaussian", beta=0.01)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        model(x, seed=step).loss.backward()
        optimizer.step()
    error = (model.reconstruct(x) - x).square().mean()
    assert error < 0.2 * x.var(0).mean()


def test_a_model_without_data_has_shapes():
    with torch.device("meta"):
        model, x = tiny("deep"), torch.empty(3, 1, 8, 8)
    output = model(x)
    assert output.recon.shape == x.shape
    assert output.loss.device.type == "meta"


def test_an_empty_batch():
    model = tiny("ladder")
    x = torch.empty(0, 1, 8, 8)
    assert model(x).loss == 0
    assert model.anomaly_score(x, 2).shape == model.log_prob_bound(x, 2).shape == (0,)


LADDER_PARTS = (Given(torch.zeros(4), torch.zeros(4)), [nn.Linear(2, 4)], nn.Linear(2, 3), 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LadderVAE(LADDER_PARTS[0], [], LADDER_PARTS[2], 2), "levels: got 1, takes at least 2"),
        (lambda: LadderVAE(*LADDER_PARTS[:3], 0), "top_shape: got 0"),
        (lambda: LadderVAE(*LADDER_PARTS, posterior="weighted"), "posterior: got 'weighted'"),
        (lambda: LadderVAE(*LADDER_PARTS, free_bits=(1.0, 2.0, 3.0)), "free_bits: got 3 numbers"),
        (lambda: LadderVAE(*LADDER_PARTS, free_bits=-1.0), "free_bits: got -1.0"),
        (lambda: LadderVAE(*LADDER_PARTS, likelihood="poisson"), "likelihood: got 'poisson'"),
        (lambda: LadderVAE(*LADDER_PARTS)(torch.rand(2, 3), eps=[torch.zeros(2, 2)]), "eps: got 1 tensors, takes 2"),
        (lambda: LadderVAE(*LADDER_PARTS)(torch.rand(2, 3), eps=[torch.zeros(2, 2), torch.zeros(2, 3)]), r"eps: got shape \(2, 3\)"),
        (lambda: LadderVAE(*LADDER_PARTS)(torch.rand(2, 4)), "decoder: gave shape"),
        (lambda: LadderVAE(Given(torch.zeros(4)), *LADDER_PARTS[1:])(torch.rand(2, 3)), "encoder: gave 1 tensors"),
        (lambda: LadderVAE(nn.Identity(), *LADDER_PARTS[1:])(torch.rand(2, 3)), "encoder: gave 1 tensors"),
        (lambda: LadderVAE(Given(torch.zeros(4), torch.zeros(3)), *LADDER_PARTS[1:])(torch.rand(2, 3)), "encoder: gave shape"),
        (lambda: LadderVAE(Given(torch.zeros(4), torch.zeros(6)), *LADDER_PARTS[1:])(torch.rand(2, 3)), "levels: level 1 has a posterior"),
        (lambda: LadderVAE(LADDER_PARTS[0], [nn.Linear(2, 5)], *LADDER_PARTS[2:])(torch.rand(2, 3)), "priors: gave shape"),
        (lambda: LadderVAE(*LADDER_PARTS).sample(2, temperature=-1.0), "temperature: got -1.0"),
        (lambda: LadderVAE(*LADDER_PARTS).sample(2, given=[torch.zeros(3, 2)]), "given: got a batch of 3, takes one of n, 2"),
        (lambda: LadderVAE(*LADDER_PARTS).decode([]), "z: got 0 tensors, takes 1 to 2"),
        (lambda: LadderVAE(*LADDER_PARTS).anomaly_score(torch.rand(2, 3), 0), "num_samples: got 0"),
        (lambda: LadderVAE(*LADDER_PARTS).log_prob_bound(torch.rand(2, 3), 0), "num_samples: got 0"),
        (lambda: LadderVAE.mlp(hidden=(8, 8), latent_dims=(2,)), "latent_dims: got 1 levels"),
        (lambda: DeepVAE.residual(30, 1, (8, 8, 8)), "image_size: got 30, takes multiples of 4"),
        (lambda: DeepVAE.residual(32, 1, (8, 12)), "groups: got 8 for 12 channels"),
        (lambda: DeepVAE.residual(32, 1, (8, 8), (1, 2, 3)), r"blocks: got \(1, 2, 3\)"),
        (lambda: DeepVAE.residual(32, 1, (8, 8), (1, 0)), "blocks: got 0"),
        (lambda: DeepVAE.residual(32, 1, (8, 8), -1), "blocks: got -1"),
        (lambda: DeepVAE.residual(32, 1, (8,), 1), "levels: got 1, takes at least 2"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
