"""Metrics of what people use autoencoders for: anomalies, completion, codes for classifiers, molecules."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastvae.distributions import GaussianLikelihood
from fastvae.metrics.anomaly import AnomalyDetection, anomaly_scores, leave_one_class_out, threshold_of
from fastvae.metrics.completion import RegionQuality, complete, downscaled, masked
from fastvae.metrics.downstream import downstream_accuracy
from fastvae.models import AE, CVAE, VAE, VQVAE

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_areas_are_those_of_scikit_learn_and_of_counting_pairs():
    scores, anomalies = torch.rand(200, generator=seeded()).round(decimals=1), torch.rand(200, generator=seeded(1)) < 0.2
    metric = AnomalyDetection(threshold=0.5)
    for part in torch.randperm(200, generator=seeded(2)).split(31):
        metric.update(scores[part], anomalies[part])
    result = metric.compute()
    pairs = scores[anomalies][:, None].double() - scores[~anomalies].double()
    assert result.auc_roc.item() == pytest.approx((pairs.sign().mean().item() + 1) / 2, abs=1e-12)
    assert result.share == anomalies.double().mean()
    assert result.found.item() == pytest.approx((scores[anomalies] > 0.5).double().mean().item())
    assert result.false_alarms.item() == pytest.approx((scores[~anomalies] > 0.5).double().mean().item())


def test_a_perfect_score_and_its_opposite():
    anomalies = torch.arange(10) >= 7
    for sign, roc in ((1, 1.0), (-1, 0.0)):
        metric = AnomalyDetection()
        metric.update(sign * torch.arange(10.0), anomalies)
        assert metric.compute().auc_roc == roc
    metric.reset()
    metric.update(torch.zeros(10), anomalies)
    assert metric.compute()[:3] == (0.5, 0.3, 0.3)


def test_scores_of_a_vae_are_what_they_say():
    torch.manual_seed(0)
    model, x = VAE.mlp(6, (8,), 2), torch.rand(5, 6)
    torch.testing.assert_close(anomaly_scores(model, x), (model.reconstruct(x) - x).square().sum(1))
    bound, probability = (
        anomaly_scores(model, x, score, num_samples=400, generator=seeded()) for score in ("negative_elbo", "reconstruction_probability")
    )
    mu, logvar = model.encode(x)
    kl = 0.5 * (mu.square() + logvar.exp() - logvar - 1).sum(1)
    torch.testing.assert_close(bound - probability, kl)
    given = CVAE.mlp(6, (8,), 2, num_classes=3).given(torch.tensor([0, 1, 2, 0, 1]))
    assert anomaly_scores(given, x, "reconstruction_probability").shape == (5,)
    assert anomaly_scores(AE.mlp(6, (8,), 2), x).shape == (5,)


def test_each_class_is_left_out_of_the_training_in_turn():
    x = torch.eye(3).repeat(40, 1) + 0.01 * torch.randn(120, 3, generator=seeded())
    labels = torch.arange(120) % 3
    seen = []

    def fit(normal):
        seen.append(len(normal))
        return {"distance": lambda batch: torch.cdist(batch, normal).min(1).values, "none": lambda batch: batch[:, 0] * 0}

    results = leave_one_class_out(fit, (x, labels), (x, labels), classes=(0, 2), validation=20)
    assert list(results) == [0, 2]
    assert seen == [60, 60]
    for found in results.values():
        assert found["distance"].auc_roc == found["distance"].found == 1
        assert found["distance"].false_alarms < 0.2
        assert found["none"].auc_roc == 0.5


BAD_SCORES = [
    (lambda: anomaly_scores(AE.mlp(6, (8,), 2), torch.rand(2, 6), "negative_elbo"), TypeError, "^model: got AE for 'negative_elbo'"),
    (lambda: anomaly_scores(VQVAE.conv(1), torch.rand(1, 1, 8, 8), "reconstruction_probability"), TypeError, "^model: got VQVAE"),
    (lambda: anomaly_scores(AE.mlp(6, (8,), 2), torch.rand(2, 6), "error"), ValueError, "^score: got 'error', takes one of"),
    (lambda: threshold_of(torch.tensor([])), ValueError, "^scores: got none"),
    (lambda: threshold_of(torch.ones(3), 1.5), ValueError, "^quantile: got 1.5"),
    (lambda: AnomalyDetection().update(torch.tensor([1.0, math.nan]), torch.tensor([True, False])), ValueError, "^scores: got 1 that are"),
    (lambda: AnomalyDetection().update(torch.ones(2), torch.ones(2)), ValueError, "^anomalies: got torch.float32"),
    (
        lambda: leave_one_class_out(None, *[(torch.ones(4, 1), torch.arange(4))] * 2),
        ValueError,
        "^validation: got 400, takes fewer than the 3",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_SCORES)
def test_bad_scores_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_anomalies_alone_have_no_area():
    metric = AnomalyDetection()
    metric.update(torch.ones(2), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^anomalies: got 2 among 2 samples, takes some, and some others"):
        metric.compute()


class Affine(nn.Module):
    """The decoder of a linear-Gaussian VAE."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.weight.T


@pytest.mark.parametrize("kind", ["masked", "mixed"])
def test_completion_finds_the_most_probable_z_of_a_linear_model(kind):
    weight = torch.randn(6, 2, generator=seeded())
    visible = torch.tensor([True, True, False, True, False, False])
    observe = masked(visible) if kind == "masked" else lambda x: x @ torch.ones(6, 3)
    model = VAE(nn.Identity(), Affine(weight), 2, likelihood=GaussianLikelihood())
    x = torch.randn(4, 6, generator=seeded(1))
    observed = observe(x)
    found = complete(model, observed, observe, noise_std=0.5, steps=400, generator=seeded())
    # The most probable z of a Gaussian model solves a ridge regression.
    linear = observe(torch.eye(6)).T @ weight
    exact = torch.linalg.solve(linear.T @ linear + 0.25 * torch.eye(2), linear.T @ observed.T).T @ weight.T
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_region_quality_is_that_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics", reason="scikit-image is not installed: pip install fastvae-kernels[dev]")
    x = torch.rand(3, 1, 16, 20, generator=seeded(), dtype=torch.float64)
    recon = (x + 0.1 * torch.randn(x.shape, generator=seeded(1), dtype=torch.float64)).clamp(0, 1)
    region = torch.zeros(16, 20, dtype=torch.bool)
    # The border, which the two fill by different means, is left out.
    region[5:-5, 5:12] = True
    metric = RegionQuality()
    for part in (slice(0, 1), slice(1, 3)):
        metric.update(recon[part], x[part], region)
    psnr, ssim = metric.compute()
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    maps = [metrics.structural_similarity(a[0].numpy(), b[0].numpy(), **options)[1] for a, b in zip(recon, x, strict=True)]
    assert ssim.item() == pytest.approx(np.stack(maps)[:, region.numpy()].mean(), abs=1e-7)
    inside = [image[..., region].numpy() for image in (x, recon)]
    assert psnr.item() == pytest.approx(metrics.peak_signal_noise_ratio(*inside, data_range=1.0), abs=1e-9)


BAD_COMPLETIONS = [
    (lambda: masked(torch.ones(2)), TypeError, "^visible: got torch.float32"),
    (lambda: downscaled(1), ValueError, "^factor: got 1, takes an integer of at least 2"),
    (lambda: downscaled(3)(torch.ones(1, 1, 8, 9)), ValueError, r"^factor: got 3 for images of \(8, 9\)"),
    (lambda: complete(VAE(nn.Identity(), nn.Identity()), torch.ones(1, 2), masked(torch.ones(2) > 0)), ValueError, "^model: does not know"),
    (lambda: complete(VAE.mlp(2, (2,), 2), torch.ones(1, 2), masked(torch.ones(2) > 0), steps=0), ValueError, "^noise_std, starts, steps"),
    (lambda: RegionQuality(0.0), ValueError, "^data_range: got 0.0"),
    (lambda: RegionQuality().update(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.ones(8, 8) > 0), ValueError, "^recon, x: got"),
    (lambda: RegionQuality().compute(), ValueError, "^region: got no pixels"),
]


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize(("call", "error", "message"), BAD_COMPLETIONS)
def test_bad_completions_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_downscaling_keeps_means():
    x = torch.rand(2, 1, 8, 4, generator=seeded())
    torch.testing.assert_close(downscaled(4)(x), torch.stack([x[:, :, :4].mean((2, 3)), x[:, :, 4:].mean((2, 3))], 2)[..., None])


def test_classifiers_see_what_the_codes_have_kept():
    labels = torch.arange(300) % 3
    codes = torch.nn.functional.one_hot(labels).double() + 0.1 * torch.randn(300, 3, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(300, 3, generator=seeded(1))
    assert min(downstream_accuracy((codes[:200], labels[:200]), (codes[200:], labels[200:]))) == 1
    assert max(downstream_accuracy((noise[:200], labels[:200]), (noise[200:], labels[200:]))) < 0.5
    few = downstream_accuracy((codes[:200], labels[:200]), (codes[200:], labels[200:]), max_train=30)
    assert min(few) > 0.9


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        ((torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)), {}, "^train: got labels of 1 classes, takes at least 2"),
        ((torch.ones(3, 2), torch.zeros(2, dtype=torch.int64)), {}, r"^train: got labels of shape \(2,\) for 3 codes"),
        ((torch.full((2, 2), math.inf), torch.arange(2)), {}, "^train: got codes that are not finite"),
        ((torch.ones(2, 2), torch.arange(2)), {}, "^neighbours: got 5, takes an integer from 1 to the 2 training samples"),
    ],
)
def test_bad_codes_are_named(train, options, message):
    with pytest.raises(ValueError, match=message):
        downstream_accuracy(train, (torch.ones(1, 2), torch.zeros(1, dtype=torch.int64)), **options)


def smiles() -> dict[str, list[str]]:
    return json.loads((Path(__file__).parent / "data" / "molecules.json").read_text())


def test_molecules_are_counted_once_however_they_are_written():
    pytest.importorskip("rdkit", reason="rdkit is not installed: pip install fastvae-kernels[molecules]")
    from fastvae.metrics.molecules import MoleculeQuality

    groups = smiles()
    metric = MoleculeQuality(train=["OCC", "no molecule", "c1ccccc1"])
    for group in groups.values():
        metric.update(group)
    validity, uniqueness, novelty = metric.compute()
    # The first three groups and caffeine are one molecule each, the hands of alanine are two, of which ethanol and benzene are known.
    assert validity == 10 / 15
    assert uniqueness == 6 / 10
    assert novelty == 4 / 6
    metric.reset()
    metric.update(groups["no molecules"])
    assert metric.compute() == (0, 0, 0)


def test_bad_molecules_are_named():
    pytest.importorskip("rdkit", reason="rdkit is not installed: pip install fastvae-kernels[molecules]")
    from fastvae.metrics.molecules import MoleculeQuality

    with pytest.raises(TypeError, match=r"^smiles: got a string, takes a sequence"):
        MoleculeQuality().update("CCO")
    metric = MoleculeQuality()
    metric.update([])
    with pytest.raises(ValueError, match=r"^smiles: got none"):
        metric.compute()
