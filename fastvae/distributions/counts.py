"""Likelihoods of counts: the negative binomial, and the one with more zeros."""

import torch
from torch import Tensor

from fastvae._backend import FLOATS
from fastvae._torch_private import standard_gamma
from fastvae._types import Extent, Reduction
from fastvae.distributions import _negative_binomial
from fastvae.distributions._positive import PositiveLikelihood
from fastvae.distributions.likelihood import loss_dtype
from fastvae.functional._documentation import documented
from fastvae.ops._results import accumulation_dtype, widest_dtype


class NegativeBinomialLikelihood(PositiveLikelihood):
    r"""A negative binomial distribution for each count, with mean :math:`\mu` and variance :math:`\mu + \mu^2 / \theta`.

    .. math:: p(x | z) = \prod_i \frac{\Gamma(x_i + \theta_i)}{\Gamma(\theta_i)\, x_i!}
        \left(\frac{\theta_i}{\mu_i + \theta_i}\right)^{\theta_i} \left(\frac{\mu_i}{\mu_i + \theta_i}\right)^{x_i}

    The usual likelihood of counts of molecules in single cells (Lopez et al., *Deep generative modeling for single-cell transcriptomics*,
    2018). The decoder gives :math:`\log\mu`, ``(batch, channels, ...)``. ``x`` has counts, floating or integer; uint8, which is an image
    everywhere else, is refused. A negative count has the loss NaN; one that is no integer gets the formula's value.

    Elements are computed in float64, because a rounding of the mean to float32 alone would change log p by more than 1e-6 of itself: the
    relative error is that of rounding to float32 for counts to 1e5, means from 1e-4 to 1e5 and dispersions from 1e-3 to 1e8, and the loss
    is finite far outside. On devices without float64 (Apple's GPUs) it is below 1e-5.

    With ``library``, the size of each sample, the mean is ``library * exp(params)``.

    Args:
        dispersion: :math:`\theta`: a number or a tensor that broadcasts to ``x`` by torch's rules, which are fixed; ``"global"``, one
            learned value; ``"per_channel"``, one learned value for each feature of dimension 1, such as a gene; or ``"per_element"``: the
            decoder gives the log dispersions after its other parameters.
        channels: the channels of ``x``, for ``"per_channel"``.
        log_dispersion: where the learned logarithm of ``"global"`` and ``"per_channel"`` starts. The buffer or parameter of that name holds
            the logarithm.

    Raises:
        ValueError: for an argument that does not fit, naming it.
    """

    log_name = "log_dispersion"
    data_dtypes = (*FLOATS, torch.int16, torch.int32, torch.int64)
    support = (0.0, torch.inf)

    def __init__(self, dispersion: float | Tensor | Extent = "global", *, channels: int | None = None, log_dispersion: float = 0.0):
        super().__init__("dispersion", dispersion, channels, log_dispersion)

    @documented
    def forward(self, params: Tensor, x: Tensor, *, reduction: Reduction = "batchmean", library: Tensor | None = None) -> Tensor:
        """The negative log-likelihood of ``x`` in nats.

        Args:
            params: what the decoder gives.
            x: the counts.
            $reduction
            library: the size of each sample, ``(batch,)``, positive: a factor of the mean.

        Returns:
            The loss, as of any :class:`Likelihood`.
        """
        self.check(params, x)
        return self.loss(self._times(params, library), x, reduction)

    def log_prob(self, params: Tensor, x: Tensor, *, library: Tensor | None = None) -> Tensor:
        return -self(params, x, reduction="sample", library=library)

    def elements(self, params: Tensor, x: Tensor) -> Tensor:
        dtype = widest_dtype(params.device)
        parts = (part.to(dtype) for part in self.parts(params))
        return -self.log_probs(x.to(dtype), *parts).to(loss_dtype(params, x))

    def log_probs(self, x: Tensor, *parts: Tensor) -> Tensor:
        """log p of each count, given the decoder's parameters and the log dispersion."""
        return _negative_binomial.log_prob(x, *parts)

    def mean(self, params: Tensor, *, library: Tensor | None = None) -> Tensor:
        return self.split(self._times(params, library))[0].exp()

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, library: Tensor | None = None) -> Tensor:
        """A draw from p(x | z), of dtype float32 (float64 where ``params`` is): 16-bit floats have too few integers."""
        log_mean, *_, log_dispersion = self._drawing_parts(params, library)
        # A negative binomial is a Poisson whose rate has a gamma distribution of shape theta and mean mu.
        gamma = standard_gamma(log_dispersion.exp().expand_as(log_mean), generator)
        return torch.poisson(gamma * (log_mean - log_dispersion).exp(), generator)

    def check_range(self, x: Tensor) -> None:
        super().check_range(x)
        if bool((x.double().frac() != 0).any()):
            raise ValueError("x: got values that are no integers, takes counts")

    def _drawing_parts(self, params: Tensor, library: Tensor | None) -> list[Tensor]:
        dtype = accumulation_dtype(params.dtype)
        return [part.detach().to(dtype) for part in self.parts(self._times(params, library))]

    def _times(self, params: Tensor, library: Tensor | None) -> Tensor:
        """The decoder's output for means that are ``library`` times as large."""
        if library is None:
            return params
        if library.shape != params.shape[:1]:
            raise ValueError(f"library: got shape {tuple(library.shape)}, takes one size a sample, {tuple(params.shape[:1])}")
        log_mean, *others = self.split(params)
        shift = library.to(accumulation_dtype(params.dtype)).log().view(-1, *(1,) * (params.ndim - 1))
        return torch.cat([log_mean + shift, *others], dim=1)


class ZeroInflatedNegativeBinomialLikelihood(NegativeBinomialLikelihood):
    r"""A negative binomial with more zeros: with probability :math:`\pi` a count is 0, otherwise it is negative binomial.

    .. math:: p(x_i | z) = \pi_i\, [x_i = 0] + (1 - \pi_i)\, \mathrm{NB}(x_i; \mu_i, \theta_i)

    The decoder gives :math:`\log\mu`, then the logits of :math:`\pi`: ``(batch, 2 * channels, ...)``. Everything else, the arguments
    too, is as in :class:`NegativeBinomialLikelihood`.
    """

    outputs = 2

    def log_probs(self, x: Tensor, *parts: Tensor) -> Tensor:
        return _negative_binomial.zero_inflated_log_prob(x, *parts)

    def mean(self, params: Tensor, *, library: Tensor | None = None) -> Tensor:
        log_mean, zero_logits, *_ = self.split(self._times(params, library))
        return log_mean.exp() * torch.sigmoid(-zero_logits)

    def sample(self, params: Tensor, generator: torch.Generator | None = None, *, library: Tensor | None = None) -> Tensor:
        counts = super().sample(params, generator, library=library)
        kept = torch.sigmoid(-self._drawing_parts(params, library)[1])
        return counts * torch.bernoulli(kept, generator=generator)
