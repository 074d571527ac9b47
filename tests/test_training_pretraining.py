"""Stages of a StackedAE that are trained one after the other before the whole."""

import logging

import pytest
import torch

for package in ("lightning", "jsonargparse", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install fastvae-kernels[train]")

from _training import quiet_trainer  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import fastvae.__main__ as command_line  # noqa: E402
from fastvae.models import AE, StackedAE  # noqa: E402
from fastvae.training import checkpoints  # noqa: E402
from fastvae.training.datasets import SklearnDigits  # noqa: E402
from fastvae.training.errors import TrainingError  # noqa: E402
from fastvae.training.module import LitAutoencoder  # noqa: E402
from fastvae.training.pretraining import PretrainStages  # noqa: E402

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


class NoSteps(Callback):
    """Takes the gradients away, so that a step changes nothing."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for parameter in pl_module.parameters():
            parameter.grad.zero_()


def make(kind: type[AE] = StackedAE) -> LitAutoencoder:
    torch.manual_seed(0)
    return LitAutoencoder(kind.mlp((1, 8, 8), (16,), 4), learning_rate=0.01)


def data() -> SklearnDigits:
    return SklearnDigits(batch_size=512)


def test_the_training_begins_with_stages_that_are_trained(tmp_path):
    """The steps of the whole change nothing here; a resumed training does not pretrain again."""
    expected = make().network
    ready = data()
    ready.setup()
    expected.pretrain([batch["x"] for batch in ready.train_dataloader()], 3, lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    lit = make()
    keep = ModelCheckpoint(tmp_path, filename="kept", every_n_train_steps=1)
    options = {"max_steps": 1, "limit_val_batches": 0}
    begun = quiet_trainer(callbacks=[PretrainStages(3), NoSteps(), keep], **options)
    begun.fit(lit, data())
    for ours, wanted in zip(lit.network.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted)
    resumed = make()
    again = quiet_trainer(callbacks=[PretrainStages(3), NoSteps()], enable_checkpointing=False, **{**options, "max_steps": 2})
    again.fit(resumed, data(), ckpt_path=tmp_path / "kept.ckpt")
    assert all(map(torch.equal, resumed.network.parameters(), lit.network.parameters()))


def test_what_cannot_be_pretrained_is_an_error():
    with pytest.raises(TrainingError, match=r"^callbacks: got PretrainStages for AE, takes a StackedAE$"):
        quiet_trainer(callbacks=[PretrainStages(1)], enable_checkpointing=False).fit(make(AE), data())
    loader = DataLoader(torch.rand(4, 1, 8, 8))
    with pytest.raises(TrainingError, match=r"^callbacks: got PretrainStages with NoneType for data, takes"):
        quiet_trainer(callbacks=[PretrainStages(1)], enable_checkpointing=False).fit(make(), loader)
    with pytest.raises(ValueError, match=r"^epochs: got 0, takes"):
        PretrainStages(0)


def test_the_command_line_pretrains(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    network = ["--network=StackedAE_mlp", "--network.data_shape=[1,8,8]", "--network.hidden=[16]", "--network.latent_dim=4"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.max_steps=1", "--checkpoint.dirpath=kept"]
    stages = ["--trainer.callbacks=PretrainStages", "--trainer.callbacks.epochs=2"]
    # Other tests have set the level of Lightning's own logger.
    with caplog.at_level(logging.INFO), caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        command_line.main(["fit", *network, "--data=SklearnDigits", *quiet, *stages])
    assert "Stage 1: mean loss" in caplog.text
    assert isinstance(checkpoints.load(tmp_path / "kept/last.ckpt").network, StackedAE)
