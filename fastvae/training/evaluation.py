"""``fastvae test``: every metric that applies to a network, in a table and a file that says how each was computed."""

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import __version__
from fastvae._extras import extra
from fastvae.metrics.features import FeatureName
from fastvae.models._inputs import as_float
from fastvae.training.errors import writing
from fastvae.training.metric_groups import GROUPS, MetricGroup, Options, Seen
from fastvae.training.module import LitAutoencoder, data_of, labels_of

with extra("train"):
    from lightning.pytorch import Callback, Trainer

PACKAGES = ("torch", "torchmetrics", "scikit-learn", "numpy")


class Evaluation(Callback):
    """Every metric that applies to a network, over the test data: printed, and written beside the checkpoint as ``<name>.test.json``.

    Reconstructions and latents are those at the means of the posteriors, the terms of the loss those of one draw. Figures of several
    processes are those of all their samples.

    Args:
        bound_draws: k of the importance-weighted bound on log p(x); 0 for no bounds.
        bound_samples: test samples of each process whose bounds are computed, the first ones.
        features: whose features judge the samples from the prior: ``"lenet-mnist"`` for grey images of 28 x 28, ``"inception-v3"`` for
            colour images, or None for no such figures.
        train_samples: training samples of the classifiers of latents; 0 for none.
        seed: of the draws that are not the training's own.
        out: file of the results, in place of that beside the checkpoint.
    """

    def __init__(
        self,
        bound_draws: int = 50,
        bound_samples: int = 1000,
        features: FeatureName | None = "lenet-mnist",
        train_samples: int = 5000,
        seed: int = 0,
        out: Path | None = None,
    ):
        numbers = {"bound_draws": bound_draws, "bound_samples": bound_samples, "train_samples": train_samples}
        for name, number in numbers.items():
            if number < 0:
                raise ValueError(f"{name}: got {number}, takes an integer >= 0")
        self.options = Options(bound_draws, bound_samples, features, train_samples, seed)
        self.out = out
        self.groups: list[MetricGroup] = []
        self.figures: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.samples = self.elements = 0

    def on_test_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.groups, self.samples, self.figures = [], 0, {}

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        seen = _seen(pl_module, batch, outputs)
        if batch_idx == 0:
            self.groups = [group(seen, self.options) for group in GROUPS if group.applies(seen, self.options)]
            for group in self.groups:
                group.to(seen.x.device)
        with torch.no_grad():
            for group in self.groups:
                group.update(seen)
        self.samples += len(seen.x)
        self.elements = seen.x[0].numel()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # All processes join their samples here.
        self.figures = {name: value for group in self.groups for name, value in group.results().items()}
        self.left_out = {name: reason for group in self.groups for name, reason in group.left_out.items()}

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Prints and writes the figures, when the progress bar has ended."""
        if stage != "test" or not trainer.is_global_zero or not self.figures:
            return
        print(table(self.figures))
        for name, reason in self.left_out.items():
            print(f"{name} is left out: {reason}")
        path = self.out or (result_path(Path(trainer.ckpt_path)) if trainer.ckpt_path else None)
        if path is not None:
            write(path, {"metrics": self.figures, "left_out": self.left_out, "settings": self._settings(trainer, pl_module)})
            print(path)

    def _settings(self, trainer: Trainer, lit: LitAutoencoder) -> dict[str, Any]:
        """How the figures were computed."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        recipe = getattr(lit.network, "recipe", None)
        return {
            "network": type(lit.network).__name__ if recipe is None else recipe.name,
            "data": type(data).__name__,
            "data_options": dict(data.hparams),
            "split": "test",
            "samples": self.samples * trainer.world_size,
            "elements": self.elements,
            "binarization": data.hparams.get("binarize", "none"),
            "latents": "posterior mean; one draw for the terms of the loss",
            **self.options._asdict(),
            "noise_seed": lit._noise_seed,
            "python": platform.python_version(),
            "fastvae": __version__,
            **{name: version(name) for name in PACKAGES},
        }


def result_path(checkpoint: Path) -> Path:
    """The file of a checkpoint's evaluation."""
    return checkpoint.with_suffix(".test.json")


def _seen(lit: LitAutoencoder, batch: Any, output: dict[str, Any]) -> Seen:
    x = lit.preprocessing(data_of(batch))
    entries = batch if isinstance(batch, dict) else {}
    x = x if _is_text(x) else as_float(x, lit.network)
    return Seen(lit, x, labels_of(batch, lit.network), entries.get("label"), entries.get("factors"), output)


def _is_text(x: Tensor) -> bool:
    return not x.is_floating_point() and x.dtype != torch.uint8


def table(metrics: dict[str, float]) -> str:
    """A line a figure."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{width}}  {value:.5g}" for name, value in metrics.items())


def write(path: Path, content: dict[str, Any]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n")
