"""Pictures, curves and speed of a training, and what they are made of."""

import pytest
import torch

for package in ("lightning", "tensorboard", "PIL", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from lightning.pytorch import Trainer  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from fastvae.distributions import CholeskyPosterior, DiagonalPrior  # noqa: E402
from fastvae.models import AE, VAE, VQVAE, LadderVAE  # noqa: E402
from fastvae.training import latents, pictures  # noqa: E402
from fastvae.training.callbacks import LatentCurves, Pictures, Speed, peak_memory_mib  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.errors import TrainingError  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def vae(**parts) -> LitAutoencoder:
    torch.manual_seed(0)
    return LitAutoencoder(VAE.mlp((1, 8, 8), (16,), 3, **parts))


def train(lit, folder, *callbacks, logger=True, **options) -> Trainer:
    loggers = [TensorBoardLogger(folder, name="", version="board"), CSVLogger(folder, name="", version="csv")] if logger else False
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, logger=loggers, callbacks=list(callbacks), log_every_n_steps=1, **{**quiet, **options})
    trainer.fit(lit, SklearnDigits(batch_size=512))
    return trainer


def test_pictures_are_files_and_in_tensorboard(tmp_path):
    train(vae(), tmp_path, Pictures(every_n_epochs=2, count=4))
    found = {path.name for path in (tmp_path / "board" / "pictures" / "epoch_0001").iterdir()}
    assert found == {f"{name}.png" for name in ("reconstructions", "samples", "interpolations", "traversals")}
    assert not (tmp_path / "board" / "pictures" / "epoch_0000").exists()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert set(board.Tags()["images"]) == {"reconstructions", "samples", "interpolations", "traversals"}


def test_pictures_do_not_change_the_training(tmp_path):
    plain, watched = vae(), vae()
    train(plain, tmp_path / "a", logger=False)
    train(watched, tmp_path / "b", Pictures(), LatentCurves(), Speed(), logger=False, default_root_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), watched.state_dict().values(), strict=True))


def test_curves_of_the_latent(tmp_path):
    trainer = train(vae(), tmp_path, LatentCurves(), Speed())
    metrics = trainer.callback_metrics
    assert {"val/kl_dim_0", "val/kl_dim_1", "val/kl_dim_2", "val/active_units", "images_per_second", "peak_memory_mib"} <= metrics.keys()
    total = sum(metrics[f"val/kl_dim_{i}"] for i in range(3))
    torch.testing.assert_close(total, metrics["val/kl"], rtol=1e-4, atol=1e-5)
    assert 0 <= metrics["val/active_units"] <= 3
    assert metrics["images_per_second"] > 0
    assert metrics["peak_memory_mib"] > 10


@pytest.mark.parametrize("parts", [{"prior": DiagonalPrior(3)}, {"posterior": CholeskyPosterior()}], ids=["prior", "posterior"])
def test_no_curve_of_a_kl_that_is_no_sum_over_dimensions(parts, tmp_path):
    metrics = train(vae(**parts), tmp_path, LatentCurves()).callback_metrics
    assert "val/active_units" in metrics
    assert not [name for name in metrics if name.startswith("val/kl_dim")]


def test_memory_of_the_process_is_in_mib():
    assert 10 < peak_memory_mib(torch.device("cpu")) < 1e6


def test_a_grid_goes_row_by_row_and_is_filled_up_with_white():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    assert pictures.grid(images, columns=3, gap=0)[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 255]]
    assert pictures.grid(images, columns=3, gap=1).shape == (1, 8, 12)


def test_originals_stand_above_their_reconstructions():
    x = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    picture = pictures.pairs(x, x + 10, columns=2)
    assert picture[0, 2::5, 2::5].tolist() == [[0, 1], [10, 11], [2, 3], [12, 13]]


def test_values_out_of_range_are_clipped():
    x = torch.tensor([-1.0, 0.5, 2.0, float("nan")])
    assert pictures.in_8_bits(x).tolist() == [0, 128, 255, 0]


def test_walks_in_the_latent():
    lit, x = vae(), torch.rand(4, 1, 8, 8)
    path = latents.interpolate(lit, x[:2], x[2:], steps=3).unflatten(0, (2, 3))
    torch.testing.assert_close(path[:, 0], latents.reconstruct(lit, x[:2]))
    torch.testing.assert_close(path[:, -1], latents.reconstruct(lit, x[2:]))
    torch.testing.assert_close(path.flatten(0, 1), lit.network.interpolate(x[:2], x[2:], 3).flatten(0, 1))
    moved = latents.traverse(lit, x, dimensions=9, span=2.0, steps=5)
    assert moved.shape == (15, 1, 8, 8)
    z = latents.encode(lit, x[:1])[0].clone()
    z[0, 1] = -2
    torch.testing.assert_close(moved[5:6], latents.decode(lit, z))
    assert lit.training


def test_a_hierarchy_of_latents_has_all_pictures_and_the_kl_of_each_level(tmp_path):
    torch.manual_seed(0)
    lit = LitAutoencoder(LadderVAE.mlp((1, 8, 8), (16, 12), (4, 3)))
    trainer = train(lit, tmp_path, Pictures(every_n_epochs=2, count=4), LatentCurves())
    found = {path.name for path in (tmp_path / "board" / "pictures" / "epoch_0001").iterdir()}
    assert found == {f"{name}.png" for name in ("reconstructions", "samples", "interpolations", "traversals")}
    metrics = trainer.callback_metrics
    torch.testing.assert_close(metrics["val/kls_0"] + metrics["val/kls_1"], metrics["val/kl"], rtol=1e-4, atol=1e-5)
    assert "val/active_units" not in metrics


def test_walks_in_a_hierarchy_of_latents():
    torch.manual_seed(0)
    lit, x = LitAutoencoder(LadderVAE.mlp((1, 8, 8), (16, 12), (4, 3))), torch.rand(4, 1, 8, 8)
    assert [tuple(z.shape) for z in latents.encode(lit, x)] == [(4, 3), (4, 4)]
    path = latents.interpolate(lit, x[:2], x[2:], steps=3)
    torch.testing.assert_close(path, lit.network.interpolate(x[:2], x[2:], 3).flatten(0, 1))
    top = latents.encode(lit, x[:1])[0].clone()
    top[0, 1] = -2
    torch.testing.assert_close(latents.traverse(lit, x, dimensions=9, span=2.0, steps=5)[5:6], lit.network.decode_mean(top).detach())
    assert latents.sample(lit, 3, seed=0).shape == (3, 1, 8, 8)


def test_what_a_network_does_not_have():
    lit = LitAutoencoder(VQVAE.conv(1, num_codes=8, dim=4, channels=8, hidden=4, blocks=1))
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(TrainingError, match=r"^traverse: VQVAE has a discrete latent, takes an AE or a VAE$"):
        latents.traverse(lit, x, 1, 1.0, 2)
    for network in (lit.network, AE.mlp()):
        with pytest.raises(TrainingError, match=r"^sample: \w+ has no prior to draw from, takes a VAE$"):
            latents.sample(LitAutoencoder(network), 1, seed=0)
    assert latents.encode(lit, x)[0].shape == (2, 2, 2)


@pytest.mark.parametrize("options", [{"every_n_epochs": -1}, {"count": 1}])
def test_options_that_do_not_fit(options):
    with pytest.raises(ValueError, match=r"^every_n_epochs, count: got"):
        Pictures(**options)
