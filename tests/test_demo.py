"""The demonstration in small: data, comparison, pictures, report, command line."""

import json
import math
import subprocess
import sys

import pytest
import torch
from _helpers import places

for package in ("jsonargparse", "lightning", "matplotlib", "mlxtend"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from matplotlib.image import imread  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.models import VAE  # noqa: E402
from fastvae.nn import GroupNormSiLU, UpsampleConv2d, VectorQuantizer  # noqa: E402
from fastvae.training import headline, plots  # noqa: E402
from fastvae.training._measure import interleaved_medians, peak_memory  # noqa: E402
from fastvae.training.comparison import FUSED, PLAIN, compare, negative_elbo, relative_differences  # noqa: E402
from fastvae.training.datasets import MNISTDigits  # noqa: E402
from fastvae.training.demo import COMPARED_STEPS, check_agreement  # noqa: E402
from fastvae.training.experiment import Experiment, evaluate, run  # noqa: E402
from fastvae.training.plain_torch import PlainVectorQuantizer, with_plain_layers  # noqa: E402

PICTURES = ["headline", "latent_scatter", "loss_curves", "manifold", "reconstructions", "samples"]
PAIRS = ["step of a residual conv VAE", "step of a VQ-VAE", "loss lines alone", "step of a small conv VAE"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors are small here, and threads that wait for one another on a busy machine take far longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    """Batches of 8-bit digits."""
    return MNISTDigits().samples("test", 128)["x"].split(64)


@pytest.fixture(scope="module")
def small_images():
    """Makes the headline's networks take milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(headline, "IMAGE_SIZE", 16)
        yield


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, small_images):
    out = tmp_path_factory.mktemp("demo") / "out"
    command_line.main(["demo", "--out", str(out), "--epochs", "2", "--train_batches", "2"])
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
    assert report.keys() == {"data", "settings", "test", "models", "headline", "environment", "seconds"}
    assert [report["data"][f"{part}_images"] for part in ("train", "val", "test")] == [3500, 500, 1000]
    assert report["settings"] == {"seed": 0, "batch_size": 128, "optimizer": "adam", "learning_rate": 1e-3}
    assert list(report["models"]) == ["conv VAE, d = 20", "MLP VAE, d = 20", "conv VAE, d = 2"]
    assert all(math.isfinite(number) for number in numbers(report))
    for model in report["models"].values():
        test = model["test"]
        assert test.keys() == {"elbo", "recon_loss", "kl", "mse_per_pixel_mean_z", "mse_per_pixel_sampled_z"}
        assert test["elbo"] == pytest.approx(-(test["recon_loss"] + test["kl"]), rel=1e-5)
        assert 0 < test["mse_per_pixel_mean_z"] < 0.3
    for compared in ("conv VAE, d = 20", "MLP VAE, d = 20"):
        assert report["models"][compared]["steps"] == 4
        comparison = report["models"][compared]["comparison"]
        assert comparison["steps"] == COMPARED_STEPS
        assert comparison["largest_relative_difference_of_a_loss"] < 1e-9
    assert report["models"]["conv VAE, d = 2"]["epochs"] == 4
    assert list(report["headline"]) == PAIRS
    for figures in report["headline"].values():
        assert figures["median_ms"].keys() == figures["peak_memory_mib"].keys() == {"plain", "fastvae"}
        assert min(*figures["median_ms"].values(), *figures["peak_memory_mib"].values()) > 0


@pytest.mark.parametrize("make", [VAE.conv, VAE.mlp], ids=["conv", "mlp"])
def test_both_kinds_of_loss_lines_train_alike(digits, make):
    torch.manual_seed(0)
    model = make(latent_dim=5)
    before = [p.clone() for p in model.parameters()]
    contenders = compare(model, [*digits] * 3, seed=0)
    assert len(relative_differences(contenders)) == 6
    assert max(relative_differences(contenders)) < 1e-9
    assert contenders["fastvae"].losses[-1] < contenders["fastvae"].losses[0]
    for plain, fused in zip(*(c.model.parameters() for c in contenders.values()), strict=True):
        torch.testing.assert_close(plain, fused, rtol=0, atol=1e-8)
    assert all(map(torch.equal, before, model.parameters()))


def test_fused_lines_are_the_model(digits):
    model, x, eps = VAE.mlp(), digits[0] / 255, torch.randn(64, 20)
    assert torch.equal(negative_elbo(model, FUSED, x, eps), model(x, eps=eps).loss)
    torch.testing.assert_close(negative_elbo(model, PLAIN, x, eps), model(x, eps=eps).loss)


def test_training_is_reproducible(digits):
    experiments = []
    for _ in range(2):
        torch.manual_seed(0)
        experiments.append(Experiment("MLP VAE", VAE.mlp(latent_dim=2), epochs=3, compared_steps=0))
        run(experiments[-1], MNISTDigits(), seed=0, train_batches=2)
    first, second = (experiment.history for experiment in experiments)
    assert torch.equal(torch.stack(first.steps), torch.stack(second.steps))
    assert first.validations == second.validations
    assert len(first.steps) == 6
    assert first.validations.keys() == {2, 4, 6}
    assert first.validations[6] < first.validations[2]
    figures = [evaluate(experiment, digits[0], seed=0) for experiment in experiments]
    assert figures[0] == figures[1]
    assert experiments[0].model.training


def test_disagreement_ends_the_program():
    def report(difference):
        return {"models": {"A": {"comparison": {"largest_relative_difference_of_a_loss": difference}}, "B": {}}}

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
def test_loss_lines_hold_less_memory(place, small_images):
    figures = headline.measure(headline.loss_lines())
    assert figures["peak_memory_mib"]["fastvae"] < figures["peak_memory_mib"]["plain"]
    assert min(figures["median_ms"].values()) > 0


def test_memory_of_a_step_counts_its_gradients():
    linear = torch.nn.Linear(1000, 100)
    step = headline.training_step([linear], lambda: linear(torch.ones(1, 1000)).sum())
    step()
    assert peak_memory(step) > 4 * sum(p.numel() for p in linear.parameters())
    assert all(p.grad is None for p in linear.parameters())


def test_verdict_says_where_it_does_not_pay():
    assert headline.verdict({"plain": 3.0, "fastvae": 2.0}, "faster") == "1.5x faster"
    assert headline.verdict({"plain": 1.02, "fastvae": 1.0}, "faster") == "does not pay (1.02x)"
    assert headline.verdict({"plain": 1.0, "fastvae": 2.0}, "less") == "does not pay (0.50x)"


def test_other_quantizer_is_the_plain_one_where_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    label, quantizer = headline.other_quantizer(16, 4)
    assert label == "plain torch"
    assert isinstance(quantizer, PlainVectorQuantizer)


def test_plain_quantizer_does_what_ours_does():
    torch.manual_seed(0)
    plain, ours = PlainVectorQuantizer(16, 4), VectorQuantizer(16, 4, channels_first=True)
    ours.load_state_dict(plain.state_dict(), strict=False)
    for _ in range(3):
        x = torch.randn(2, 4, 5, 3)
        quantized, loss = plain(x)
        output = ours(x)
        torch.testing.assert_close(quantized, output.quantized)
        torch.testing.assert_close(loss, output.loss)
        torch.testing.assert_close(plain.codebook, ours.codebook)


def test_plain_layers_compute_the_same():
    torch.manual_seed(0)
    model = torch.nn.Sequential(GroupNormSiLU(2, 4), UpsampleConv2d(4, 3), GroupNormSiLU(1, 3, activation="none"))
    x = torch.randn(2, 4, 5, 6)
    expected = model(x)
    plain = with_plain_layers(model)
    assert not any(isinstance(module, GroupNormSiLU | UpsampleConv2d) for module in plain.modules())
    torch.testing.assert_close(plain(x), expected)


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


@pytest.mark.parametrize("module", ["jsonargparse", "matplotlib.axes", "mlxtend.data"])
def test_missing_dependency_names_the_extra(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "fastvae.training.plots")
    monkeypatch.delattr("fastvae.training.plots")
    package = module.partition(".")[0]
    with pytest.raises(SystemExit, match=rf"^fastvae: {package} is not installed: pip install fastvae-kernels\[train\]$"):
        command_line.main(["demo", "--out", str(tmp_path), "--epochs", "1", "--train_batches", "1"])


@pytest.mark.parametrize("name", ["epochs", "train_batches"])
def test_counts_that_do_not_fit(tmp_path, name):
    with pytest.raises(ValueError, match=rf"^{name}: got 0, takes"):
        command_line.main(["demo", "--out", str(tmp_path), f"--{name}", "0"])


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
