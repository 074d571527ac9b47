"""A trainer for tests."""

from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(**options: Any) -> Trainer:
    """On the CPU, without a logger, a bar, a summary and a trial validation, unless the options say otherwise."""
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{**quiet, "accelerator": "cpu", "num_sanity_val_steps": 0, **options})
