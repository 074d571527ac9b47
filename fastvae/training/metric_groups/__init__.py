"""The metrics of an evaluation, in groups: each knows to which networks and data it applies, and how its figures are named."""

from fastvae.training.metric_groups.base import MetricGroup, Options, Seen
from fastvae.training.metric_groups.bound import Bound
from fastvae.training.metric_groups.codes import Codebooks, Latents
from fastvae.training.metric_groups.reconstruction import Denoising, LossTerms, Reconstruction
from fastvae.training.metric_groups.representation import Classification, Disentanglement, Downstream
from fastvae.training.metric_groups.samples import Samples

# In the order of the table.
GROUPS: tuple[type[MetricGroup], ...] = (
    *(LossTerms, Reconstruction, Denoising, Bound, Latents, Codebooks, Classification, Downstream, Samples, Disentanglement),
)

__all__ = ["GROUPS", "MetricGroup", "Options", "Seen"]
