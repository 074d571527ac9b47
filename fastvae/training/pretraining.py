"""Training the stages of a StackedAE one after the other, before the training of the whole, which is then the fine-tuning."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from fastvae._extras import extra
from fastvae.models import StackedAE
from fastvae.training.data_module import AutoencoderData
from fastvae.training.errors import TrainingError
from fastvae.training.module import LitAutoencoder, data_of
from fastvae.training.optimizers import make_optimizer

with extra("train"):
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.utilities import rank_zero_info


class PretrainStages(Callback):
    """Runs :meth:`fastvae.models.StackedAE.pretrain` on the training part before the first epoch, with the optimizer of the training.

    A training that a checkpoint resumes has its stages trained. One process trains them: what several learn would have to be averaged.

    Args:
        epochs: passes over the training part for each stage.

    Raises:
        ValueError: for less than one epoch.
        TrainingError: for another network, for data without a data module of this package, and in several processes.
    """

    def __init__(self, epochs: int = 10):
        if epochs < 1:
            raise ValueError(f"epochs: got {epochs}, takes an integer >= 1")
        self.epochs = epochs

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.ckpt_path is not None:
            return
        network, data = pl_module.network, trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(network, StackedAE):
            raise TrainingError(f"callbacks: got PretrainStages for {type(network).__name__}, takes a StackedAE")
        if not isinstance(data, AutoencoderData):
            raise TrainingError(f"callbacks: got PretrainStages with {type(data).__name__} for data, takes a data module of fastvae")
        if trainer.world_size > 1:
            raise TrainingError(f"callbacks: got PretrainStages in {trainer.world_size} processes, takes one; the others can go on with it")
        rates = {"learning_rate": pl_module.learning_rate, "weight_decay": pl_module.weight_decay, "momentum": pl_module.momentum}
        optimizer = partial(make_optimizer, pl_module.optimizer, **rates)
        for level, losses in enumerate(network.pretrain(_TrainingBatches(pl_module, data), self.epochs, optimizer)):
            rank_zero_info(f"Stage {level}: mean loss {losses[0]:.4g} in the first of {self.epochs} epochs, {losses[-1]:.4g} in the last")


class _TrainingBatches:
    """The training part as the network sees it, once for each iteration."""

    def __init__(self, lit: LitAutoencoder, data: AutoencoderData):
        self.lit, self.loader = lit, data.train_dataloader()

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield self.lit.preprocessing(data_of(batch).to(self.lit.device))
