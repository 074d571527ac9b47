"""``fastvae fit | validate | test``: Lightning's command line for our networks and data."""

import re
import sys
from pathlib import Path
from typing import Any

from fastvae._extras import extra
from fastvae.training import checkpoints, latents, networks
from fastvae.training._warnings import ignore_warnings_of_lightning
from fastvae.training.callbacks import LatentCurves, Pictures, Speed
from fastvae.training.data_module import AutoencoderData
from fastvae.training.errors import CheckpointError, TrainingError
from fastvae.training.module import LitAutoencoder, check_entry, labels_of
from fastvae.training.parsing import Parser

with extra("train"):
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.utilities.exceptions import SIGTERMException

# The exit status that a shell gives a process that SIGTERM ended.
TERMINATED = 128 + 15


class CommandLine(LightningCLI):
    """The network has an argument of its own, ``--network``; ``--model`` has the options of its training."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {name: options for name, options in LightningCLI.subcommands().items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        names = ", ".join(networks.NETWORKS)
        parser.add_subclass_arguments(networks.BASES, "network", help=f"One of {names}. Its options: --network.help NAME.")
        parser.set_defaults({"network": "VAE_conv", "data": "MNISTDigits", "trainer.log_every_n_steps": 10, "trainer.max_epochs": 20})
        parser.link_arguments("network", "model.network", apply_on="instantiate")
        for callback, key in ((ModelCheckpoint, "checkpoint"), (Pictures, "pictures"), (LatentCurves, "curves"), (Speed, "speed")):
            parser.add_lightning_class_args(callback, key)
        # A run that ends early, by a signal too, can be resumed from last.ckpt.
        parser.set_defaults({"checkpoint.save_last": True, "checkpoint.save_on_exception": True})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # The parser puts all arguments around the line in which a network or a data module names the one that does not fit.
            found = re.search(r"\w[\w, ]*: got .+", str(error))
            raise TrainingError(found[0] if found else str(error)) from error

    def before_fit(self) -> None:
        """Shows the network a few samples, so that one for data of another shape fails with a message about the shape."""
        batch = self.datamodule.samples("train", 4)
        x, labels = batch["x"], labels_of(batch, self.model.network)
        try:
            latents.reconstruct(self.model, x, *labels)
        except RuntimeError as error:
            shape, data = tuple(x.shape[1:]), type(self.datamodule).__name__
            raise TrainingError(f"network: does not take the samples of {data}, of shape {shape}: {error}") from error

    def before_validate(self) -> None:
        self._take_network_of_checkpoint()

    def before_test(self) -> None:
        self._take_network_of_checkpoint()

    def _take_network_of_checkpoint(self) -> None:
        """Evaluates the network that the checkpoint describes, so that nobody has to repeat its options."""
        path = self.config[str(self.subcommand)].ckpt_path
        if path is None:
            raise CheckpointError(f"ckpt_path: {self.subcommand} takes a checkpoint of fastvae fit")
        entry = check_entry(checkpoints.read(Path(path)))
        if entry["network"] is not None:
            self.model.network = checkpoints.build_network(entry)


def main(arguments: list[str]) -> None:
    """Runs ``fit``, ``validate`` or ``test``."""
    ignore_warnings_of_lightning()
    try:
        CommandLine(
            LitAutoencoder,
            AutoencoderData,
            subclass_mode_data=True,
            parser_class=Parser,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            args=arguments,
        )
    except FileNotFoundError as error:
        raise CheckpointError(str(error)) from error
    except SIGTERMException:
        print("fastvae: ended by SIGTERM; fit --ckpt_path .../last.ckpt goes on", file=sys.stderr)
        sys.exit(TERMINATED)
