"""Warnings of Lightning that tell a user of this package nothing."""

import warnings


def ignore_warnings_of_lightning() -> None:
    """Ignores them from now on, in the whole process: for commands, not for a library's functions."""
    # Worker processes are slower than none for data in memory.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # A deprecation that Lightning's own calls meet.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
