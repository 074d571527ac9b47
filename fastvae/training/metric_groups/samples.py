"""The quality of samples from the prior."""

from typing import Any

import torch

from fastvae.metrics.generation import FID, KID
from fastvae.metrics.inception_score import InceptionScore
from fastvae.training import latents, pictures
from fastvae.training.metric_groups.base import MetricGroup, Options, Seen

# The images that the features take, where that is fixed.
FEATURE_SHAPES: dict[str, tuple[int | None, ...]] = {"lenet-mnist": (1, 28, 28), "inception-v3": (3, None, None)}


class Samples(MetricGroup):
    """How far samples from the prior, as many as test images, are from those: FID and KID; and the inception score of the samples."""

    @staticmethod
    def applies(seen: Seen, options: Options) -> bool:
        if options.features is None or not pictures.are_images(seen.x) or not latents.can_sample(seen.lit.network):
            return False
        shape = FEATURE_SHAPES.get(options.features, (None, None, None))
        return all(wanted in (None, size) for wanted, size in zip(shape, seen.x.shape[1:], strict=True))

    def __init__(self, seen: Seen, options: Options):
        super().__init__(seen, options)
        features: Any = options.features
        self.metrics = {"FID": FID(features), "KID": KID(features), "IS": InceptionScore(features)}
        # One of the CPU, so that every device has the same samples.
        self.generator = torch.Generator().manual_seed(options.seed)

    def update(self, seen: Seen) -> None:
        with latents.looking(seen.lit) as network:
            drawn = network.sample(len(seen.x), *seen.labels, generator=self.generator).float().clamp(0, 1)
        x = seen.x.float()
        for metric in (self.metrics["FID"], self.metrics["KID"]):
            metric.update(x, real=True)
            metric.update(drawn, real=False)
        self.metrics["IS"].update(drawn)

    def results(self) -> dict[str, float]:
        return {name: float(value) for metric in self.metrics.values() for name, value in metric.compute().items()}
