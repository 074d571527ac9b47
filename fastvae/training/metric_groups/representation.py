"""How well latents serve classifiers, and how well they follow known factors."""

from typing import Any

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.metrics.dci import DCI
from fastvae.metrics.downstream import downstream_accuracy
from fastvae.metrics.intervention_scores import BetaVAEScore, FactorVAEScore
from fastvae.metrics.mig import MutualInformationGap
from fastvae.metrics.modularity import Explicitness, Modularity
from fastvae.metrics.sap import SAPScore
from fastvae.models import VQVAE, VQVAE2, SemiSupervisedVAE, SequenceVAE
from fastvae.models._inputs import as_float
from fastvae.training import latents
from fastvae.training.metric_groups.base import MetricGroup, Options, Seen
from fastvae.training.module import LitAutoencoder

with extra("metrics"):
    from torchmetrics import CatMetric, MeanMetric


class Downstream(MetricGroup):
    """The accuracy of simple classifiers of the latents and of the data themselves, where the data have labels."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        # A latent of sequences has the length of the longest; a class that is given is not to be found again.
        given = isinstance(seen.lit.network, SequenceVAE) or bool(seen.labels)
        return options.train_samples > 0 and seen.label is not None and seen.label.ndim == 1 and not given

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        self.metrics = {name: CatMetric() for name in ("z", "x", "label")}
        data: Any = seen.lit.trainer.datamodule  # type: ignore[attr-defined]
        batch = data.samples("train", options.train_samples)
        x = as_float(seen.lit.preprocessing(batch["x"].to(seen.x.device)), seen.lit.network)
        self.train = {"z": _codes(seen.lit, x), "x": x.flatten(1).float(), "label": batch["label"]}

    def update(self, seen: Seen) -> None:
        for name, value in {"z": _codes(seen.lit, seen.x), "x": seen.x.flatten(1).float(), "label": seen.label}.items():
            self.metrics[name].update(value)

    def results(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        widths = {name: self.train[name].shape[1] for name in ("z", "x")}
        test = {name: self.metrics[name].compute().cpu() for name in self.metrics}
        for name, width in widths.items():
            train = self.train[name].cpu(), self.train["label"].cpu()
            found = downstream_accuracy(train, (test[name].view(-1, width), test["label"].long()), seed=self.options.seed)
            figures |= {f"accuracy of {name}, {kind.replace('_', ' ')}": value for kind, value in found._asdict().items()}
        return figures


def _codes(lit: LitAutoencoder, x: Tensor) -> Tensor:
    """The latents of all levels in one row; of a codebook its codes, because indices are names."""
    with latents.looking(lit) as network:
        levels: tuple[Tensor, ...]
        if isinstance(network, VQVAE):
            levels = (network.quantizer(network.encoder(x)).quantized,)
        elif isinstance(network, VQVAE2):
            levels = tuple(level.quantized for level in network._levels(x))
        else:
            encoded = network.encode(x)
            parts = [encoded] if isinstance(encoded, Tensor) or hasattr(encoded, "mean") else encoded
            levels = tuple(part if isinstance(part, Tensor) else part.mean for part in parts)
    return torch.cat([level.flatten(1).float() for level in levels], dim=1)


class Classification(MetricGroup):
    """The share of test samples that the classifier of a semi-supervised VAE gets right."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return isinstance(seen.lit.network, SemiSupervisedVAE) and seen.label is not None

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        self.metrics = {"accuracy": MeanMetric()}

    def update(self, seen: Seen) -> None:
        with latents.looking(seen.lit) as network:
            self.metrics["accuracy"].update((network.classify(seen.x) == seen.label).double())


class Disentanglement(MetricGroup):
    """How well the means of the latents follow the factors of the data, where those are known."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        return seen.factors is not None and latents.is_continuous(seen.lit.network)

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        seeded = {metric.__name__: metric(seed=options.seed) for metric in (DCI, SAPScore, Explicitness, BetaVAEScore, FactorVAEScore)}
        self.metrics = {"MIG": MutualInformationGap(), "Modularity": Modularity(), **seeded}

    def update(self, seen: Seen) -> None:
        codes = _codes(seen.lit, seen.x)
        for metric in self.metrics.values():
            metric.update(codes, seen.factors)

    def results(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, metric in self.metrics.items():
            try:
                figures |= {score: float(value) for score, value in metric.compute().items()}
            except ValueError as error:
                # Each needs another number of samples, and those that have enough are no worse for it.
                self.left_out[name] = str(error)
        return figures
