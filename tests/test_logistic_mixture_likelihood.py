"""The discretized logistic and its mixture as likelihoods: values, means, draws, and a decoder that gives the wrong number."""

import pytest
import torch
from torch import nn

from fastvae import functional as FV
from fastvae.distributions import DiscretizedLogisticLikelihood, LogisticMixtureLikelihood
from fastvae.models import VAE


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image(*shape, seed=1):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def levels():
    return torch.arange(256, dtype=torch.uint8)


def test_one_logistic_is_its_formula():
    params, x = normal(2, 6, 4), image(2, 3, 4)
    mean, log_scale = params.double().chunk(2, 1)
    center, inverse = 2.0 * x.double() / 255.0 - 1.0 - mean, torch.exp(-log_scale)
    above, below = torch.sigmoid((center + 1 / 255) * inverse), torch.sigmoid((center - 1 / 255) * inverse)
    expected = -torch.log(torch.where(x == 255, 1.0, above) - torch.where(x == 0, 0.0, below))
    losses = DiscretizedLogisticLikelihood()(params, x, reduction="none")
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("likelihood", "parameters"), [(DiscretizedLogisticLikelihood(), 2), (LogisticMixtureLikelihood(4), 12)], ids=str)
def test_log_probabilities_of_all_levels_sum_to_one(likelihood, parameters):
    params = normal(1, parameters, 1).expand(256, -1, -1)
    log_probabilities = likelihood.log_prob(params, levels().view(256, 1, 1))
    torch.testing.assert_close(log_probabilities.exp().sum(), torch.tensor(1.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mixture_is_the_function(channels):
    likelihood = LogisticMixtureLikelihood(5)
    params, x = normal(2, likelihood.parameters_for(channels), 3, 4), image(2, channels, 3, 4)
    for reduction in ("none", "sample", "batchmean", "sum", "mean"):
        assert torch.equal(likelihood(params, x, reduction=reduction), FV.logistic_mixture_nll(params, x, 5, reduction))
    floating = (x / 255).double()
    assert torch.equal(likelihood(params, floating), likelihood(params, x))


@pytest.mark.parametrize(
    ("likelihood", "parameters", "scales"), [(DiscretizedLogisticLikelihood(), 2, 1), (LogisticMixtureLikelihood(3), 9, 3)], ids=str
)
def test_draws_have_the_probabilities(likelihood, parameters, scales):
    """10,000 draws of a grey pixel: within five standard errors of the distribution function."""
    count = 10_000
    params = 0.5 * normal(1, parameters, 1, seed=3)
    params[:, -scales:] -= 1.5
    draws = likelihood.sample(params.expand(count, -1, -1), torch.Generator().manual_seed(5)).flatten()
    drawn = (draws * 255).round()
    torch.testing.assert_close(drawn / 255, draws)
    probabilities = likelihood.log_prob(params.expand(256, -1, -1), levels().view(256, 1, 1)).exp()
    observed = torch.bincount(drawn.long(), minlength=256).cumsum(0) / count
    assert (observed - probabilities.cumsum(0)).abs().max() < 2.5 / count**0.5


def test_the_mean_of_narrow_components_is_that_of_draws():
    """Of coupled channels, whose components lie inside the range."""
    likelihood = LogisticMixtureLikelihood(2)
    params = 0.3 * normal(1, 20, 1, seed=2)
    params[:, 8:14] = -4.0
    draws = likelihood.sample(params.expand(20_000, -1, -1), torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.mean(0), likelihood.mean(params)[0], rtol=0, atol=0.01)


def test_the_mean_of_one_logistic():
    params = torch.tensor([[[0.5], [-3.0]], [[-7.0], [0.0]], [[9.0], [0.0]]])
    assert DiscretizedLogisticLikelihood().mean(params).flatten().tolist() == [0.75, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("likelihood", "parameters"), [(DiscretizedLogisticLikelihood(), 6), (LogisticMixtureLikelihood(2), 20)], ids=str)
def test_mean_and_draws_are_images(likelihood, parameters, dtype):
    params = normal(4, parameters, 5, 6).to(dtype)
    for result in (likelihood.mean(params), likelihood.sample(params)):
        assert (result.shape, result.dtype) == ((4, 3, 5, 6), dtype)
        assert 0.0 <= result.min() <= result.max() <= 1.0
    first, again = (likelihood.sample(params, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_decoder_that_gives_another_number_is_named():
    likelihood = LogisticMixtureLikelihood(10)
    with pytest.raises(ValueError, match=r"^decoder: gave shape \(2, 90, 4\), has to give \(2, 100, 4\)"):
        likelihood(normal(2, 90, 4), image(2, 3, 4))
    with pytest.raises(ValueError, match=r"^decoder: gave shape \(2, 90, 4\), has to give in .*: 30 for 1, 60 for 2, 100 for 3"):
        likelihood.mean(normal(2, 90, 4))
    with pytest.raises(ValueError, match=r"^decoder: gave shape \(2, 5, 4\), has to give \(2, 6, 4\)"):
        DiscretizedLogisticLikelihood()(normal(2, 5, 4), image(2, 3, 4))
    with pytest.raises(ValueError, match=r"^num_mixtures: got 0, takes a positive integer"):
        LogisticMixtureLikelihood(0)


def test_a_vae_of_8_bit_images_learns():
    torch.manual_seed(0)
    likelihood = LogisticMixtureLikelihood(2)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(48, 8))
    decoder = nn.Sequential(nn.Linear(4, 20 * 16), nn.Unflatten(1, (20, 4, 4)))
    model = VAE(encoder, decoder, 4, likelihood=likelihood)
    x = image(8, 3, 4, 4).float() / 255
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(30):
        loss = model(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert model.sample(3).shape == (3, 3, 4, 4)
