"""Likelihoods of 8-bit images: the discretized logistic, and the mixture of them of PixelCNN++."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae import functional as FV
from fastvae._types import Reduction
from fastvae.distributions.likelihood import Likelihood
from fastvae.functional._checks import check_tensor
from fastvae.ops._results import accumulation_dtype
from fastvae.ops.logistic_mixture import MIN_LOG_SCALE, parameters_per_position
from fastvae.reference.logistic_mixture import Parameters, split_parameters


class DiscretizedLogisticLikelihood(Likelihood):
    r"""Each channel of a pixel has a logistic of its own, discretized to the 256 levels of an 8-bit image.

    .. math:: p(x | z) = \sigma\!\left( \frac{x + 1/255 - \mu}{s} \right) - \sigma\!\left( \frac{x - 1/255 - \mu}{s} \right)

    for values scaled to [-1, 1]; the lowest level's bin is open below and the highest's above (Kingma et al., *Improved Variational
    Inference with Inverse Autoregressive Flow*, 2016). The decoder gives the means :math:`\mu` of all channels, then their log scales;
    those below -7 count as -7. Data are uint8, or floating in [0, 1], rounded to the nearest level.
    """

    parameters_per_element = 2
    support = (0.0, 1.0)

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        # Independent channels are those of grey images of more positions.
        return FV.logistic_mixture_nll(params.unflatten(1, (2, -1)), x.unsqueeze(1), 1, reduction)

    def mean(self, params: Tensor) -> Tensor:
        """The mean of the logistic, limited to [0, 1]; that of its discretized form differs where much of it lies outside."""
        return _to_unit_interval(self.split(params)[0])

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        means, log_scales = (t.to(accumulation_dtype(t.dtype)) for t in self.split(params.detach()))
        return _draw(means, log_scales, generator).to(params.dtype)


class LogisticMixtureLikelihood(Likelihood):
    """A mixture of discretized logistics at each position of an 8-bit image, in which a channel's mean depends on the channels before it
    (Salimans et al., *PixelCNN++*, 2017); :func:`fastvae.functional.logistic_mixture_nll` has the formula.

    For images of C channels the decoder gives ``parameters_for(C)`` numbers for each position, 10 times ``num_mixtures`` for RGB and 3
    times for grey images; ``parameters_per_element`` is that of grey images. Data are ``(batch, C, ...)``, uint8 or floating in [0, 1],
    rounded to the nearest level. The loss has one element a position, so ``"none"`` gives ``(batch, ...)`` and ``"mean"`` is a mean over
    positions.

    Args:
        num_mixtures: the number of components.

    Raises:
        ValueError: for an argument that does not fit, naming it.
    """

    support = (0.0, 1.0)

    def __init__(self, num_mixtures: int = 10):
        super().__init__()
        if isinstance(num_mixtures, bool) or not isinstance(num_mixtures, int) or num_mixtures < 1:
            raise ValueError(f"num_mixtures: got {num_mixtures!r}, takes a positive integer")
        self.num_mixtures = num_mixtures
        self.parameters_per_element = self.parameters_for(1)

    def parameters_for(self, channels: int) -> int:
        return parameters_per_position(self.num_mixtures, channels)

    def loss(self, params: Tensor, x: Tensor, reduction: Reduction) -> Tensor:
        return FV.logistic_mixture_nll(params, x, self.num_mixtures, reduction)

    def mean(self, params: Tensor) -> Tensor:
        """The mean of the mixture. That of a component is its logistic's, limited to the range of the data; a channel takes the means of
        the channels before it for their values, which is exact as long as these lie inside the range."""
        parts = self._parts(params)
        means: list[Tensor] = []
        for channel in range(parts.means.shape[1]):
            means.append(_shifted_mean(parts, channel, means).clamp(-1.0, 1.0))
        weights = F.softmax(parts.logits, 1)
        return _to_unit_interval((torch.stack(means, 1) * weights.unsqueeze(1)).sum(2)).to(params.dtype)

    def sample(self, params: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draws the component of each position, then its channels in order."""
        parts = self._parts(params.detach())
        noise = torch.empty_like(parts.logits).exponential_(generator=generator)
        # The largest of logits with Gumbel noise, which is -log of exponential noise, is a draw (Maddison et al., 2014).
        index = (parts.logits - noise.log()).argmax(1, keepdim=True).unsqueeze(1)
        means, log_scales, coefficients = (torch.take_along_dim(t, index, 2) for t in parts[1:])
        chosen = Parameters(index, means, log_scales, coefficients)
        values: list[Tensor] = []
        for channel in range(means.shape[1]):
            drawn = _draw(_shifted_mean(chosen, channel, values), log_scales[:, channel], generator)
            values.append(2.0 * drawn - 1.0)
        return _to_unit_interval(torch.cat(values, 1)).to(params.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_mixtures}"

    def check_count(self, params: Tensor) -> None:
        self._channels(params)

    def _channels(self, params: Tensor) -> int:
        """The channels of the images that the decoder's output is of."""
        check_tensor("params", params)
        channels = 1
        while params.ndim > 1 and self.parameters_for(channels) < params.shape[1]:
            channels += 1
        if params.ndim < 2 or self.parameters_for(channels) != params.shape[1]:
            takes = ", ".join(f"{self.parameters_for(c)} for {c}" for c in (1, 2, 3))
            raise ValueError(
                f"decoder: gave shape {tuple(params.shape)}, has to give in dimension 1 the parameters of an image: "
                f"{takes} channels, ... with {self.num_mixtures} components"
            )
        return channels

    def _parts(self, params: Tensor) -> Parameters:
        return split_parameters(params.to(accumulation_dtype(params.dtype)), self.num_mixtures, self._channels(params))


def _shifted_mean(parts: Parameters, channel: int, values: list[Tensor]) -> Tensor:
    """The mean of a channel of each component, given the values in [-1, 1] of the channels before it."""
    first = channel * (channel - 1) // 2
    mean = parts.means[:, channel]
    for before, value in enumerate(values):
        mean = mean + torch.tanh(parts.coefficients[:, first + before]) * value
    return mean


def _draw(mean: Tensor, log_scale: Tensor, generator: torch.Generator | None) -> Tensor:
    """A level / 255 drawn from a discretized logistic with a mean in [-1, 1]."""
    # The level of a bin is the one nearest to a draw from the logistic.
    uniform = torch.empty_like(mean).uniform_(generator=generator).clamp_(1e-7, 1.0 - 1e-7)
    value = mean + torch.exp(log_scale.clamp(min=MIN_LOG_SCALE)) * torch.logit(uniform)
    return (_to_unit_interval(value) * 255.0).round() / 255.0


def _to_unit_interval(values: Tensor) -> Tensor:
    """[-1, 1] to [0, 1]; what lies outside becomes an end."""
    return (0.5 * values + 0.5).clamp(0.0, 1.0)
