"""Priors and posteriors: log densities against torch.distributions, samples and KLs against both."""

import copy

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

from fastvae.distributions.divergence import sample_with_kl
from fastvae.distributions.flow import FlowPosterior, FlowPrior
from fastvae.distributions.normal import CholeskyNormal, DiagonalNormal, SharedNormal, StandardNormal
from fastvae.distributions.posterior import CholeskyPosterior, DiagonalPosterior
from fastvae.distributions.prior import DiagonalPrior, MixturePrior, StandardPrior, VampPrior

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, DIM, SAMPLES = 5, 3, 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def encode(x: torch.Tensor) -> DiagonalNormal:
    return DiagonalNormal(2 * x[..., :DIM], x[..., DIM:] - 1)


def randomized(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """In float64, with no weight at its initial value."""
    module.double()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.add_(scale * normal(*parameter.shape, seed=index))
    return module


PRIORS = {
    "standard": lambda shape: StandardPrior(shape),
    "diagonal": lambda shape: DiagonalPrior(shape),
    "mixture": lambda shape: MixturePrior(shape, components=4),
    "vamp": lambda shape: VampPrior(shape, 2 * DIM, components=4),
    "autoregressive": lambda shape: FlowPrior(shape, transforms=2, hidden=(8,)),
    "coupling": lambda shape: FlowPrior(shape, "coupling", transforms=2, hidden=(8,)),
    "spline": lambda shape: FlowPrior(shape, "spline", transforms=2, hidden=(8,)),
}
each_prior = pytest.mark.parametrize("name", PRIORS)


def expected_prior(prior: nn.Module) -> torch.distributions.Distribution:
    """The same distribution from torch.distributions."""
    if isinstance(prior, StandardPrior):
        return Independent(Normal(prior.origin, 1), 1)
    if isinstance(prior, DiagonalPrior):
        return Independent(Normal(prior.mu, (prior.logvar / 2).exp()), 1)
    if isinstance(prior, MixturePrior):
        return MixtureSameFamily(Categorical(logits=prior.logits), Independent(Normal(prior.mu, (prior.logvar / 2).exp()), 1))
    q = encode(prior.pseudo_inputs.clamp(0, 1))
    return MixtureSameFamily(Categorical(logits=torch.zeros(4)), Independent(Normal(q.mu, (q.logvar / 2).exp()), 1))


@pytest.mark.parametrize("name", ["standard", "diagonal", "mixture", "vamp"])
def test_log_density_of_a_prior_is_that_of_torch(name):
    prior = randomized(PRIORS[name](DIM))
    z = normal(SAMPLES, BATCH, DIM, seed=1)
    torch.testing.assert_close(prior(encode).log_prob(z), expected_prior(prior).log_prob(z))
    torch.testing.assert_close(prior(encode).log_prob(z[0]), expected_prior(prior).log_prob(z[0]))


@pytest.mark.parametrize("name", [name for name in PRIORS if name != "vamp"])
def test_a_prior_draws_from_its_density(name):
    """On a grid of the plane the density sums to 1, and has the mean that draws have."""
    torch.manual_seed(0)
    # A flow whose weights are larger has mass beyond the grid, and peaks between its points.
    prior = randomized(PRIORS[name](2), scale=0.1)
    line = torch.linspace(-15, 15, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        weights = prior(encode).log_prob(grid).exp() * (line[1] - line[0]) ** 2
        z = prior(encode).sample(10_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.sum().item(), 1.0, rtol=0, atol=2e-3)
    error = 5 * z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - (weights.unsqueeze(1) * grid).sum(0)).abs() < error).all()


@each_prior
def test_a_prior_of_images_gives_images(name):
    if name == "vamp":
        prior, q = VampPrior((2, 2, 2), 16, components=3), lambda x: DiagonalNormal(x[:, :8].view(-1, 2, 2, 2), x[:, 8:].view(-1, 2, 2, 2))
    else:
        prior, q = PRIORS[name]((2, 2, 2)), None
    p = prior(q)
    z = p.sample(6, torch.Generator().manual_seed(0))
    assert z.shape == (6, 2, 2, 2)
    assert p.log_prob(z).shape == (6,)
    assert torch.equal(z, p.sample(6, torch.Generator().manual_seed(0)))


@each_prior
def test_a_prior_that_is_stored_and_loaded_is_the_same(name):
    torch.manual_seed(0)
    prior, other = PRIORS[name](DIM), PRIORS[name](DIM)
    other.load_state_dict(prior.state_dict())
    z = torch.randn(BATCH, DIM)
    torch.testing.assert_close(other(encode).log_prob(z), prior(encode).log_prob(z), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(prior)(encode).log_prob(z), prior(encode).log_prob(z), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["diagonal", "mixture", "vamp", "autoregressive"])
def test_a_prior_learns(name):
    prior = PRIORS[name](DIM)
    prior(encode).log_prob(torch.randn(BATCH, DIM)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in prior.parameters())


def cholesky(seed: int = 0) -> tuple[CholeskyNormal, MultivariateNormal]:
    q = CholeskyPosterior()(normal(BATCH, CholeskyPosterior().parameters_for(DIM), seed=seed))
    return q, MultivariateNormal(q.mu, scale_tril=q.factor)


def test_the_full_covariance_is_that_of_torch():
    q, expected = cholesky()
    z = normal(SAMPLES, BATCH, DIM, seed=1)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z))
    torch.testing.assert_close(q.logvar, expected.variance.log())
    eps = normal(SAMPLES, BATCH, DIM, seed=2)
    torch.testing.assert_close(q.rsample(SAMPLES, eps=eps), q.mu + torch.einsum("bij,sbj->sbi", q.factor, eps))


def test_an_encoder_of_zeros_gives_the_standard_normal():
    q = CholeskyPosterior()(torch.zeros(2, 9))
    torch.testing.assert_close(q.factor, torch.eye(3).expand(2, 3, 3))
    assert torch.equal(q.mu, torch.zeros(2, 3))


@pytest.mark.parametrize("cls", [CholeskyNormal, DiagonalNormal, SharedNormal, StandardNormal])
def test_no_property_of_a_normal_is_a_tuple(cls):
    """torch.compile of torch 2.10 cannot take apart what a property of a named tuple returns, so a pair is a method's result."""
    properties = [value for value in vars(cls).values() if isinstance(value, property)]
    assert all(value.fget.__annotations__["return"] is torch.Tensor for value in properties)


@pytest.mark.parametrize("prior", [StandardPrior(DIM), DiagonalPrior(DIM)], ids=["standard", "diagonal"])
def test_the_kl_of_a_normal_posterior_is_that_of_torch(prior):
    prior = randomized(prior)
    moments = [moment for moment in prior().moments() if moment is not None] or [torch.zeros(DIM).double(), torch.zeros(DIM).double()]
    p = MultivariateNormal(moments[0], torch.diag_embed(moments[1].exp()))
    q, expected = cholesky()
    kl = sample_with_kl(q, prior(), reduction="sample")[1]
    torch.testing.assert_close(kl, kl_divergence(expected, p.expand((BATCH,))))
    diagonal = DiagonalPosterior()(normal(BATCH, 2 * DIM))
    expected = MultivariateNormal(diagonal.mu, torch.diag_embed(diagonal.logvar.exp()))
    kl = sample_with_kl(diagonal, prior(), reduction="sample")[1]
    torch.testing.assert_close(kl, kl_divergence(expected, p.expand((BATCH,))))
    torch.testing.assert_close(sample_with_kl(diagonal, prior())[1], kl.mean())


FLOWS = {
    "inverse_autoregressive": lambda context: FlowPosterior(DIM, transforms=2, context=context, hidden=(8,)),
    "planar": lambda context: FlowPosterior(DIM, "planar", transforms=3, context=context),
}
each_flow = pytest.mark.parametrize("kind", FLOWS)


@each_flow
@pytest.mark.parametrize("context", [0, 2])
def test_a_flow_has_the_log_determinant_that_autograd_finds(kind, context):
    posterior = randomized(FLOWS[kind](context))
    encoded, eps = normal(1, 2 * DIM + context), normal(1, DIM, seed=1)

    def draw(eps: torch.Tensor) -> torch.Tensor:
        return posterior(encoded).rsample(eps=eps)

    jacobian = torch.autograd.functional.jacobian(draw, eps).view(DIM, DIM)
    base = Normal(0.0, 1.0).log_prob(eps).sum()
    z, log_q = posterior(encoded).rsample_and_log_prob(eps=eps)
    torch.testing.assert_close(z, draw(eps))
    torch.testing.assert_close(log_q, (base - jacobian.det().abs().log()).view(1))


def test_the_inverse_of_an_autoregressive_flow_finds_its_density():
    posterior = randomized(FLOWS["inverse_autoregressive"](2))
    q = posterior(normal(BATCH, 2 * DIM + 2))
    z, log_q = q.rsample_and_log_prob(SAMPLES, seed=0)
    assert z.shape == (SAMPLES, BATCH, DIM)
    torch.testing.assert_close(q.log_prob(z), log_q)


def test_a_planar_flow_says_that_it_has_no_inverse():
    q = FLOWS["planar"](0)(torch.zeros(BATCH, 2 * DIM))
    with pytest.raises(NotImplementedError, match=r"^kind: 'planar' has no inverse"):
        q.log_prob(torch.zeros(BATCH, DIM))


@each_prior
@pytest.mark.parametrize("kind", ["full covariance", "diagonal", *FLOWS])
def test_the_estimated_kl_is_the_mean_of_log_ratios(name, kind):
    posterior = {"full covariance": CholeskyPosterior, "diagonal": DiagonalPosterior}.get(kind, lambda: FLOWS[kind](0))()
    prior = PRIORS[name](DIM)
    q = posterior(torch.randn(BATCH, posterior.parameters_for(DIM), generator=torch.Generator().manual_seed(0)))
    p = prior(encode)
    z, kl = sample_with_kl(q, p, num_samples=2000, reduction="sample", seed=0)
    ratios = q.rsample_and_log_prob(2000, seed=0)[1] - p.log_prob(z)
    error = 5 * ratios.std(0) / 2000**0.5 + 1e-4
    assert kl.shape == (BATCH,)
    assert ((kl - ratios.mean(0)).abs() <= error).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StandardPrior(0), "latent_shape: got 0"),
        (lambda: MixturePrior(2, components=0), "components: got 0"),
        (lambda: VampPrior(2, 4, low=1.0), "low: got 1.0"),
        (lambda: FlowPrior(2, "afine"), "kind: got 'afine'"),
        (lambda: FlowPosterior(2, transforms=0), "transforms: got 0"),
        (lambda: DiagonalPosterior()(torch.zeros(2, 3)), "encoder: gave shape"),
        (lambda: CholeskyPosterior()(torch.zeros(2, 4)), "encoder: gave shape"),
        (lambda: FlowPosterior(2, context=1)(torch.zeros(2, 4)), "encoder: gave shape"),
        (
            lambda: sample_with_kl(DiagonalNormal(torch.zeros(1, 2), torch.zeros(1, 2)), MixturePrior(2)(), free_bits=0.1),
            "free_bits: got 0.1",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_a_vamp_prior_takes_a_diagonal_posterior():
    with pytest.raises(TypeError, match=r"^posterior: gives CholeskyNormal"):
        VampPrior(2, 5)(CholeskyPosterior())
