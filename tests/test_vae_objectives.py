"""The objectives of the VAE family against their formulas: importance weights, total correlation, covariance and discrepancy."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastvae.distributions import DiagonalPrior
from fastvae.models import DIPVAE, IWAE, BetaTCVAE, FactorVAE
from fastvae.models._mmd import SCALES, squared_mmd
from fastvae.models.beta_tc_vae import log_importance_weights
from fastvae.models.factor_vae import permute_dimensions

pytestmark = pytest.mark.usefixtures("one_thread")

DATA, DIM = 3, 2


class Table(nn.Module):
    """An encoder that gives the same posterior for each x, each from parameters of its own, so that its gradient has a row for each x."""

    def __init__(self, batch: int, posterior: Tensor):
        super().__init__()
        self.rows = nn.Parameter(posterior.double().expand(batch, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows


def iwae(gradient: str, batch: int, num_samples: int = 4) -> IWAE:
    torch.manual_seed(0)
    encoder = Table(batch, torch.tensor([0.5, -0.3, -0.5, 0.4]))
    return IWAE(encoder, nn.Linear(DIM, DATA).double(), DIM, num_samples=num_samples, gradient=gradient, likelihood="gaussian")


def gradients_of_iwae(gradient: str, batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The encoder's gradient for each x, ``(batch, 2 * DIM)``, and the decoder's."""
    model, x = iwae(gradient, batch), torch.tensor([1.0, -0.5, 0.3]).double().expand(batch, -1)
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(4, batch, DIM, generator=generator, dtype=torch.float64)
    model(x, eps=eps).loss.backward()
    return model.encoder.rows.grad * batch, model.decoder.weight.grad


def test_the_importance_weighted_loss_is_its_formula():
    model, x = iwae("standard", 6), torch.randn(6, DATA, dtype=torch.float64)
    output = model(x, eps=torch.randn(4, 6, DIM, dtype=torch.float64))
    q, p = Independent(Normal(output.mu, (output.logvar / 2).exp()), 1), Independent(Normal(torch.zeros(DIM).double(), 1), 1)
    log_px = Normal(model.decode(output.z), 1).log_prob(x).sum(-1)
    log_ratio = q.log_prob(output.z) - p.log_prob(output.z)
    bound = torch.logsumexp(log_px - log_ratio, 0) - math.log(4)
    torch.testing.assert_close(output.loss, -bound.mean())
    torch.testing.assert_close(output.recon_loss, -log_px.mean())
    torch.testing.assert_close(output.kl, log_ratio.mean())


def test_the_doubly_reparameterized_gradient_has_the_expectation_of_the_standard_one_and_less_variance():
    standard, doubly = (gradients_of_iwae(kind, 40_000, seed)[0] for seed, kind in enumerate(("standard", "doubly_reparameterized")))
    error = ((standard.var(0) + doubly.var(0)) / len(standard)).sqrt()
    assert ((standard.mean(0) - doubly.mean(0)).abs() < 4.5 * error).all()
    assert (doubly.var(0) < standard.var(0)).all()


def test_the_doubly_reparameterized_gradient_is_the_papers_formula():
    """Of Tucker et al.: the sum over k of the normalised weight squared times d log w_k / d z_k times d z_k / d phi."""
    model, x = iwae("doubly_reparameterized", 6), torch.randn(6, DATA, dtype=torch.float64)
    eps = torch.randn(4, 6, DIM, dtype=torch.float64)
    output = model(x, eps=eps)
    output.loss.backward()
    mu, logvar = model.encoder.rows.detach().split(DIM, dim=1)
    z = (mu + (logvar / 2).exp() * eps).requires_grad_()
    log_px = Normal(model.decode(z), 1).log_prob(x).sum(-1)
    log_w = log_px + Normal(0, 1).log_prob(z).sum(-1) - Normal(mu, (logvar / 2).exp()).log_prob(z).sum(-1)
    slope = torch.autograd.grad(log_w.sum(), z)[0] * log_w.softmax(0).square().unsqueeze(-1)
    expected = torch.cat([slope.sum(0), (slope * 0.5 * (logvar / 2).exp() * eps).sum(0)], 1)
    torch.testing.assert_close(model.encoder.rows.grad, -expected.detach() / 6)


def test_the_decoder_has_the_gradient_of_the_bound_either_way():
    torch.testing.assert_close(gradients_of_iwae("standard", 5)[1], gradients_of_iwae("doubly_reparameterized", 5)[1])


def test_a_gradient_through_the_z_of_the_output_is_not_weighted():
    model = iwae("doubly_reparameterized", 5)
    output = model(torch.randn(5, DATA, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(output.z.sum(), model.encoder.rows)
    torch.testing.assert_close(gradient[:, :DIM], torch.full((5, DIM), 4.0).double())


def beta_tc(count: int, estimator: str = "weighted", **options) -> tuple[BetaTCVAE, Tensor]:
    torch.manual_seed(0)
    model = BetaTCVAE.mlp(DATA, (), DIM, dataset_size=count, estimator=estimator, **options).double()
    return model, torch.rand(count, DATA, dtype=torch.float64)


def test_the_decomposition_is_exact_where_the_batch_is_the_data():
    """The weighted estimate of q(z) is then 1 / N of the mixture of all posteriors."""
    model, x = beta_tc(6, alpha=0.5, beta=3.0, gamma=2.0)
    output = model(x)
    mu, scale, z = output.mu, (output.logvar / 2).exp(), output.z
    members = Categorical(logits=torch.zeros(6).double())
    log_joint = MixtureSameFamily(members, Independent(Normal(mu, scale), 1)).log_prob(z)
    log_product = sum(MixtureSameFamily(members, Normal(mu[:, j], scale[:, j])).log_prob(z[:, j]) for j in range(DIM))
    log_q, log_p = Normal(mu, scale).log_prob(z).sum(1), Normal(0, 1).log_prob(z).sum(1)
    log_n = math.log(6)
    torch.testing.assert_close(output.mutual_information, (log_q - log_joint).mean() + log_n)
    torch.testing.assert_close(output.total_correlation, (log_joint - log_product).mean() + (DIM - 1) * log_n)
    torch.testing.assert_close(output.dimension_kl, (log_product - log_p).mean() - DIM * log_n)
    weighted = 0.5 * output.mutual_information + 3.0 * output.total_correlation + 2.0 * output.dimension_kl
    torch.testing.assert_close(output.loss, output.recon_loss + weighted)


@pytest.mark.parametrize("estimator", ["weighted", "stratified"])
def test_the_three_terms_sum_to_the_kl_in_expectation(estimator):
    model, x = beta_tc(4, estimator)
    draws, kl = [], model(x).kl
    for _ in range(400):
        output = model(x)
        draws.append(output.mutual_information + output.total_correlation + output.dimension_kl)
    draws = torch.stack(draws)
    assert (draws.mean() - kl).abs() < 5 * draws.std() / len(draws) ** 0.5


def test_the_stratified_weights_are_unbiased():
    """Over all batches of 3 of 5 samples that have sample 0 in one place, each sample's posterior has a mean weight of 1 / 5."""
    weights = log_importance_weights(3, 5, "stratified", torch.zeros((), dtype=torch.float64)).exp()
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double())
    for row in range(3):
        batches = [batch for batch in itertools.permutations(range(5), 3) if batch[row] == 0]
        mean = torch.zeros(5).double()
        for batch in batches:
            mean[list(batch)] += weights[row] / len(batches)
        torch.testing.assert_close(mean, torch.full((5,), 0.2).double())


@pytest.mark.parametrize("kind", ["i", "ii"])
def test_the_covariance_penalty_by_hand(kind):
    torch.manual_seed(0)
    model = DIPVAE.mlp(DATA, (), DIM, kind=kind, off_diagonal=2.0, diagonal=5.0).double()
    output = model(torch.rand(7, DATA, dtype=torch.float64))
    covariance = torch.cov(output.mu.T, correction=0)
    if kind == "ii":
        covariance = covariance + torch.diag(output.logvar.exp().mean(0))
    expected = 2 * 2.0 * covariance[0, 1] ** 2 + 5.0 * ((covariance[0, 0] - 1) ** 2 + (covariance[1, 1] - 1) ** 2)
    torch.testing.assert_close(output.penalty, expected)
    torch.testing.assert_close(output.loss, output.recon_loss + output.kl + output.penalty)


def kernel_by_hand(name: str, x: Tensor, y: Tensor) -> float:
    distance = sum((float(a) - float(b)) ** 2 for a, b in zip(x, y, strict=True))
    widths = [scale * 2 * len(x) for scale in SCALES]
    return sum(width / (width + distance) if name == "imq" else math.exp(-distance / width) for width in widths)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_the_discrepancy_by_hand(kernel):
    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pairs = list(itertools.permutations(range(5), 2))
    within = sum(kernel_by_hand(kernel, rows[i], rows[j]) for rows in (x, y) for i, j in pairs) / len(pairs)
    across = sum(kernel_by_hand(kernel, a, b) for a in x for b in y) / 25
    torch.testing.assert_close(squared_mmd(x, y, kernel).item(), within - 2 * across)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_the_discrepancy_of_equal_distributions_is_0_in_the_mean(kernel):
    torch.manual_seed(0)
    equal = torch.stack([squared_mmd(torch.randn(8, 2), torch.randn(8, 2), kernel) for _ in range(1000)])
    assert equal.mean().abs() < 4 * equal.std() / 1000**0.5
    assert (equal < 0).any()
    shifted = torch.stack([squared_mmd(torch.randn(8, 2) + 1, torch.randn(8, 2), kernel) for _ in range(100)])
    assert shifted.mean() > 5 * shifted.std() / 100**0.5


class Quadratic(nn.Module):
    """The log density ratio of two normals with mean 0 is quadratic, so this discriminator can be the best there is."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, z: Tensor) -> Tensor:
        ratio = self.layer(torch.stack([z[:, 0] ** 2, z[:, 1] ** 2, z[:, 0] * z[:, 1]], 1))
        return torch.cat([ratio, torch.zeros_like(ratio)], 1)


def test_the_discriminator_finds_the_total_correlation_of_a_normal():
    """z has the correlation r, and so a total correlation of -log(1 - r^2) / 2."""
    torch.manual_seed(0)
    x = torch.randn(20_000, 2)
    r = 0.8
    correlated = torch.stack([x[:, 0], r * x[:, 0] + (1 - r * r) ** 0.5 * x[:, 1]], 1)
    encoder = nn.Linear(2, 4)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(4, 2))
        encoder.bias.copy_(torch.tensor([0.0, 0.0, -20.0, -20.0]))
    model = FactorVAE(encoder, nn.Linear(2, 2), 2, discriminator=Quadratic(), gamma=3.0, likelihood="gaussian")
    optimizer = torch.optim.LBFGS(model.discriminator.parameters(), max_iter=50)
    generator = torch.Generator()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(correlated, generator=generator.manual_seed(0)).discriminator_loss
        loss.backward()
        return loss

    optimizer.step(closure)
    trained = model(correlated)
    assert abs(trained.total_correlation.item() + 0.5 * math.log(1 - r * r)) < 0.03
    torch.testing.assert_close(trained.loss, trained.recon_loss + trained.kl + 3.0 * trained.total_correlation)


def test_each_loss_of_a_factor_vae_trains_its_own_parameters():
    model = FactorVAE.mlp(DATA, (), DIM, discriminator_units=8, discriminator_layers=2, prior=DiagonalPrior(DIM))
    own, of_discriminator = ([*group["params"]] for group in model.parameter_groups())
    assert {*own, *of_discriminator} == set(model.parameters())
    assert set(of_discriminator) == set(model.discriminator.parameters())
    model(torch.rand(5, DATA)).loss.backward()
    assert all(parameter.grad is not None for parameter in own)
    assert all(parameter.grad is None for parameter in of_discriminator)
    model.zero_grad()
    model(torch.rand(5, DATA)).discriminator_loss.backward()
    assert all(parameter.grad is None for parameter in own)
    assert all(parameter.grad.abs().sum() > 0 for parameter in of_discriminator)


def test_permuted_dimensions_keep_their_values_and_lose_their_company():
    z = torch.arange(12.0).view(6, 2).double()
    permuted = permute_dimensions(z, torch.Generator().manual_seed(0))
    torch.testing.assert_close(permuted.sort(0).values, z)
    assert not torch.equal(permuted[:, 1] - permuted[:, 0], z[:, 1] - z[:, 0])
