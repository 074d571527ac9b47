"""The trainings of the demonstration: Lightning trains each model, and a few steps compare its loss lines with plain torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._extras import extra
from fastvae.models import VAE
from fastvae.training import latents
from fastvae.training.comparison import Contender, compare, draw_noise, relative_differences
from fastvae.training.data_module import AutoencoderData
from fastvae.training.module import LitAutoencoder

with extra("train"):
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, TQDMProgressBar


class LossHistory(Callback):
    """The loss of each training step, and of the validation part by the number of steps before it, in nats per sample."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []
        self.validations: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(outputs["loss"])

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.validations[trainer.global_step] = trainer.callback_metrics["val/loss"].item()


class EpochBar(TQDMProgressBar):
    """A bar of each epoch's training steps, without one of each validation, which would flicker below it."""

    def init_validation_tqdm(self) -> Any:
        return Tqdm(disable=True)


@dataclass
class Experiment:
    """A model, how it is trained, and what came of it."""

    name: str
    model: VAE
    epochs: int
    compared_steps: int
    lit: LitAutoencoder = field(init=False)
    history: LossHistory = field(default_factory=LossHistory)
    contenders: dict[str, Contender] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lit = LitAutoencoder(self.model)

    @property
    def latent_dim(self) -> int:
        return cast("Sequence[int]", self.model.latent_shape)[0]

    def differences(self) -> list[float]:
        """Relative difference of the two contenders' losses in each of the compared steps."""
        return relative_differences(self.contenders)


def run(experiment: Experiment, data: AutoencoderData, seed: int, train_batches: int | None = None) -> None:
    """Compares the loss lines on the first batches, then trains the model from the same weights.

    Args:
        experiment: what to run; its results are stored in it.
        data: a data module of 8-bit images.
        seed: of the comparison's noise.
        train_batches: batches an epoch; all by default.
    """
    if experiment.compared_steps:
        x = data.samples("train", experiment.compared_steps * data.batch_size)["x"]
        experiment.contenders = compare(experiment.model, x.split(data.batch_size), seed)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=experiment.epochs,
        limit_train_batches=train_batches,
        callbacks=[experiment.history, EpochBar(refresh_rate=7)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(experiment.lit, datamodule=data)


def evaluate(experiment: Experiment, x: Tensor, seed: int) -> dict[str, float]:
    """The terms of the bound in nats per sample, with one sampled z an image, and the squared error per pixel, for 8-bit images."""
    with latents.looking(experiment.lit) as network:
        output = network(x, eps=draw_noise(network, len(x), torch.Generator().manual_seed(seed)))
        from_sampled_z = network.decode_mean(output.z)
    images = x / 255
    return {
        "elbo": -output.loss.item(),
        "recon_loss": output.recon_loss.item(),
        "kl": output.kl.item(),
        "mse_per_pixel_mean_z": F.mse_loss(latents.reconstruct(experiment.lit, x), images).item(),
        "mse_per_pixel_sampled_z": F.mse_loss(from_sampled_z, images).item(),
    }
