"""``fastvae fit | validate | test``: Lightning's command line for our networks and data."""

import re
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, cast

from fastvae._extras import extra
from fastvae.training import checkpoints, latents, networks
from fastvae.training._warnings import ignore_warnings_of_lightning, keep_lightning_quiet
from fastvae.training.callbacks import LatentCurves, Pictures, Speed
from fastvae.training.checkpoint_io import AtomicCheckpointIO
from fastvae.training.data_module import AutoencoderData
from fastvae.training.datasets import DATA_MODULES
from fastvae.training.errors import CheckpointError, TrainingError
from fastvae.training.evaluation import Evaluation
from fastvae.training.module import LitAutoencoder, check_entry, labels_of
from fastvae.training.parsing import Parser

with extra("train"):
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.utilities.exceptions import SIGTERMException

# The exit status that a shell gives a process that SIGTERM ended.
TERMINATED = 128 + 15


class CommandLine(LightningCLI):
    """The network has an argument of its own, ``--network``; ``--model`` has the options of its training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: options for name, options in LightningCLI.subcommands().items() if name != "predict"}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True, required=False)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.set_defaults({"data": "MNISTDigits"})
        if subcommand == "test":
            parser.add_lightning_class_args(Evaluation, "evaluation")
            parser.set_defaults({"verbose": False})
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        names = ", ".join(networks.NETWORKS)
        parser.add_subclass_arguments(networks.BASES, "network", help=f"One of {names}. Its options: --network.help NAME.")
        parser.set_defaults({"network": "VAE_conv", "trainer.log_every_n_steps": 10, "trainer.max_epochs": 20})
        parser.link_arguments("network", "model.network", apply_on="instantiate")
        for callback, key in ((ModelCheckpoint, "checkpoint"), (Pictures, "pictures"), (LatentCurves, "curves"), (Speed, "speed")):
            parser.add_lightning_class_args(callback, key)
        # A run that ends early, by a signal too, can be resumed from last.ckpt.
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_on_exception": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        if args[0] != "fit":
            self._default_to_data_of_checkpoint(args)
        for each in (parser, *self._subcommand_parsers.values()):
            cast("Parser", each).configs = _configs_of(args)
        self.config = parser.parse_args(args)

    def _default_to_data_of_checkpoint(self, args: list[str]) -> None:
        """Makes the data of the checkpoint's training the default, whose options can be given one by one."""
        peeking = ArgumentParser(add_help=False, allow_abbrev=False)
        peeking.add_argument("--ckpt_path", type=Path)
        path = peeking.parse_known_args(args)[0].ckpt_path
        if path is None:
            return
        entry = check_entry(checkpoints.read(path))
        if entry["data"] in DATA_MODULES:
            data = {"class_path": entry["data"], "init_args": entry["data_options"]}
            self._subcommand_parsers[args[0]].set_defaults({"data": data})

    def _parse_ckpt_path(self) -> None:
        """Takes no options from the checkpoint: Lightning would read it for them, and fail with a traceback where it is none."""

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # The parser puts all arguments around the line in which a network or a data module names the one that does not fit.
            found = re.search(r"\w[\w, ]*: got .+", str(error))
            raise TrainingError(found[0] if found else str(error)) from error

    def after_instantiate_classes(self) -> None:
        strategy = self.trainer.strategy
        # Sharded strategies write their checkpoints themselves.
        if not isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
            strategy.checkpoint_io = AtomicCheckpointIO()

    def before_fit(self) -> None:
        """Reads the checkpoint, and shows the network a few samples: what does not fit is named before the training starts."""
        self._check_data()
        path = self._get(self.config, "ckpt_path")
        if path is not None and Path(path).is_file():
            check_entry(checkpoints.read(Path(path)))
        batch = self.datamodule.samples("train", 4)
        x, labels = batch["x"], labels_of(batch, self.model.network)
        try:
            latents.reconstruct(self.model, x, *labels)
        except (RuntimeError, IndexError, ValueError) as error:
            shape, data = tuple(x.shape[1:]), type(self.datamodule).__name__
            raise TrainingError(f"network: does not take the samples of {data}, of shape {shape}: {error}") from error

    def before_validate(self) -> None:
        self._take_network_of_checkpoint()

    def before_test(self) -> None:
        self._take_network_of_checkpoint()

    def _check_data(self) -> None:
        if self.datamodule is None:
            raise TrainingError(f"data: got none, takes one of {', '.join(DATA_MODULES)}")

    def _take_network_of_checkpoint(self) -> None:
        """Evaluates the network that the checkpoint describes, so that nobody has to repeat its options."""
        path = self._get(self.config, "ckpt_path")
        if path is None:
            raise CheckpointError(f"ckpt_path: {self.subcommand} takes a checkpoint of fastvae fit")
        entry = check_entry(checkpoints.read(Path(path)))
        if entry["network"] is not None:
            self.model.network = checkpoints.build_network(entry)
        self._check_data()
        self.model.sample_shape, self.model.data_name = entry["sample_shape"], entry["data"]
        checkpoints.check_shape(self.model, self.datamodule, self.datamodule.samples("train", 4)["x"])


def _configs_of(args: list[str]) -> tuple[str, ...]:
    peeking = ArgumentParser(add_help=False, allow_abbrev=False)
    peeking.add_argument("--config", action="append", default=[])
    return tuple(peeking.parse_known_args(args)[0].config)


def main(arguments: list[str]) -> None:
    """Runs ``fit``, ``validate`` or ``test``; the checkpoint of the latter may stand by itself, as with the commands after a training."""
    if arguments[0] != "fit" and arguments[1:] and not arguments[1].startswith("-"):
        arguments = [arguments[0], "--ckpt_path", *arguments[1:]]
    ignore_warnings_of_lightning()
    if arguments[0] != "fit":
        keep_lightning_quiet()
    try:
        CommandLine(
            LitAutoencoder,
            AutoencoderData,
            subclass_mode_data=True,
            parser_class=Parser,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            # The options of an evaluation are of no use later, and without a logger they would lie in the working folder.
            save_config_callback=SaveConfigCallback if arguments[0] == "fit" else None,
            save_config_kwargs={"overwrite": True},
            args=arguments,
        )
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    except SIGTERMException:
        print("fastvae: ended by SIGTERM; fit --ckpt_path .../last.ckpt goes on", file=sys.stderr)
        sys.exit(TERMINATED)
