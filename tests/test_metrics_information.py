"""What latents hold: active units, the parts of the KL, codebook usage and rate against distortion, against closed forms."""

import math

import pytest
import torch
from torch import Tensor, nn

for package in ("sklearn", "torchmetrics"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[metrics]")

from fastvae.distributions import GaussianLikelihood  # noqa: E402
from fastvae.metrics.active_units import ActiveUnits, merge_moments  # noqa: E402
from fastvae.metrics.codebook_usage import CodebookUsage  # noqa: E402
from fastvae.metrics.information import PosteriorDecomposition, PosteriorTerms  # noqa: E402
from fastvae.metrics.rate_distortion import Coded, RateDistortion, Symbols, rate_distortion, residual_depths  # noqa: E402
from fastvae.models import VAE, VQVAE, VQVAE2, LadderVAE  # noqa: E402
from fastvae.nn import ResidualVectorQuantizer, VectorQuantizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def active_units(mu: Tensor, batch: int, **options) -> ActiveUnits:
    metric = ActiveUnits(mu[0].numel(), **options)
    for part in mu.split(batch):
        metric.update(part)
    return metric


def decomposition(mu: Tensor, logvar: Tensor, batch: int = 1000, **options) -> PosteriorTerms:
    metric = PosteriorDecomposition(**options)
    for parts in zip(mu.split(batch), logvar.split(batch), strict=True):
        metric.update(*parts)
    return metric.compute()


def assert_same(result: tuple, expected: tuple, **tolerances) -> None:
    for value, number in zip(result, expected, strict=True):
        torch.testing.assert_close(value, torch.as_tensor(number, dtype=value.dtype), **tolerances)


def test_active_units_by_hand():
    mu = torch.tensor([[0.0, 1.0, 0.05], [0.0, 3.0, -0.05]], dtype=torch.float64)
    assert_same(active_units(mu, 2).compute(), (1, [0.0, 1.0, 0.0025]))
    assert active_units(mu, 2, threshold=0.002).compute().num_active == 2


@pytest.mark.parametrize("batch", [1, 7, 100])
def test_the_variances_keep_their_digits_beside_a_large_mean(batch):
    mu = 1e6 + 1e-2 * randn(100, 2, 3)
    expected = mu.flatten(1).var(0, correction=0)
    torch.testing.assert_close(active_units(mu, batch).compute().variances, expected, rtol=1e-7, atol=0.0)
    torch.testing.assert_close(active_units(mu.flip(0), batch).compute().variances, expected, rtol=1e-7, atol=0.0)


def test_moments_of_parts_without_samples_change_nothing():
    part = active_units(randn(5, 2), 5).moments
    assert torch.equal(merge_moments(torch.stack([torch.zeros_like(part), part])), part)
    assert torch.equal(merge_moments(torch.zeros(3, 3, 2)), torch.zeros(3, 2))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_a_reset_forgets_and_an_empty_batch_adds_nothing():
    metric = active_units(randn(5, 2), 5)
    before = metric.compute()
    metric.update(torch.empty(0, 2))
    assert_same(metric.compute(), before)
    metric.reset()
    with pytest.raises(ValueError, match="mu: got 0 samples, active units take at least 2"):
        metric.compute()


@pytest.mark.parametrize(
    ("mu", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"mu: got shape \(3,\), takes \(batch, \*latent_shape\)"),
        (torch.zeros(3, 4), ValueError, r"mu: got shape \(3, 4\), takes latent_dim elements for each sample, \(3, 2\)"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, "mu: got torch.int64, takes a floating dtype"),
        (torch.full((3, 2), math.nan), ValueError, "mu: got values that are not finite"),
    ],
)
def test_active_units_name_wrong_input(mu, error, message):
    with pytest.raises(error, match=message):
        ActiveUnits(2).update(mu)


@pytest.mark.parametrize("options", [{"latent_dim": 0}, {"latent_dim": 2, "threshold": -1.0}])
def test_active_units_name_wrong_options(options):
    with pytest.raises(ValueError, match=r"latent_dim: got 0|threshold: got -1\.0"):
        ActiveUnits(**options)


def normal_terms(covariance: Tensor, variance: float) -> list[float]:
    """The terms for means from N(0, covariance) and posteriors of one variance: the aggregate is N(0, covariance + variance I)."""
    aggregate = covariance + variance * torch.eye(len(covariance))
    kl = 0.5 * (torch.diagonal(aggregate) - 1).sum() - 0.5 * len(covariance) * math.log(variance)
    mutual_information = 0.5 * torch.logdet(aggregate / variance)
    dimension_kl = 0.5 * (torch.diagonal(aggregate) - 1 - torch.diagonal(aggregate).log()).sum()
    total_correlation = 0.5 * (torch.diagonal(aggregate).log().sum() - torch.logdet(aggregate))
    return [x.item() for x in (kl, mutual_information, total_correlation + dimension_kl, total_correlation, dimension_kl)]


@pytest.mark.parametrize("correlation", [0.0, 0.9])
def test_the_terms_of_a_normal_aggregate_have_their_closed_forms(correlation):
    covariance = 2.0 * torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)
    mu = randn(4000, 2) @ torch.linalg.cholesky(covariance).T
    # The means have exactly this covariance, so that what differs is the estimate alone.
    mu = (mu - mu.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(mu.T, correction=0))).T @ torch.linalg.cholesky(covariance).T
    found = decomposition(mu, torch.full_like(mu, math.log(0.5)), num_samples=2000)
    assert_same(found, normal_terms(covariance, 0.5), atol=0.02, rtol=0.0)


def test_the_terms_of_three_posteriors_by_quadrature():
    mu, logvar = torch.tensor([[-1.0], [0.0], [2.0]]).double(), torch.tensor([[-1.0], [0.3], [-2.0]]).double()
    grid = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = torch.distributions.Normal(mu, (logvar / 2).exp()).log_prob(grid).exp().mean(0)
    log_p = torch.distributions.Normal(0, 1).log_prob(grid)
    aggregate_kl = torch.trapezoid(torch.special.xlogy(density, density) - density * log_p, grid).item()
    kl = (0.5 * (mu.square() + logvar.exp() - 1 - logvar)).mean().item()
    found = decomposition(mu, logvar, num_samples=30_000)
    assert_same(found, (kl, kl - aggregate_kl, aggregate_kl, 0.0, aggregate_kl), atol=0.005, rtol=0.0)
    torch.testing.assert_close(found.total_correlation, torch.zeros(()).double(), atol=1e-12, rtol=0.0)


def test_posteriors_that_are_far_apart_have_a_mutual_information_of_log_n():
    mu = 1e3 * torch.arange(50.0).view(25, 2).double()
    found = decomposition(mu, torch.full_like(mu, -3.0), num_samples=100)
    torch.testing.assert_close(found.mutual_information.item(), math.log(25), atol=1e-9, rtol=0.0)


def test_posteriors_of_very_small_variance_keep_their_digits():
    mu = 1e3 + torch.arange(10.0).view(10, 1).double()
    found = decomposition(mu, torch.full_like(mu, -30.0), num_samples=100)
    torch.testing.assert_close(found.mutual_information.item(), math.log(10), atol=1e-9, rtol=0.0)


def test_posteriors_that_are_the_prior_have_no_information():
    found = decomposition(torch.zeros(20, 3), torch.zeros(20, 3), num_samples=50)
    assert_same(found, (0.0,) * 5, atol=1e-12, rtol=0.0)


@pytest.mark.parametrize("num_samples", [2, 30, 77])
def test_the_terms_add_up(num_samples):
    mu, logvar = randn(30, 3), randn(30, 3, seed=1) - 1
    found = decomposition(mu, logvar, num_samples=num_samples)
    torch.testing.assert_close(found.kl, 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean())
    torch.testing.assert_close(found.mutual_information + found.aggregate_kl, found.kl)
    torch.testing.assert_close(found.total_correlation + found.dimension_kl, found.aggregate_kl)


def test_the_decomposition_depends_on_the_samples_and_the_seed_alone():
    mu, logvar, order = randn(50, 2, 2), randn(50, 2, 2, seed=1) - 1, torch.randperm(50)
    expected = decomposition(mu, logvar, num_samples=60)
    for found in (decomposition(mu, logvar, 7, num_samples=60), decomposition(mu[order], logvar[order], 13, num_samples=60)):
        assert_same(found, expected, rtol=0.0, atol=0.0)
    other = decomposition(mu, logvar, num_samples=60, seed=1)
    assert torch.equal(other.kl, expected.kl)
    assert not torch.equal(other.mutual_information, expected.mutual_information)


def test_the_decomposition_keeps_no_more_samples_than_it_may():
    mu = 1e3 * torch.arange(100.0).view(100, 1).double()
    found = decomposition(mu, torch.zeros_like(mu), 10, max_samples=20, num_samples=40)
    torch.testing.assert_close(found.mutual_information.item(), math.log(20), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize(
    ("mu", "logvar", "error", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 3), ValueError, r"logvar: got shape \(3, 3\), takes the shape of mu, \(3, 2\)"),
        (torch.zeros(3), torch.zeros(3), ValueError, r"mu: got shape \(3,\), takes \(batch, \*latent_shape\)"),
        (torch.zeros(3, 2), torch.full((3, 2), math.inf), ValueError, "logvar: got values that are not finite"),
        (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2), TypeError, "mu: got torch.int32, takes a floating dtype"),
    ],
)
def test_the_decomposition_names_wrong_input(mu, logvar, error, message):
    with pytest.raises(error, match=message):
        PosteriorDecomposition().update(mu, logvar)


def test_the_decomposition_names_too_few_samples_and_draws():
    with pytest.raises(ValueError, match="PosteriorDecomposition: got 1 samples, takes at least 2"):
        decomposition(torch.zeros(1, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="num_samples: got 1, takes at least 2"):
        PosteriorDecomposition(num_samples=1)


def test_codebook_usage_by_hand():
    metric = CodebookUsage(4)
    metric.update(torch.tensor([[0, 0], [1, 2]]))
    assert_same(metric.compute(), (2**1.5, 0.75, 1.5))
    assert metric.counts.dtype == torch.int64
    metric.update(torch.tensor([1, 2, 3, 3], dtype=torch.uint8))
    assert_same(metric.compute(), (4.0, 1.0, 2.0))


def test_each_head_has_a_codebook_of_its_own():
    metric = CodebookUsage(4, heads=2)
    metric.update(torch.tensor([[[0, 3]], [[1, 3]]]))
    assert_same(metric.compute(), ([2.0, 1.0], [0.5, 0.25], [1.0, 0.0]))


@pytest.mark.parametrize(
    ("heads", "indices", "error", "message"),
    [
        (None, torch.tensor([0, 4]), ValueError, "indices: got 4, takes integers from 0 to 3"),
        (None, torch.tensor([0, -1]), ValueError, "indices: got -1, takes integers from 0 to 3"),
        (None, torch.zeros(2), TypeError, "indices: got torch.float32, takes integers"),
        (2, torch.zeros(4, 3, dtype=torch.int64), ValueError, r"indices: got shape \(4, 3\), takes \(..., heads\) with 2 heads"),
    ],
)
def test_codebook_usage_names_wrong_input(heads, indices, error, message):
    with pytest.raises(error, match=message):
        CodebookUsage(4, heads).update(indices)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_codebook_usage_without_indices_raises():
    with pytest.raises(ValueError, match="indices: got none, codebook usage takes at least one"):
        CodebookUsage(4).compute()


def _results_of_rank(rank: int, parts: list[slice]) -> list:
    mu, logvar, indices = randn(40, 2), randn(40, 2, seed=1) - 1, torch.arange(40) % 7
    torch.set_num_threads(1)
    metrics = ActiveUnits(2), PosteriorDecomposition(num_samples=50), CodebookUsage(8)
    part = parts[rank]
    if len(mu[part]) > 0:
        metrics[0].update(mu[part])
        metrics[1].update(mu[part], logvar[part])
        metrics[2].update(indices[part])
    return [tuple(value.tolist() for value in metric.compute()) for metric in metrics]


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
@pytest.mark.parametrize("split", [15, 0])
def test_two_processes_have_the_results_of_one(ranks, split):
    expected = _results_of_rank(0, [slice(40)])
    for found in ranks.run(_results_of_rank, [slice(split), slice(split, 40)]):
        for result, one in zip(found, expected, strict=True):
            assert_same([torch.tensor(x, dtype=torch.float64) for x in result], one, rtol=1e-12, atol=1e-15)


class Moments(nn.Module):
    """The posterior N(x, 1) of each element."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros_like(x)


def normal_vae(dimensions: int) -> VAE:
    return VAE(Moments(), nn.Identity(), dimensions, likelihood=GaussianLikelihood())


def test_the_rate_and_the_distortion_of_a_vae_by_hand():
    """z = x + noise, so the KL is |x|^2 / 2, and the mean squared error that of the noise, 1."""
    x = randn(4000, 3)
    (row,) = rate_distortion(
        [(4.0, normal_vae(3))], [x[:1000], (x[1000:], None)], data_range=2.0, generator=torch.Generator().manual_seed(0)
    )
    assert row.setting == 4.0
    assert row.entropy_rate is None
    assert row.rate == pytest.approx(0.5 * x.square().mean().item() / math.log(2))
    assert row.mse == pytest.approx(1.0, abs=0.05)
    assert row.psnr == pytest.approx(10 * math.log10(4.0 / row.mse))


def test_free_bits_and_beta_leave_the_rate_as_it_is():
    torch.manual_seed(0)
    model, x = VAE.mlp((1, 8, 8), (16,), 2, beta=4.0, free_bits=3.0), torch.rand(20, 1, 8, 8)
    q = model.encode(x)
    kl = 0.5 * (q.mu.square() + q.logvar.exp() - 1 - q.logvar).sum(1).mean().item()
    assert rate_distortion([("", model)], [x])[0].rate == pytest.approx(kl / (64 * math.log(2)), rel=1e-5)
    assert model.training


def test_a_hierarchy_has_the_rate_of_all_its_levels():
    torch.manual_seed(0)
    model, x = LadderVAE.mlp((1, 4, 4), (8, 8), (3, 2)).eval(), torch.rand(20, 1, 4, 4)
    (row,) = rate_distortion([("", model)], [x], generator=torch.Generator().manual_seed(1))
    expected = model(x, generator=torch.Generator().manual_seed(1))
    assert row.rate == pytest.approx(expected.kl.item() / (16 * math.log(2)), rel=1e-5)
    assert row.mse == pytest.approx((model.likelihood.mean(expected.recon) - x).square().mean().item(), rel=1e-5)


def vqvae(quantizer: nn.Module) -> VQVAE:
    return VQVAE(nn.Identity(), nn.Identity(), quantizer)


def test_the_rate_of_a_vqvae_by_hand():
    quantizer = VectorQuantizer(4, 1, channels_first=True)
    quantizer.codebook.copy_(torch.tensor([[0.0], [1.0], [5.0], [6.0]]))
    x = torch.tensor([[[0.0, 0.1]], [[0.9, 1.0]]])
    (row,) = rate_distortion([("vq", vqvae(quantizer))], [x])
    # Two indices of 2 bits, used as two codes of equal frequency, for each sample of two elements.
    expected = RateDistortion("vq", 2.0, 1.0, 0.005, 10 * math.log10(1 / 0.005))
    assert row[:3] == expected[:3]
    assert row[3:] == pytest.approx(expected[3:], rel=1e-5)


def test_heads_and_levels_each_count():
    torch.manual_seed(0)
    x = torch.rand(6, 1, 8, 8)
    heads = VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1, heads=2)
    levels = VQVAE2.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1)
    rows = rate_distortion([("heads", heads), ("levels", levels)], [x])
    assert rows[0].rate == pytest.approx(4 * 2 * 3 / 64)
    assert rows[1].rate == pytest.approx((4 + 1) * 3 / 64)
    assert all(0 <= row.entropy_rate <= row.rate for row in rows)


def test_each_depth_of_a_residual_quantizer_is_a_point():
    torch.manual_seed(0)
    x = torch.rand(50, 2, 4)
    model = vqvae(ResidualVectorQuantizer(3, 8, 2, channels_first=True, kmeans_iters=5))
    for _ in range(20):
        model(x)
    rows = rate_distortion(residual_depths(model), [x[:20], x[20:]])
    assert [row.setting for row in rows] == [1, 2, 3]
    assert [row.rate for row in rows] == pytest.approx([1.5, 3.0, 4.5])
    assert rows[0].mse > rows[1].mse > rows[2].mse
    assert rows[2].mse == pytest.approx((model.reconstruct(x) - x).square().mean().item(), rel=1e-5)
    usage = CodebookUsage(8, 3)
    usage.update(model.encode(x))
    assert rows[2].entropy_rate == pytest.approx(usage.compute().entropy.sum().item() * 4 / 8)


def test_a_function_is_a_code_and_bytes_are_shares_of_255():
    x = torch.tensor([[0, 255]], dtype=torch.uint8)
    symbols = Symbols(torch.tensor([[[0]]]), 2)
    (row,) = rate_distortion([("", lambda batch: Coded(batch / 255, torch.tensor([3.0]), (symbols,)))], [x])
    assert row == ("", 1.5, 0.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("model", "data", "error", "message"),
    [
        (nn.Linear(2, 2), [torch.zeros(1, 2)], TypeError, "models: got Linear, takes a VAE"),
        (normal_vae(2), [], ValueError, "data: gave nothing for the setting 'a'"),
        (lambda x: Coded(x[:, :1], torch.zeros(1)), [torch.zeros(1, 2)], ValueError, r"recon: got shape \(1, 1\), takes the shape"),
        (lambda x: Coded(x, torch.zeros(())), [torch.zeros(1, 2)], ValueError, r"bits: got shape \(\), takes one number for each"),
        (lambda x: Coded(x, torch.full((1,), math.nan)), [torch.zeros(1, 2)], ValueError, "bits: got values that are not finite"),
        (
            lambda x: Coded(x * math.nan, torch.zeros(1)),
            [torch.zeros(1, 2)],
            ValueError,
            "recon: the squared error of the setting",
        ),
        (vqvae(nn.Identity()), None, TypeError, "model: got a quantizer of Identity, takes a VQVAE with a ResidualVectorQuantizer"),
    ],
)
def test_rate_distortion_names_wrong_input(model, data, error, message):
    with pytest.raises(error, match=message):
        rate_distortion([("a", model)], data) if data is not None else residual_depths(model)


def test_rate_distortion_names_a_wrong_range():
    with pytest.raises(ValueError, match="data_range: got 0, takes a number > 0"):
        rate_distortion([], [], data_range=0)
