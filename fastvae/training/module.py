"""The training of any autoencoder by Lightning."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from fastvae import __version__
from fastvae._extras import extra
from fastvae._types import check_choice
from fastvae.functional._call import expected_gradient
from fastvae.models import registry
from fastvae.models._inputs import in_channels_last
from fastvae.nn import ClassCondition, _processes
from fastvae.nn.optimize import to_channels_last
from fastvae.nn.schedules import ScheduledKL
from fastvae.training.activations import checkpoint_activations
from fastvae.training.adversarial import clip_by_group, parameter_groups, total_loss
from fastvae.training.errors import CheckpointError, TrainingError
from fastvae.training.optimizers import (
    OptimizerName,
    ScheduleName,
    learning_rate_factor,
    leave_unscaling_to_the_scaler,
    make_optimizer,
    make_schedule,
    skip_step_where,
)
from fastvae.training.preprocessing import Preprocessing

with extra("train"):
    from lightning.pytorch import LightningModule

Interval = Literal["step", "epoch"]

# The entry of a checkpoint that says what the weights belong to, and the number of its layout.
ENTRY = "fastvae"
FORMAT = 1


# Each field of a checkpoint's entry has a check of its form, because a file may hold anything.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "network": lambda value: value is None or registry.is_description(value),
    "preprocessing": lambda value: isinstance(value, Mapping) and value.keys() == Preprocessing().describe().keys(),
    "data": lambda value: value is None or isinstance(value, str),
    "data_options": lambda value: isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
    "noise_seed": lambda value: isinstance(value, int),
    "sample_shape": lambda value: value is None or (isinstance(value, list) and all(isinstance(size, int) for size in value)),
}


def data_of(batch: Any) -> Tensor:
    """The data of a batch: a tensor, the first of several, or the entry ``x`` of a mapping."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        if "x" not in batch:
            raise ValueError(f"batch: got a mapping of {', '.join(map(str, batch))}, takes one with x")
        return batch["x"]
    return batch[0]


def labels_of(batch: Any, network: nn.Module) -> tuple[Tensor, ...]:
    """The labels of a batch, the second of several tensors or the entry ``label`` of a mapping, where the network takes them; else nothing.

    Raises:
        TrainingError: where a network that takes labels gets none.
    """
    if not getattr(network, "takes_labels", False):
        return ()
    if isinstance(batch, Mapping) and "label" in batch:
        return (batch["label"],)
    if isinstance(batch, Sequence) and len(batch) > 1:
        return (batch[1],)
    raise TrainingError(f"label: got a batch without one, {type(network).__name__} takes a label for each sample")


def check_labels(network: nn.Module, labels: Tensor | None) -> None:
    """Raises where a network that takes classes cannot take those of a data set, of which a batch may show none."""
    condition = getattr(network, "condition", None)
    if labels is None or len(labels) == 0 or not isinstance(condition, ClassCondition):
        return
    least, most = int(labels.min()), int(labels.max())
    if least < 0 and not getattr(network, "takes_unlabelled", False):
        raise TrainingError(f"labelled: got data with hidden labels, {type(network).__name__} takes a label for each sample")
    if most >= condition.num_classes:
        raise TrainingError(f"num_classes: got {condition.num_classes} for data with the class {most}, takes at least {most + 1}")


def scalars(output: Any) -> dict[str, Tensor]:
    """The fields of a model's output that are numbers, by name; those of several levels are numbered, ``perplexity_0``."""
    found: dict[str, Tensor] = {}
    for name, value in output._asdict().items():
        levels = value if isinstance(value, tuple | list) else ()
        parts = {name: value} | {f"{name}_{i}": part for i, part in enumerate(levels)}
        found |= {key: part.detach() for key, part in parts.items() if isinstance(part, Tensor) and part.ndim == 0}
    return found


def step_seed(*numbers: int) -> int:
    """A seed that depends on all of the numbers, each combination giving another."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class LitAutoencoder(LightningModule):
    """Trains a network whose call gives a named tuple with ``loss``; its fields that are numbers are logged under their names.

    A network with the attribute ``takes_labels = True`` is called with the data and the labels of a batch.

    The noise of a batch is a function of the seed, the process, the epoch and the batch: a training that is resumed from a checkpoint goes
    on with the noise that it would have drawn, and each process draws its own. Every validation draws the same.

    A step with a loss that is NaN or infinite changes no weight and no state of the optimizer, on any process, and is counted in
    ``skipped_steps``. Schedules go on. The host does not wait for the device to find out.

    A network with a part that has a loss of its own, a discriminator, is trained by the contract of :mod:`fastvae.training.adversarial`.

    Several processes count alike, and so do the batches of ``accumulate_grad_batches``: the gradient is the mean of theirs, whatever the
    numbers of samples. The data modules of this package give all processes equally many, by repeating a few. A network with weights that
    the loss does not depend on takes the strategy ``ddp_find_unused_parameters_true``. ``ModelParallelStrategy`` of Lightning shards the
    network by FSDP2, as one unit, with Adam and AdamW; Lightning's ``fsdp`` is for GPUs alone.

    Args:
        network: the autoencoder.
        optimizer: ``"adam"``, ``"adamw"`` or ``"sgd"``.
        learning_rate: at the top of its schedule.
        weight_decay: of all weights: decoupled from the gradient with ``"adamw"``, added to it with the others.
        momentum: of ``"sgd"``.
        schedule: of the learning rate after its warm-up: ``"constant"``, or ``"cosine"`` or ``"linear"`` down to 0 at the last step.
        warmup_steps: optimizer steps in which the learning rate rises from 0.
        advance_kl: when the schedules of KL weight and capacity advance: each optimizer ``"step"``, or each ``"epoch"``.
        compile: compiles the network's forward pass by ``torch.compile``, anew for each shape of a batch. The compiler draws other noise,
            which is as reproducible.
        channels_last: puts images and the weights of convolutions into ``torch.channels_last``; nothing for data that are no images. FSDP
            does not shard such weights.
        gradient_checkpointing: keeps the inputs of the layers of encoder and decoder alone for the backward pass, which computes the rest
            again: less memory, and about a third more time. Losses, gradients, noise and buffers are the same.

    Raises:
        ValueError: for an option that does not exist, or ``gradient_checkpointing`` of a network without encoder and decoder.
    """

    skipped_steps: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerName = "adam",
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        schedule: ScheduleName = "constant",
        warmup_steps: int = 0,
        advance_kl: Interval = "step",
        compile: bool = False,
        channels_last: bool = False,
        gradient_checkpointing: bool = False,
    ):
        super().__init__()
        check_choice("optimizer", optimizer, get_args(OptimizerName))
        check_choice("schedule", schedule, get_args(ScheduleName))
        check_choice("advance_kl", advance_kl, get_args(Interval))
        self.network = network
        self.optimizer, self.learning_rate, self.weight_decay, self.momentum = optimizer, learning_rate, weight_decay, momentum
        self.schedule, self.warmup_steps, self.advance_kl = schedule, warmup_steps, advance_kl
        self.channels_last = channels_last
        if channels_last:
            to_channels_last(network)
        if gradient_checkpointing:
            checkpoint_activations(network)
        if compile:
            network.compile(dynamic=False)
        self.preprocessing = Preprocessing()
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))
        # A checkpoint says what the network has been trained on.
        self.sample_shape: list[int] | None = None
        self.data_name: str | None = None
        self.data_options: dict[str, Any] = {}
        self._noise_seed = torch.initial_seed()
        # Whether a batch since the last optimizer step had a loss that is not finite; no buffer, because those of the first process
        # replace the others' in each forward pass of DistributedDataParallel.
        self._non_finite: Tensor | None = None

    def setup(self, stage: str) -> None:
        # A walk over all modules at each step would take as long as the loss of a small network.
        self._kl_schedules = [module for module in self.network.modules() if isinstance(module, ScheduledKL)]
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data is not None:
            self.data_name, self.data_options = type(data).__name__, dict(data.hparams)
            check_labels(self.network, getattr(getattr(data, "source", None), "labels", None))
        make = getattr(data, "make_preprocessing", None)
        if make is not None and stage == "fit":
            self.preprocessing = make().to(self.device)

    def configure_optimizers(self) -> Any:
        if self.device_mesh is not None and self.optimizer == "sgd":
            # torch has no rule for its fused kernel on sharded weights.
            raise TrainingError("optimizer: got 'sgd' for a network that is sharded, takes 'adam' or 'adamw'")
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, "momentum": self.momentum}
        optimizer = make_optimizer(self.optimizer, parameter_groups(self.network), **rates)
        if self.trainer.gradient_clip_val:
            leave_unscaling_to_the_scaler(optimizer)
        total = self.trainer.estimated_stepping_batches if self.schedule != "constant" else float("inf")
        scheduler = make_schedule(optimizer, learning_rate_factor(self.schedule, self.warmup_steps, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if gradient_clip_val and len(optimizer.param_groups) > 1:
            clip_by_group(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: Tensor, *labels: Tensor) -> Any:
        x = self.preprocessing(x)
        return self.network(in_channels_last(x) if self.channels_last else x, *labels)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._seed_noise(0, self.trainer.current_epoch, batch_idx)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_noise(1, batch_idx)

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._seed_noise(2, batch_idx)

    def _seed_noise(self, *position: int) -> None:
        seed = step_seed(self._noise_seed, self.global_rank, *position)
        # torch.manual_seed visits the generators of every kind of device, which takes as long as a small network's forward pass.
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with expected_gradient(self._loss_factor()):
            loss = total_loss(self._step("train", batch))
        finite = torch.isfinite(loss.detach())
        self._non_finite = ~finite if self._non_finite is None else self._non_finite | ~finite
        if self._is_logged("train"):
            self.log("skipped_steps", self.skipped_steps.float(), on_step=True, on_epoch=False)
        # A loss that overflowed may have a finite gradient. A GradScaler looks at the gradients alone, so they all become NaN.
        return loss * torch.where(finite, 1.0, float("nan")).to(loss.dtype)

    def _loss_factor(self) -> float:
        """What Lightning multiplies the loss with before the backward pass, where the host knows it."""
        has_loss_scale = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        return 1.0 if has_loss_scale else 1 / self.trainer.accumulate_grad_batches

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._step("val", batch)._asdict()

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        return self._step("test", batch)._asdict()

    def _step(self, stage: str, batch: Any) -> Any:
        """The network's output for a batch; its numbers are logged."""
        x = data_of(batch)
        self.sample_shape = list(x.shape[1:])
        output = self(x, *labels_of(batch, self.network))
        training = stage == "train"
        for name, value in scalars(output).items() if self._is_logged(stage) else ():
            options: dict[str, Any] = {"on_step": training, "on_epoch": not training, "sync_dist": not training, "batch_size": len(x)}
            self.log(f"{stage}/{name}", value, prog_bar=name == "loss", **options)
        return output

    def _is_logged(self, stage: str) -> bool:
        """Whether anybody reads the figures of this batch: Lightning takes long to store them, and a logger reads some steps' alone."""
        trainer: Any = self.trainer
        return stage != "train" or (trainer.global_step + 1) % max(trainer.log_every_n_steps, 1) == 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        flag = cast("Tensor", self._non_finite).float()
        # A process whose own loss is finite has the gradients of the others in its own.
        _processes.all_reduce(flag)
        skipped = flag > 0
        self.skipped_steps += skipped
        skip_step_where(optimizer, skipped)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self._non_finite = None
        if self.advance_kl == "step":
            self._advance_kl_schedules()

    def on_train_epoch_end(self) -> None:
        if self.advance_kl == "epoch":
            self._advance_kl_schedules()

    def _advance_kl_schedules(self) -> None:
        for schedules in self._kl_schedules:
            schedules.step()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        try:
            description = registry.describe(self.network)
        except ValueError:
            # A network of one's own modules can be trained and resumed. Only its program can make it again.
            description = None
        checkpoint[ENTRY] = {
            "format": FORMAT,
            "version": __version__,
            "network": description,
            "preprocessing": self.preprocessing.describe(),
            "data": self.data_name,
            "data_options": self.data_options,
            "sample_shape": self.sample_shape,
            "noise_seed": self._noise_seed,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        entry = check_entry(checkpoint)
        ours = getattr(self.network, "recipe", None)
        stored = entry["network"]
        if stored is not None and ours is not None and stored["network"] != ours.name:
            raise CheckpointError(f"checkpoint: holds the weights of {stored['network']}, this training is of {ours.name}")
        self._check_shapes(checkpoint["state_dict"], stored)
        self.preprocessing = Preprocessing(**entry["preprocessing"]).to(self.device)
        self._noise_seed = entry["noise_seed"]

    def _check_shapes(self, state: dict[str, Tensor], stored: dict[str, Any] | None) -> None:
        for name, tensor in self.network.state_dict(prefix="network.").items():
            if name in state and state[name].shape != tensor.shape:
                raise CheckpointError(
                    f"checkpoint: {name} has shape {tuple(state[name].shape)}, this network takes {tuple(tensor.shape)}; "
                    f"the checkpoint is of {stored or 'a network of modules of its own'}"
                )


def check_entry(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's entry about its model.

    Raises:
        CheckpointError: for one of another program, or of another layout.
    """
    entry = checkpoint.get(ENTRY)
    if not isinstance(entry, Mapping) or "format" not in entry:
        raise CheckpointError("checkpoint: has no entry of fastvae, takes one that LitAutoencoder wrote")
    if entry["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint: got format {entry['format']}, which fastvae {entry.get('version')} wrote; "
            f"this is fastvae {__version__}, which takes format {FORMAT}"
        )
    for name, fits in _FIELDS.items():
        if name not in entry or not fits(entry[name]):
            raise CheckpointError(f"checkpoint: its entry of fastvae has the {name} {entry.get(name)!r}, which no training writes")
    return dict(entry)
