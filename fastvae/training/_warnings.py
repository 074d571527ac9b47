"""Warnings and messages of Lightning that tell a user of this package nothing."""

import logging
import warnings


def ignore_warnings_of_lightning() -> None:
    """Ignores them from now on, in the whole process: for commands, not for a library's functions."""
    # Worker processes are slower than none for data in memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A deprecation that Lightning's own calls meet.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def keep_lightning_quiet() -> None:
    """From now on it says no more than its warnings: an evaluation prints its figures, not what machine it is on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # An evaluation keeps no checkpoints, so it does not matter that it has another folder than the training.
    warnings.filterwarnings("ignore", message=".*dirpath has changed.*")
