"""Bounds on log p(x) and their training, on a linear VAE whose log p(x) is known."""

import itertools

import pytest
import torch
from _linear_gaussian import DATA, DIM, best_mean_log_prob, log_prob, make_model, with_exact_posterior
from torch import nn

from fastvae.distributions import CholeskyPosterior, DiagonalPrior, MixturePrior
from fastvae.models import VAE, log_prob_ais
from fastvae.models.ais import annealing_schedule

pytestmark = pytest.mark.usefixtures("one_thread")


def data(count: int, seed: int = 0) -> torch.Tensor:
    return 1.5 * torch.randn(count, DATA, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_bounds_rise_to_log_p():
    """ELBO < IWAE_3 < IWAE_30 < log p(x), each gap many times the error of the means."""
    model, x = make_model(), data(2000)
    bounds = [model.log_prob_bound(x, k, generator=generator(k)) for k in (1, 3, 30)] + [log_prob(model, x)]
    for lower, upper in itertools.pairwise(bounds):
        gap = upper - lower
        assert gap.mean() > 5 * gap.std() / len(x) ** 0.5


def test_the_bound_with_one_sample_is_the_evidence_lower_bound():
    model, x = make_model(), data(2)
    elbo = -model.anomaly_score(x, num_samples=20_000, generator=generator())
    bounds = torch.stack([model.log_prob_bound(x.repeat(10_000, 1), 1, generator=generator(1)).unflatten(0, (-1, 2))])[0]
    error = bounds.std(0) / len(bounds) ** 0.5
    assert ((bounds.mean(0) - elbo).abs() < 6 * error).all()


def test_importance_sampling_finds_log_p():
    model, x = make_model(), data(20)
    estimate = model.log_prob_bound(x, 20_000, samples_at_once=1000, generator=generator())
    torch.testing.assert_close(estimate, log_prob(model, x), rtol=0, atol=0.2)
    assert (estimate - log_prob(model, x)).abs().mean() < 0.05


@pytest.mark.parametrize("count", [1, 7])
def test_the_bound_is_exact_where_the_posterior_is(count):
    model, x = with_exact_posterior(make_model(CholeskyPosterior())), data(5)
    torch.testing.assert_close(model.log_prob_bound(x, count), log_prob(model, x))


def test_the_bound_of_chunks_is_that_of_all_samples_at_once():
    """With the exact posterior all weights are the same; a chunk that was counted twice or not at all would be seen."""
    model, x = with_exact_posterior(make_model(CholeskyPosterior())), data(5)
    for at_once in (1, 3, 50):
        torch.testing.assert_close(model.log_prob_bound(x, 7, samples_at_once=at_once), log_prob(model, x))


@pytest.mark.parametrize("posterior", [None, CholeskyPosterior()], ids=["diagonal", "full covariance"])
def test_training_reaches_the_optimum_of_principal_components(posterior):
    """At the optimum the bound is tight, with a diagonal posterior too: its components may be rotated to be orthogonal."""
    scales = torch.tensor([3.0, 2.0, 0.8, 0.5, 0.3], dtype=torch.float64)
    rotation = torch.linalg.qr(data(DATA, seed=1)).Q
    x = data(300) / 1.5 * scales @ rotation + 1
    model = make_model(posterior, num_samples=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 500)
    for _ in range(500):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
        schedule.step()
    best = best_mean_log_prob(x)
    assert best - log_prob(model, x).mean() < 0.03
    assert (best + model.anomaly_score(x, num_samples=200).mean()).abs() < 0.04


def test_annealed_importance_sampling_finds_log_p():
    model, x = make_model(), data(10)
    estimate = log_prob_ais(model, x, num_chains=64, num_steps=40, leapfrog_steps=4, chains_at_once=64, generator=generator())
    torch.testing.assert_close(estimate, log_prob(model, x), rtol=0, atol=0.3)
    assert (estimate - log_prob(model, x)).mean().abs() < 0.1


def test_the_weights_of_few_steps_are_unbiased():
    """The mean of w is p(x) however short the annealing is, because the step sizes come from other chains."""
    model, x = make_model(), torch.full((1, DATA), 0.5).double()
    one = log_prob_ais(model, x.expand(4000, -1), num_chains=1, num_steps=4, leapfrog_steps=2, generator=generator())
    ratio = (one - log_prob(model, x)).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / len(ratio) ** 0.5


def test_one_step_is_importance_sampling_from_the_prior():
    model, x = make_model(), data(3)
    estimate = log_prob_ais(model, x, num_chains=5, num_steps=1, chains_at_once=2, generator=generator(3))
    draws = generator(3)
    # The pilot chains draw their places, and have no transition to adapt.
    model.prior(None).sample(4 * 3, draws)
    z = torch.cat([model.prior(None).sample(count * 3, draws).view(count, 3, DIM) for count in (2, 2, 1)])
    log_px = torch.stack([model.likelihood.log_prob(model.decode(row), x) for row in z]).detach()
    torch.testing.assert_close(estimate, log_px.logsumexp(0) - torch.tensor(5.0).double().log())


@pytest.mark.parametrize("prior", [DiagonalPrior(DIM), MixturePrior(DIM, 3)], ids=["diagonal", "mixture"])
def test_annealing_serves_any_prior(prior):
    """Against importance sampling with many samples."""
    model, x = make_model(prior=prior), data(4)
    estimate = log_prob_ais(model, x, num_chains=64, num_steps=40, leapfrog_steps=4, chains_at_once=64, generator=generator())
    expected = model.log_prob_bound(x, 50_000, samples_at_once=5000, generator=generator())
    torch.testing.assert_close(estimate, expected, rtol=0, atol=0.35)


def test_annealing_leaves_the_model_as_it_was():
    model, x = make_model().float().train(), data(3).float()
    first, second = (log_prob_ais(model, x, 2, 5, 2, generator=generator()) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_annealing_of_a_bfloat16_model_with_a_latent_image():
    model = VAE(nn.Conv2d(1, 4, 1), nn.Conv2d(2, 1, 1), (2, 4, 4)).to(torch.bfloat16)
    estimate = log_prob_ais(model, torch.randint(256, (3, 1, 4, 4), dtype=torch.uint8), 2, 5, 2)
    assert estimate.shape == (3,)
    assert estimate.dtype == torch.float32
    assert estimate.isfinite().all()


def test_a_step_that_is_far_too_long_is_not_taken():
    """The trajectories diverge: the chains stay where they started until the pilot has found a shorter step."""
    model, x = make_model(), data(3)
    assert log_prob_ais(model, x, 4, 30, 5, step_size=1e200, generator=generator()).isfinite().all()


def test_the_schedule_rises_from_0_to_1():
    betas = torch.tensor(annealing_schedule(10))
    assert betas[0] == 0
    assert betas[-1] == 1
    assert (betas.diff() > 0).all()
    torch.testing.assert_close(betas + betas.flip(0), torch.ones(11))
    assert annealing_schedule(1) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 0}, "num_chains: got 0"),
        ({"num_steps": 0}, "num_steps: got 0"),
        ({"leapfrog_steps": 0}, "leapfrog_steps: got 0"),
        ({"chains_at_once": -1}, "chains_at_once: got -1"),
        ({"step_size": 0.0}, "step_size: got 0.0, takes a number > 0"),
    ],
    ids=str,
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        log_prob_ais(make_model(), data(2), **options)
