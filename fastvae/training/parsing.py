"""The parser of the command line: errors in one line, with the nearest names for one that does not exist."""

import re
import sys
from typing import Any

from fastvae._extras import extra
from fastvae.models.registry import nearest
from fastvae.training import networks
from fastvae.training.callbacks import AveragedWeights, Pictures
from fastvae.training.datasets import DATA_MODULES
from fastvae.training.module import LitAutoencoder
from fastvae.training.pretraining import PretrainStages

with extra("train"):
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser

# How the parser's messages name what they do not know.
_UNKNOWN_CLASS = re.compile(r'key "(?:\w+\.)?(network|data)".*Given value: .*?(\w+)\W*$')
_YAML_TEXT = '"<unicode string>"'
_UNKNOWN_OPTION = re.compile(r"(?:unrecognized arguments: -*|not accept option '|Option '|[Kk]ey ')([\w.]+)")


class Parser(LightningArgumentParser):
    """A parser whose errors are one line, with the nearest names for one that does not exist."""

    # The configurations that the user gave, which the loader of YAML calls a string.
    configs: tuple[str, ...] = ()

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Ends the program."""
        sys.exit(f"fastvae: {self._explain(' '.join(message.split()))}")

    def _explain(self, message: str) -> str:
        if found := _UNKNOWN_CLASS.search(message):
            known = networks.NETWORKS if found[1] == "network" else DATA_MODULES
            if found[2] not in known:
                return f"{found[1]}: got {found[2]!r}, {nearest(found[2], list(known))}"
        if _YAML_TEXT in message and self.configs:
            return message.replace(_YAML_TEXT, " or ".join(self.configs))
        if found := _UNKNOWN_OPTION.search(message):
            return f"{message}: {nearest(found[1].rpartition('.')[2], option_names())}"
        return message


def option_names() -> list[str]:
    """The last parts of the names of all options, those of every network and data module among them."""
    parser = LightningArgumentParser()
    classes = (
        Trainer,
        LitAutoencoder,
        ModelCheckpoint,
        Pictures,
        AveragedWeights,
        PretrainStages,
        *networks.NETWORKS.values(),
        *DATA_MODULES.values(),
    )
    for number, theclass in enumerate(classes):
        parser.add_class_arguments(theclass, f"class{number}", fail_untyped=False)
    return sorted({key.rpartition(".")[2] for key, _ in parser.get_defaults(skip_validation=True).items()})
