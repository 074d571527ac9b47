"""How certain a classifier is of generated images, and how many classes it finds."""

from typing import Any

import torch
from torch import Tensor, nn

from fastvae._extras import extra
from fastvae.metrics.features import FeatureName, feature_network

with extra("metrics"):
    from torchmetrics import Metric


class InceptionScore(Metric):
    r"""The inception score (Salimans et al., *Improved Techniques for Training GANs*, 2016) of generated images:

    .. math:: \exp \left( \mathbb{E}_x KL(p(y | x) \| p(y)) \right), \qquad p(y) = \mathbb{E}_x\, p(y | x)

    from 1 to the number of classes, over all images at once. The paper takes the mean over ten parts of the images, in each of which the
    score is a little lower. The sums that it needs are in float64, and no features are kept.

    Args:
        network: the classifier, see :func:`~fastvae.metrics.features.feature_network`, of whose ready-made ones the logits are taken. A
            network of the user's gives logits.
        image_range: the range of floating images.
        options: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    full_state_update = False

    probabilities: Tensor
    negative_entropy: Tensor
    count: Tensor

    def __init__(self, network: FeatureName | nn.Module, image_range: tuple[float, float] = (0.0, 1.0), **options: Any):
        super().__init__(**options)
        self.network = feature_network(network, "logits", image_range)
        self.add_state("probabilities", torch.zeros(self.network.num_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("negative_entropy", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, images: Tensor) -> None:
        """Adds a batch.

        Args:
            images: see :class:`~fastvae.metrics.features.FeatureNetwork`.
        """
        log_probabilities = self.network(images).log_softmax(1)
        probabilities = log_probabilities.exp()
        self.probabilities += probabilities.sum(0)
        self.negative_entropy += (probabilities * log_probabilities).sum()
        self.count += len(images)

    def compute(self) -> dict[str, Tensor]:
        """``{"IS[name]": float64 scalar}``.

        Raises:
            ValueError: for no images.
        """
        if self.count == 0:
            raise ValueError("images: got none, the inception score takes at least 1")
        marginal = self.probabilities / self.count
        mean_kl = self.negative_entropy / self.count + torch.special.entr(marginal).sum()
        return {f"IS[{self.network.name}]": mean_kl.exp()}
