"""Each likelihood is the distribution that it is named after: values, total mass, means and draws."""

import math

import pytest
import torch
from _likelihoods import CASES, CHANNELS
from torch import distributions as D

from fastvae.distributions import (
    CategoricalLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    NegativeBinomialLikelihood,
    ZeroInflatedNegativeBinomialLikelihood,
)

KNOWN = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.oracle])
DRAWS = 40_000


def build(name, *shape):
    case = CASES[name]
    likelihood = case.make().double()
    return likelihood, case.params(likelihood, *shape).double(), case.data(*shape)


@KNOWN
def test_values_and_gradients_are_those_of_torch_distributions(name):
    likelihood, params, x = build(name, 4, CHANNELS, 5)
    x = x.double() if x.is_floating_point() else x
    params.requires_grad_()
    learners = [params, *likelihood.parameters()]
    actual = likelihood.log_prob(params, x)
    expected = CASES[name].oracle(likelihood, params).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    for a, b in zip(torch.autograd.grad(actual.sum(), learners), torch.autograd.grad(expected.sum(), learners), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@KNOWN
def test_means_and_draws_are_those_of_torch_distributions(name):
    """The moments of draws lie within five standard errors; that of the variance is estimated from the draws."""
    likelihood, params, _ = build(name, 2, CHANNELS, 1)
    drawn = likelihood.sample(params.expand(*params.shape[:-1], DRAWS), torch.Generator().manual_seed(0)).double()
    known = CASES[name].oracle(likelihood, params)
    if name == "categorical":
        values = torch.arange(5.0, dtype=torch.float64)
        mean = (known.probs * values).sum(-1)
        variance = (known.probs * values**2).sum(-1) - mean**2
    else:
        mean, variance = known.mean, known.variance
    torch.testing.assert_close(likelihood.mean(params), mean, rtol=1e-12, atol=1e-12)
    squares = (drawn - mean) ** 2
    assert ((drawn - mean).mean(-1, keepdim=True).abs() < 5 * (variance / DRAWS).sqrt()).all()
    assert ((squares.mean(-1, keepdim=True) - variance).abs() < 5 * squares.std(-1, keepdim=True) / math.sqrt(DRAWS) + 1e-12).all()


@pytest.mark.parametrize("name", ["categorical_images", "categorical_tokens", "zinb_global", "zinb_element"])
def test_draws_follow_the_probabilities(name):
    """For distributions that torch does not have: the share of each value lies within five standard errors of its probability."""
    likelihood, params, _ = build(name, 1, CHANNELS)
    drawn = likelihood.sample(params.expand(DRAWS, *params.shape[1:]), torch.Generator().manual_seed(0))
    scale = 4 if name == "categorical_images" else 1
    for value in range(5):
        x = torch.full((1, CHANNELS), value / scale).to(drawn.dtype)
        probability = (-likelihood(params, x, reduction="none")).exp()
        share = (drawn * scale == value).double().mean(0, keepdim=True)
        assert ((share - probability).abs() < 5 * (probability * (1 - probability) / DRAWS).sqrt()).all()
    if name.startswith("zinb"):
        error = drawn.double().std(0) / math.sqrt(DRAWS)
        assert ((drawn.double().mean(0) - likelihood.mean(params)[0]).abs() < 5 * error).all()


def mass(likelihood, params, values):
    """The probability or density at each of ``values``, of one element whose parameters are ``params``."""
    return likelihood.log_prob(params.expand(len(values), *params.shape[1:]), values.unsqueeze(-1)).exp()


@pytest.mark.parametrize("name", ["bernoulli", "bernoulli_probs"])
def test_the_probabilities_of_both_bits_sum_to_1(name):
    likelihood, params, _ = build(name, 1, 1)
    torch.testing.assert_close(mass(likelihood, params, torch.tensor([0.0, 1.0])).sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("data", ["integers", "tokens", "images"])
@pytest.mark.parametrize("count", [2, 5, 256])
def test_the_probabilities_of_all_values_sum_to_1(count, data):
    params = torch.randn(1, 1, count) if data == "tokens" else torch.randn(1, count)
    values = torch.arange(count) / (count - 1) if data == "images" else torch.arange(count)
    total = mass(CategoricalLikelihood(count, data), params, values).sum()
    torch.testing.assert_close(total, torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "likelihood", [GaussianLikelihood(0.5), GaussianLikelihood("per_element"), LaplaceLikelihood(0.5), LaplaceLikelihood("per_element")]
)
def test_densities_integrate_to_1(likelihood):
    params = torch.tensor([[0.25, -0.5]], dtype=torch.float64)[:, : likelihood.parameters_per_element]
    grid = torch.linspace(-39.75, 40.25, 80_001, dtype=torch.float64)
    total = torch.trapezoid(mass(likelihood.double(), params, grid), grid)
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("log_dispersion", [-2.0, 0.0, 3.0, 18.0])
@pytest.mark.parametrize("log_mean", [-9.0, 0.0, 4.0])
@pytest.mark.parametrize("make", [NegativeBinomialLikelihood, ZeroInflatedNegativeBinomialLikelihood])
def test_the_probabilities_of_all_counts_sum_to_1(make, log_mean, log_dispersion):
    parts = [log_mean, log_dispersion] if make is NegativeBinomialLikelihood else [log_mean, -0.5, log_dispersion]
    params = torch.tensor([parts], dtype=torch.float64)
    total = mass(make("per_element"), params, torch.arange(20_000.0, dtype=torch.float64)).sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), rtol=1e-10, atol=0)


def test_large_dispersion_is_the_poisson_distribution():
    log_mean, x = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None], torch.arange(7.0)[:, None].double()
    actual = NegativeBinomialLikelihood(1e12).double().log_prob(log_mean, x)
    torch.testing.assert_close(actual, D.Poisson(log_mean.exp()).log_prob(x)[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [NegativeBinomialLikelihood, ZeroInflatedNegativeBinomialLikelihood])
def test_the_library_is_a_factor_of_the_mean(make):
    likelihood, library = make("per_element"), torch.tensor([1.0, 10.0, 0.5])
    count = likelihood.parameters_per_element
    params, x = torch.randn(3, count * 2, 4), torch.randint(9, (3, 2, 4))
    shifted = params.clone()
    shifted[:, :2] += library.log().view(-1, 1, 1)
    torch.testing.assert_close(likelihood(params, x, library=library), likelihood(shifted, x))
    torch.testing.assert_close(likelihood.log_prob(params, x, library=library), likelihood.log_prob(shifted, x))
    torch.testing.assert_close(likelihood.mean(params, library=library), likelihood.mean(params) * library.view(-1, 1, 1))
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(likelihood.sample(params, seeds[0], library=library), likelihood.sample(shifted, seeds[1]))
    with pytest.raises(ValueError, match=r"library: got shape \(3, 1\), takes one size a sample, \(3,\)"):
        likelihood(params, x, library=library[:, None])


def test_counts_are_integers_and_no_image():
    likelihood, params = NegativeBinomialLikelihood(), torch.zeros(1, 2)
    with pytest.raises(TypeError, match=r"x: got torch.uint8, takes"):
        likelihood(params, torch.zeros(1, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="x: got values that are no integers"):
        likelihood.check_range(torch.tensor([[0.5, 1.0]]))
    assert likelihood(params, torch.tensor([[-1.0, 2.0]])).isnan()
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(likelihood(params, torch.tensor([[3, 2]], dtype=dtype)), likelihood(params, torch.tensor([[3.0, 2.0]])))


def test_learned_parameters_settle_at_the_best_fit():
    """The gradient of the parameter vanishes at the maximum likelihood: the mean squared, the mean absolute error of each channel."""
    x = torch.randn(512, 2, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.1, 3.0]).view(2, 1)
    for likelihood, best in (
        (GaussianLikelihood("per_channel", channels=2), (x**2).mean((0, 2)).log()),
        (LaplaceLikelihood("per_channel", channels=2), x.abs().mean((0, 2)).log()),
    ):
        (parameter,) = likelihood.parameters()
        parameter.data.copy_(best)
        likelihood(torch.zeros_like(x), x).backward()
        torch.testing.assert_close(parameter.grad, torch.zeros(2), atol=1e-5, rtol=0)
