"""Completion of images by a VAE: inpainting and super-resolution by a search in z, and its quality in the region that was not seen."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._extras import extra
from fastvae.models import VAE

with extra("metrics"):
    from torchmetrics import Metric
    from torchmetrics.functional.image import structural_similarity_index_measure

Observe = Callable[[Tensor], Tensor]


def masked(visible: Tensor) -> Observe:
    """The observation of inpainting: what is not ``visible``, a bool mask that broadcasts over the images, is 0."""
    if visible.dtype != torch.bool:
        raise TypeError(f"visible: got {visible.dtype}, takes bool")
    return lambda x: x * visible


def downscaled(factor: int) -> Observe:
    """The observation of super-resolution: the means of squares of ``factor`` pixels a side, which divides height and width."""
    if factor < 2:
        raise ValueError(f"factor: got {factor}, takes an integer of at least 2")

    def observe(x: Tensor) -> Tensor:
        if x.shape[-2] % factor or x.shape[-1] % factor:
            raise ValueError(f"factor: got {factor} for images of {tuple(x.shape[-2:])}, takes a divisor of both sides")
        return F.avg_pool2d(x, factor)

    return observe


def complete(
    model: VAE,
    observed: Tensor,
    observe: Observe,
    *,
    noise_std: float = 0.1,
    starts: int = 4,
    steps: int = 200,
    learning_rate: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The most probable images for what was observed of them, by a search for z (Bora et al., *Compressed Sensing using Generative
    Models*, 2017, with the prior's density for the norm of z).

    .. math:: \hat z = \arg\min_z \frac{1}{2 s^2} \| A(\mathbb{E}[x | z]) - y \|^2 - \log p(z)

    by Adam, from several draws of the prior for each image, of which the best is kept. The weights of the model get no gradient.

    Args:
        model: a VAE that knows the shape of its z; of a conditional one ``model.given(y)``.
        observed: y, what :math:`A` gives for the images, ``(batch, ...)``.
        observe: :math:`A`, differentiable: :func:`masked` or :func:`downscaled` for example.
        noise_std: s, the standard deviation of an error of the observation, in units of the data.
        starts: draws for each image.
        steps, learning_rate: of Adam.
        generator: of the draws.

    Returns:
        The means of p(x | z) at the best z, ``(batch, ...)``, also where they were observed.
    """
    if model.prior is None:
        raise ValueError("model: does not know the shape of its z, takes one with latent_shape")
    if not noise_std > 0 or starts < 1 or steps < 1:
        raise ValueError(f"noise_std, starts, steps: got {noise_std}, {starts}, {steps}, takes a number > 0 and integers of at least 1")
    prior = model.prior(model.encode)
    z = prior.sample(starts * len(observed), generator).detach().requires_grad_()
    optimizer = torch.optim.Adam([z], learning_rate)
    targets = observed.repeat(starts, *(1,) * (observed.ndim - 1))

    def energy() -> Tensor:
        error = observe(model.decode_mean(z)) - targets
        return error.square().flatten(1).sum(1) / (2 * noise_std**2) - prior.log_prob(z)

    for _ in range(steps):
        (z.grad,) = torch.autograd.grad(energy().sum(), z)
        optimizer.step()
    with torch.no_grad():
        best = energy().view(starts, -1).argmin(0)
        return model.decode_mean(z.unflatten(0, (starts, -1))[best, torch.arange(len(observed), device=z.device)])


class RegionResult(NamedTuple):
    """Float64 scalars: the peak signal-to-noise ratio in dB and the mean structural similarity of a region."""

    psnr: Tensor
    ssim: Tensor


class RegionQuality(Metric):
    r"""PSNR and SSIM of a region of images, such as the part that was not visible.

    .. math:: PSNR = 10 \log_{10} \frac{R^2}{\mathrm{mean}_{region} (x - \hat x)^2}

    SSIM (Wang et al., 2004; a Gaussian window of 11 pixels) is the mean over the region of its map, whose windows reach out of the region.

    Args:
        data_range: R, the width of the data's range.
        options: of ``torchmetrics.Metric``.
    """

    squared_error: Tensor
    similarity: Tensor
    elements: Tensor

    def __init__(self, data_range: float = 1.0, **options: Any):
        super().__init__(**options)
        if not data_range > 0:
            raise ValueError(f"data_range: got {data_range}, takes a number > 0")
        self.data_range = float(data_range)
        for state in ("squared_error", "similarity", "elements"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, recon: Tensor, x: Tensor, region: Tensor) -> None:
        """Adds a batch.

        Args:
            recon, x: images, ``(batch, channels, height, width)``, each side of at least 11 pixels.
            region: bool, broadcasts over them.
        """
        if recon.shape != x.shape or x.ndim != 4 or min(x.shape[-2:]) < 11:
            raise ValueError(
                f"recon, x: got {tuple(recon.shape)} and {tuple(x.shape)}, takes images of one shape, 11 pixels or more a side"
            )
        if region.dtype != torch.bool:
            raise TypeError(f"region: got {region.dtype}, takes bool")
        region = region.expand(x.shape)
        recon, x = recon.double(), x.double()
        _, similarity = structural_similarity_index_measure(recon, x, data_range=self.data_range, return_full_image=True)
        self.squared_error += (recon - x).square()[region].sum()
        self.similarity += similarity[region].sum()
        self.elements += region.sum()

    def compute(self) -> RegionResult:
        if self.elements == 0:
            raise ValueError("region: got no pixels, takes at least one")
        mean_error = self.squared_error / self.elements
        return RegionResult(10 * torch.log10(self.data_range**2 / mean_error), self.similarity / self.elements)
