"""A sample of a posterior with its KL to a prior."""

from typing import Any, Literal

from torch import Tensor

from fastvae import functional as FV
from fastvae.distributions.normal import CholeskyNormal, DiagonalNormal


def sample_with_kl(
    q: Any,
    p: Any,
    *,
    num_samples: int | None = None,
    reduction: Literal["batchmean", "sample"] = "batchmean",
    free_bits: float = 0.0,
    **noise,
) -> tuple[Tensor, Tensor]:
    r"""``(z, kl)``: z is ``(batch, ...)`` or ``(num_samples, batch, ...)``; the KL is in nats, a scalar or ``(batch,)``.

    The KL of a diagonal posterior to a normal prior is fused with the sampling, that of one with full covariance is in closed form. Any
    other is estimated by its samples, :math:`\log q(z | x) - \log p(z)`, whose mean is the KL and which may be negative.

    Args:
        q: the posterior of a batch.
        p: the prior's distribution.
        num_samples: samples of z for each x.
        reduction: ``"batchmean"`` or ``"sample"``.
        free_bits: nats a dimension that are free, for a diagonal posterior and a normal prior alone: no other KL is a sum over dimensions.
        noise: ``eps``, ``generator`` or ``seed``, see :func:`fastvae.functional.reparameterize`.
    """
    # A method: torch.compile of torch 2.10 cannot take apart what a property of a named tuple returns.
    moments = p.moments() if hasattr(p, "moments") else None
    if isinstance(q, DiagonalNormal) and moments is not None:
        prior = (None if moment is None else moment.to(q.mu.dtype).expand_as(q.mu) for moment in moments)
        return FV.reparameterize_kl(*q, *prior, num_samples=num_samples, reduction=reduction, free_bits=free_bits, **noise)
    if free_bits:
        raise ValueError(f"free_bits: got {free_bits}, takes 0 for a KL that is not a sum over dimensions")
    if isinstance(q, CholeskyNormal) and moments is not None:
        z, kl = q.rsample(num_samples, **noise), q.kl_to(*moments)
    else:
        z, log_q = q.rsample_and_log_prob(num_samples, **noise)
        kl = log_q - p.log_prob(z)
        kl = kl if num_samples is None else kl.mean(0)
    return z, kl if reduction == "sample" else kl.mean()
