"""Pictures, curves, speed and averaged weights of a training."""

import resource
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import functional as FV
from fastvae._extras import extra
from fastvae.distributions import DiagonalPosterior, StandardPrior
from fastvae.nn import _processes
from fastvae.training import latents, pictures
from fastvae.training.errors import TrainingError
from fastvae.training.module import LitAutoencoder, data_of, labels_of

with extra("train"):
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import EMAWeightAveraging
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

# More curves than this of single latent dimensions cannot be told apart.
MAX_CURVES = 32
# A latent dimension is active where its mean has a larger variance over the data (Burda et al., Importance Weighted Autoencoders, 2016).
ACTIVE_VARIANCE = 0.01


class Pictures(Callback):
    """PNG files of reconstructions, samples, interpolations and traversals, which TensorBoard shows too.

    They show the averaged weights where :class:`AveragedWeights` keeps them. They are made of the first validation batch, or the first
    training batch where there is no validation, and lie in ``pictures`` of the run's folder, a folder for each epoch. What a network does
    not have, such as samples of a plain autoencoder, is left out. One process draws them, so there are none of a network that is sharded
    over several.

    Args:
        every_n_epochs: epochs from one set of pictures to the next; 0 for none.
        count: images of a picture's row.
    """

    def __init__(self, every_n_epochs: int = 1, count: int = 8):
        if every_n_epochs < 0 or count < 2:
            raise ValueError(f"every_n_epochs, count: got {every_n_epochs}, {count}, takes integers >= 0 and >= 2")
        self.every_n_epochs, self.count = every_n_epochs, count
        self._x: Tensor | None = None
        self._labels: tuple[Tensor, ...] = ()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if batch_idx == 0:
            self._keep(batch, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._x is None:
            self._keep(batch, pl_module)

    def _keep(self, batch: Any, lit: LitAutoencoder) -> None:
        self._x = data_of(batch)[: self.count]
        self._labels = tuple(labels[: self.count] for labels in labels_of(batch, lit.network))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
        if sharded or not self.every_n_epochs or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        # The first process tells the others its folder, so all of them ask.
        run = Path(trainer.log_dir or trainer.default_root_dir)
        if not trainer.is_global_zero or self._x is None or not pictures.are_images(self._x):
            return
        folder = run / "pictures" / f"epoch_{trainer.current_epoch:04d}"
        with ExitStack() as averaged:
            for callback in (callback for callback in trainer.callbacks if isinstance(callback, AveragedWeights)):  # type: ignore[attr-defined]
                averaged.enter_context(callback.in_use(trainer, pl_module))
            drawn = draw_pictures(pl_module, self._x, *self._labels)
        for name, picture in drawn.items():
            pictures.save_png(picture, folder / f"{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(name, picture, trainer.global_step)


def draw_pictures(lit: LitAutoencoder, x: Tensor, *labels: Tensor) -> dict[str, Tensor]:
    """The pictures that a network has, by name."""
    count = len(x)
    drawn = {"reconstructions": pictures.pairs(x, latents.reconstruct(lit, x, *labels), count)}
    if latents.can_sample(lit.network):
        # A row for each class, or for each sample's condition.
        rows = latents.rows_of_classes(lit.network, count) or tuple(label.repeat_interleave(count, dim=0) for label in labels)
        drawn["samples"] = pictures.grid(latents.sample(lit, len(rows[0]) if rows else count * count, 0, *rows), count)
    if latents.is_continuous(lit.network):
        flipped = tuple(label.flip(0) for label in labels)
        drawn["interpolations"] = pictures.grid(latents.interpolate(lit, x, x.flip(0), count, labels, flipped), count)
        drawn["traversals"] = pictures.grid(latents.traverse(lit, x, count, 3.0, count, *labels), count)
    return drawn


class LatentCurves(Callback):
    """Curves of a VAE's validation: ``val/active_units``, and the KL of each latent dimension, ``val/kl_dim_0``, where they are few.

    None of a hierarchy of latents, whose priors move with the levels above: neither the variance of a mean nor the KL to N(0, I) says there
    whether a dimension is used. The training logs the KL of each level, ``val/kls_0`` that of the top. There is no KL of a dimension either
    where the prior is not N(0, I) or the posterior no diagonal normal distribution.
    """

    def __init__(self) -> None:
        self._sums: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._sums = []

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        if not isinstance(outputs, dict) or not all(isinstance(outputs.get(name), Tensor) for name in ("mu", "logvar")):
            return
        mu, logvar = outputs["mu"].flatten(1), outputs["logvar"].flatten(1)
        kl = FV.kl_normal(mu, logvar, reduction="none").float()
        mu = mu.float()
        sums = [torch.full_like(mu[0], len(mu)), mu.sum(0), (mu * mu).sum(0), kl.sum(0)]
        self._sums = sums if not self._sums else [a + b for a, b in zip(self._sums, sums, strict=True)]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not self._sums or trainer.sanity_checking:
            return
        _processes.all_reduce(*self._sums)
        count, mean, square, kl = self._sums[0], *(total / self._sums[0] for total in self._sums[1:])
        variance = (square - mean * mean) * count / (count - 1).clamp(min=1)
        pl_module.log("val/active_units", (variance > ACTIVE_VARIANCE).float().sum())
        if len(kl) <= MAX_CURVES and _is_standard(pl_module.network):
            pl_module.log_dict({f"val/kl_dim_{i}": value for i, value in enumerate(kl)})


def _is_standard(network: Any) -> bool:
    """Whether the KL of a network is the sum of those of its dimensions to N(0, 1)."""
    prior, posterior = getattr(network, "prior", None), getattr(network, "posterior", None)
    return isinstance(prior, StandardPrior | None) and isinstance(posterior, DiagonalPosterior | None)


class Speed(Callback):
    """Logs ``images_per_second`` of all processes together, and ``peak_memory_mib``: of the GPU's allocator, or of the process on a CPU.

    Both are read at the intervals of the logger, when its figures are waited for anyway.
    """

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._images, self._started = 0, time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._restart()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(data_of(batch)) * trainer.world_size
        if (batch_idx + 1) % trainer.log_every_n_steps:
            return
        rate = self._images / (time.perf_counter() - self._started)
        pl_module.log_dict({"images_per_second": rate, "peak_memory_mib": peak_memory_mib(pl_module.device)})
        self._restart()


class AveragedWeights(EMAWeightAveraging):
    """Keeps an exponential moving average of the weights, for validation, for checkpoints, and for the network when the training ends.

    A checkpoint holds the average in ``state_dict``, where ``fastvae validate``, ``test`` and the commands after a training find it, and
    the weights of the last step beside it, from which a training resumes. Buffers are those of the last step: counts of steps cannot be
    averaged, codebooks and running statistics are averages already.

    Args:
        decay: share of the old average in the new one, in [0, 1).
        every_n_steps: optimizer steps from one update to the next.

    Raises:
        ValueError: for an argument out of its range.
        TrainingError: where a strategy shards the weights.
    """

    def __init__(self, decay: float = 0.999, every_n_steps: int = 1):
        if not 0 <= decay < 1 or every_n_steps < 1:
            raise ValueError(f"decay, every_n_steps: got {decay}, {every_n_steps}, takes a number in [0, 1) and an integer >= 1")
        super().__init__(use_buffers=False, decay=decay, update_every_n_steps=every_n_steps)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise TrainingError(
                f"callbacks: got AveragedWeights with {type(trainer.strategy).__name__}, takes a strategy with whole weights"
            )
        # The average is a copy of the module, so it is made where the module will train and once the module has all of its buffers: those
        # of the preprocessing come with the data.
        pl_module.to(trainer.strategy.root_device)
        pl_module.setup(stage)
        with warnings.catch_warnings():
            # Lightning warns of every module that can be sharded.
            warnings.filterwarnings("ignore", message=".*a model that overrides the configure_model")
            super().setup(trainer, pl_module, stage)

    @contextmanager
    def in_use(self, trainer: Trainer, pl_module: Any) -> Iterator[None]:
        """The network with the averaged weights, which is what a validation sees."""
        self.on_validation_epoch_start(trainer, pl_module)
        try:
            yield
        finally:
            self.on_validation_epoch_end(trainer, pl_module)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that was in use at once, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
