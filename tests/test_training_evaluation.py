"""Every metric that applies to a network, by Lightning's test loop and on the command line."""

import json
import math

import pytest
import torch

pytest.importorskip("lightning", reason="lightning is not installed: pip install fastvae-kernels[train]")

from fastvae import __main__ as command_line
from fastvae.models import (
    AE,
    CVAE,
    VAE,
    VQVAE,
    VQVAE2,
    DenoisingAE,
    LadderVAE,
    SemiSupervisedVAE,
    SequenceVAE,
)
from fastvae.nn import GaussianNoise, ResidualVectorQuantizer
from fastvae.training.datasets import GeneratedShapes, MNISTDigits, SklearnDigits
from fastvae.training.errors import TrainingError
from fastvae.training.evaluation import Evaluation
from fastvae.training.module import LitAutoencoder
from fastvae.training.sentences import GrammarSentences
from fastvae.training.side_by_side import compare
from tests._training import quiet_trainer

pytestmark = pytest.mark.usefixtures("one_thread")

ERRORS = {"MSE", "MAE", "PSNR [dB]"}
BOUNDS = {"ELBO [nats]", "ELBO [bits/dim]", "IWAE bound, k = 3 [nats]", "IWAE bound, k = 3 [bits/dim]"}
OF_LATENTS = {"active units", "I(x; z) [nats]", "KL of q(z) [nats]", "TC(z) [nats]", "KL of q(z_j) [nats]"}
CLASSIFIERS = {f"accuracy of {what}, {kind}" for what in "zx" for kind in ("logistic regression", "nearest neighbours")}
CODES = {"codebook perplexity", "codes used"}


def vqvae(**options) -> VQVAE:
    return VQVAE.conv(1, num_codes=8, dim=4, channels=4, hidden=2, blocks=1, **options)


def residual_vqvae() -> VQVAE:
    model = vqvae()
    return VQVAE(model.encoder, model.decoder, ResidualVectorQuantizer(2, 8, 4, channels_first=True))


NETWORKS = {
    "VAE": (lambda: VAE.mlp((1, 8, 8), (16,), 2), ERRORS | BOUNDS | OF_LATENTS | CLASSIFIERS | {"loss", "recon_loss", "kl"}),
    "AE": (lambda: AE.mlp((1, 8, 8), (16,), 2), ERRORS | CLASSIFIERS | {"loss", "recon_loss", "penalty"}),
    "DenoisingAE": (
        lambda: DenoisingAE.mlp((1, 8, 8), (16,), 2, corruption=GaussianNoise(0.3)),
        ERRORS | CLASSIFIERS | {"PSNR of corrupted images [dB]", "PSNR of denoised images [dB]"},
    ),
    "VQVAE": (vqvae, ERRORS | CODES | CLASSIFIERS | {"vq_loss"}),
    "residual VQVAE": (residual_vqvae, ERRORS | CODES | CLASSIFIERS),
    "VQVAE2": (
        lambda: VQVAE2.conv(1, num_codes=8, dim=4, channels=4, hidden=2, blocks=1),
        ERRORS | CLASSIFIERS | {f"{level} {name}" for level in ("top", "bottom") for name in CODES},
    ),
    "CVAE": (lambda: CVAE.mlp((1, 8, 8), (16,), 2), ERRORS | BOUNDS | OF_LATENTS),
    "SemiSupervisedVAE": (lambda: SemiSupervisedVAE.mlp((1, 8, 8), (16,), 2), ERRORS | BOUNDS | OF_LATENTS | {"accuracy"}),
    "LadderVAE": (lambda: LadderVAE.mlp((1, 8, 8), (16, 8), (3, 2)), ERRORS | BOUNDS | CLASSIFIERS),
}


def evaluated(network, data, **options) -> dict[str, float]:
    torch.manual_seed(0)
    evaluation = Evaluation(**{"bound_draws": 3, "bound_samples": 50, "train_samples": 100, "features": None, **options})
    quiet_trainer(callbacks=[evaluation]).test(LitAutoencoder(network()), datamodule=data, verbose=False)
    return evaluation.figures


@pytest.mark.parametrize(("network", "expected"), NETWORKS.values(), ids=NETWORKS)
def test_every_network_has_its_figures(network, expected, capsys):
    figures = evaluated(network, SklearnDigits())
    assert expected <= figures.keys()
    assert all(math.isfinite(value) for value in figures.values())
    assert not {name for name in figures if name.startswith(("accuracy of", "IWAE", "active"))} - expected
    printed = capsys.readouterr().out
    assert all(name in printed for name in expected)


def test_known_factors_judge_the_latents(capsys):
    data = GeneratedShapes(count=400, shape=2, scale=2, rotation=2, position_x=8, position_y=8)
    figures = evaluated(lambda: VAE.mlp((1, 64, 64), (8,), 3), data)
    names = {"mig_histogram", "dci_disentanglement", "dci_completeness", "dci_informativeness_test", "sap", "modularity"}
    assert names | {"explicitness", "beta_vae_score"} <= figures.keys()
    # No shape has the 64 samples that this score takes; the others are no worse for it.
    assert "FactorVAEScore is left out: factors: column 0 has at most 41 " in capsys.readouterr().out
    assert all(math.isfinite(value) for value in figures.values())
    batch = data.samples("test", 5)
    assert torch.equal((255 * data.images.render(batch["factors"])).round().to(torch.uint8), batch["x"])
    assert torch.equal(batch["label"], batch["factors"][:, 0])


def test_samples_are_judged_by_named_features(tmp_path, monkeypatch):
    # The network of the features is trained and kept there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    figures = evaluated(lambda: VAE.mlp((1, 28, 28), (16,), 2), MNISTDigits(val=0.0), features="lenet-mnist")
    assert figures["FID[lenet-mnist]"] > 10
    assert figures["KID[lenet-mnist]"] > 0
    assert 1 <= figures["IS[lenet-mnist]"] <= 10


def test_sentences_have_nats_a_token():
    data = GrammarSentences(count=200)
    figures = evaluated(lambda: SequenceVAE.recurrent(len(data.vocabulary), 4, 8, 16), data)
    assert figures["ELBO [nats a token]"] * 4 > figures["ELBO [nats]"] > figures["ELBO [nats a token]"] * 12
    assert "MSE" not in figures


def test_figures_are_those_of_the_whole_test_part():
    data, network = SklearnDigits(batch_size=50), VAE.mlp((1, 8, 8), (16,), 2)
    lit = LitAutoencoder(network)
    evaluation = Evaluation(bound_draws=0, features=None)
    quiet_trainer(callbacks=[evaluation]).test(lit, datamodule=data, verbose=False)
    x = data.samples("test")["x"].float() / 255
    assert evaluation.figures["MSE"] == pytest.approx((network.reconstruct(x) - x).square().mean().item(), rel=1e-5)
    mu = network.encode(x).mean.double()
    assert evaluation.figures["active units"] == (mu.var(0, correction=0) > 0.01).sum()
    assert "ELBO [nats]" not in evaluation.figures


@pytest.mark.parametrize("name", ["bound_draws", "bound_samples", "train_samples"])
def test_bad_options_are_named(name):
    with pytest.raises(ValueError, match=f"^{name}: got -1, takes an integer >= 0"):
        Evaluation(**{name: -1})


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two trainings of a step."""
    paths = []
    for name in ("VAE_mlp", "AE_mlp"):
        folder = tmp_path_factory.mktemp(name)
        options = [
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            f"--trainer.default_root_dir={folder}",
            "--pictures.every_n_epochs=0",
        ]
        network = [f"--network={name}", "--network.data_shape=[1,8,8]", "--network.hidden=[8]", "--network.latent_dim=2"]
        command_line.main(["fit", "--data=SklearnDigits", *network, *options])
        paths += folder.rglob("last.ckpt")
    return paths


QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--evaluation.features=null"]


def test_one_command_judges_and_another_compares(checkpoints, tmp_path, capsys):
    for path in checkpoints:
        command_line.main(["test", str(path), *QUIET, "--evaluation.bound_draws=2"])
        content = json.loads(path.with_suffix(".test.json").read_text())
        assert content["metrics"]["MSE"] > 0
        assert content["settings"]["split"] == "test"
        assert content["settings"]["samples"] == 359
        assert {"torch", "seed", "binarization", "latents", "data_options"} <= content["settings"].keys()
    command_line.main(["compare", *map(str, checkpoints), "--out", str(tmp_path)])
    text = (tmp_path / "comparison.md").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("| metric | VAE.mlp (A) | AE.mlp (B) |")
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    assert json.loads((tmp_path / "comparison.json").read_text()).keys() == {str(path) for path in checkpoints}


def test_what_has_not_been_evaluated_is_evaluated(checkpoints, tmp_path):
    new = tmp_path / "new.ckpt"
    new.write_bytes(checkpoints[1].read_bytes())
    command_line.main(["compare", str(new), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "new.test.json").read_text())["metrics"]["MSE"] > 0
    assert (tmp_path / "out" / "comparison.png").is_file()


def test_what_cannot_be_compared_is_named(tmp_path):
    with pytest.raises(SystemExit, match=r"^fastvae: checkpoint: .*missing.ckpt is no file"):
        command_line.main(["compare", str(tmp_path / "missing.ckpt")])
    with pytest.raises(TrainingError, match=r"^checkpoints: got none, takes at least one"):
        compare([])
