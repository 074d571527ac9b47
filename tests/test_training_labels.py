"""Labels in a training: who is given them, how most are hidden, and the pictures and samples at chosen classes."""

import numpy as np
import pytest
import torch

for package in ("lightning", "jsonargparse", "sklearn", "PIL"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from _training import quiet_trainer  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.models import CVAE, VAE, SemiSupervisedVAE  # noqa: E402
from fastvae.training import latents  # noqa: E402
from fastvae.training.callbacks import draw_pictures  # noqa: E402
from fastvae.training.datasets import Arrays, SklearnDigits  # noqa: E402
from fastvae.training.errors import DataError, TrainingError  # noqa: E402
from fastvae.training.module import LitAutoencoder, labels_of  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


def tiny(model=CVAE, **options) -> LitAutoencoder:
    torch.manual_seed(0)
    return LitAutoencoder(model.mlp((1, 8, 8), (16,), 3, **options))


def test_labels_are_for_networks_that_take_them():
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    conditional = tiny().network
    for batch in ([x, y], (x, y), {"x": x, "label": y}):
        assert labels_of(batch, conditional) == (y,)
        assert labels_of(batch, VAE.mlp(3)) == ()
    for batch in (x, [x], {"x": x}):
        assert labels_of(batch, VAE.mlp(3)) == ()
        with pytest.raises(TrainingError, match=r"^label: got a batch without one, CVAE takes a label for each sample"):
            labels_of(batch, conditional)


def test_classes_that_a_network_does_not_have_are_named_before_the_training(tmp_path):
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path)
    with pytest.raises(TrainingError, match=r"^labelled: got data with hidden labels, CVAE takes a label for each sample$"):
        trainer.fit(tiny(), SklearnDigits(labelled=100))
    for model in (CVAE, SemiSupervisedVAE):
        with pytest.raises(TrainingError, match=r"^num_classes: got 7 for data with the class 9, takes at least 10$"):
            trainer.fit(tiny(model, num_classes=7), SklearnDigits())


@pytest.mark.parametrize("model", [CVAE, SemiSupervisedVAE])
def test_a_conditional_network_trains_on_the_batches_of_a_data_module(model, tmp_path):
    data = SklearnDigits(batch_size=512, labelled=None if model is CVAE else 100)
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.fit(tiny(model), data)
    assert trainer.global_step == 3
    assert trainer.callback_metrics["val/loss"].isfinite()
    assert ("val/accuracy" in trainer.callback_metrics) == (model is SemiSupervisedVAE)


def test_a_loader_of_one_s_own_gives_pairs(tmp_path):
    pairs = TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8))
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.fit(tiny(), DataLoader(pairs, 4))
    assert trainer.global_step == 2
    with pytest.raises(TrainingError, match=r"^label: got a batch without one"):
        quiet_trainer(max_epochs=1, enable_checkpointing=False).fit(tiny(), DataLoader(TensorDataset(pairs.tensors[0]), 4))


def test_all_labels_but_some_of_each_class_are_hidden():
    data = SklearnDigits(labelled=50)
    train = data.samples("train")["label"]
    shown = train[train >= 0]
    assert len(shown) == 50
    assert (shown.bincount() == 5).all()
    assert (data.samples("val")["label"] >= 0).all()
    assert (data.samples("test")["label"] >= 0).all()
    everything, again, other = SklearnDigits(), SklearnDigits(labelled=50), SklearnDigits(labelled=50, seed=1)
    assert torch.equal(everything.samples("train")["label"][:50], shown)
    for module in (again, other):
        module.setup()
    assert torch.equal(again.source.labels, data.source.labels)
    assert not torch.equal(other.source.labels, data.source.labels)
    assert data.hparams["labelled"] == 50


def test_labels_that_cannot_be_hidden():
    with pytest.raises(ValueError, match=r"^labelled: got -1, takes an integer >= 0"):
        SklearnDigits(labelled=-1)
    with pytest.raises(DataError, match=r"^labelled: got 5000, but the data of SklearnDigits have 1258 samples for training"):
        SklearnDigits(labelled=5000).setup()


def test_data_without_labels_have_none_to_hide(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((20, 3), np.float32))
    with pytest.raises(DataError, match=r"^labelled: got 5, but the data of Arrays have no labels"):
        Arrays(tmp_path / "x.npy", labelled=5).setup()


def test_pictures_have_a_row_for_each_class():
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([1, -1, 2, 0])
    for model in (CVAE, SemiSupervisedVAE):
        labels = y.clamp_min(0) if model is CVAE else y
        drawn = draw_pictures(tiny(model), x, labels)
        assert drawn.keys() == {"reconstructions", "samples", "interpolations", "traversals"}
        assert drawn["samples"].shape == (1, 10 * 12, 4 * 12)


def test_a_point_between_two_samples_has_the_class_of_the_nearer_one():
    lit, x, y = tiny(), torch.rand(4, 1, 8, 8), torch.tensor([1, 5, 2, 0])
    path = latents.interpolate(lit, x, x.flip(0), 6, (y,), (y.flip(0),)).unflatten(0, (4, 6))
    torch.testing.assert_close(path[:, 0], lit.network.reconstruct(x, y))
    torch.testing.assert_close(path[:, -1], lit.network.reconstruct(x.flip(0), y.flip(0)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conditional")
    trainer = quiet_trainer(max_steps=1, default_root_dir=folder)
    trainer.fit(tiny(), SklearnDigits(batch_size=512))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ([], (8, 10)),
        (["--labels", "0", "1", "2"], (8, 3)),
        (["--labels", "7", "--columns=4"], (4, 1)),
        (["--labels=[3, 4]", "--count=40"], (8, 5)),
    ],
    ids=str,
)
def test_samples_at_chosen_classes(checkpoint, tmp_path, options, size):
    command_line.main(["sample", str(checkpoint), "--out", str(tmp_path), *options])
    with Image.open(tmp_path / "samples.png") as image:
        assert image.size == (12 * size[0], 12 * size[1])


@pytest.mark.parametrize("command", ["reconstruct", "interpolate", "traverse", "encode"])
def test_commands_take_the_labels_of_the_data(checkpoint, tmp_path, command):
    command_line.main([command, str(checkpoint), "--out", str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 1


def test_classes_that_are_not_there():
    with pytest.raises(TrainingError, match=r"^labels: got \[10\], takes classes from 0 to 9"):
        latents.rows_of_classes(tiny().network, 2, [10])
    with pytest.raises(TrainingError, match=r"^labels: got \[1\] for VAE, takes a network with classes"):
        latents.rows_of_classes(VAE.mlp(3), 2, [1])
