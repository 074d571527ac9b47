"""Loss modules: those of torch.nn with the reductions and kernels of the package, and the ELBO."""

from typing import get_args

import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import BoundReduction, Likelihood, Reduction, check_choice
from fastvae.functional._checks import check_nonnegative
from fastvae.functional._documentation import documented
from fastvae.nn.schedules import Schedule, ScheduledKL
from fastvae.ops._results import reduction_number


class _Loss(nn.Module):
    def __init__(self, reduction: Reduction):
        super().__init__()
        reduction_number(reduction)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


@documented
class BCEWithLogitsLoss(_Loss):
    r""":func:`fastvae.functional.binary_cross_entropy_with_logits` as a module; the arguments of :class:`torch.nn.BCEWithLogitsLoss`.

    Args:
        $weight
            A buffer, as in torch.
        $reduction
        pos_weight: :math:`p`, broadcast to ``input``; a buffer, as in torch.
    """

    def __init__(self, weight: Tensor | None = None, reduction: Reduction = "mean", pos_weight: Tensor | None = None):
        super().__init__(reduction)
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.weight: Tensor | None
        self.pos_weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor, *, reduction: Reduction | None = None) -> Tensor:
        """The loss of logits against a target in [0, 1] or uint8; ``reduction`` overrides the module's for this call."""
        return FV.binary_cross_entropy_with_logits(input, target, self.weight, reduction or self.reduction, self.pos_weight)


@documented
class BCELoss(_Loss):
    """:func:`fastvae.functional.binary_cross_entropy` as a module; the arguments of :class:`torch.nn.BCELoss`.

    Args:
        $weight
            A buffer, as in torch.
        $reduction
    """

    def __init__(self, weight: Tensor | None = None, reduction: Reduction = "mean"):
        super().__init__(reduction)
        self.register_buffer("weight", weight)
        self.weight: Tensor | None

    def forward(self, input: Tensor, target: Tensor, *, reduction: Reduction | None = None) -> Tensor:
        """The loss of probabilities against a target in [0, 1] or uint8; ``reduction`` overrides the module's for this call."""
        return FV.binary_cross_entropy(input, target, self.weight, reduction or self.reduction)


@documented
class MSELoss(_Loss):
    """:func:`fastvae.functional.mse_loss` as a module; the arguments of :class:`torch.nn.MSELoss`.

    Args:
        $reduction
    """

    def __init__(self, reduction: Reduction = "mean"):
        super().__init__(reduction)

    def forward(self, input: Tensor, target: Tensor, *, reduction: Reduction | None = None) -> Tensor:
        """The squared error; a uint8 target means value / 255; ``reduction`` overrides the module's for this call."""
        return FV.mse_loss(input, target, reduction or self.reduction)


@documented
class GaussianNLL(_Loss):
    r""":func:`fastvae.functional.gaussian_nll` with a variance that is fixed, or learned with the decoder (Rybkin et al., *Simple and
    Effective VAE Training with Calibrated Decoders*, 2021).

    Args:
        $logvar
        learned: makes ``logvar`` a parameter that starts at the given value.
        $reduction
    """

    def __init__(self, logvar: float | Tensor = 0.0, *, learned: bool = False, reduction: Reduction = "batchmean"):
        super().__init__(reduction)
        value = logvar.detach().clone() if isinstance(logvar, Tensor) else torch.tensor(float(logvar))
        if learned:
            self.logvar = nn.Parameter(value)
        else:
            self.register_buffer("logvar", value)

    def forward(self, input: Tensor, target: Tensor, *, reduction: Reduction | None = None) -> Tensor:
        """The negative log-likelihood of ``target`` under the mean ``input``; ``reduction`` overrides the module's for this call."""
        return FV.gaussian_nll(input, target, self.logvar, reduction or self.reduction)


class LogisticMixtureNLL(_Loss):
    """:func:`fastvae.functional.logistic_mixture_nll` as a module.

    Args:
        num_mixtures: the number of components.
        reduction: ``"none"`` one value a position, ``"sample"`` sum over all but the batch dimension, ``"batchmean"`` mean of those (nats
            per sample), ``"sum"``, or ``"mean"`` over positions.
    """

    def __init__(self, num_mixtures: int = 10, reduction: Reduction = "batchmean"):
        super().__init__(reduction)
        self.num_mixtures = num_mixtures

    def forward(self, input: Tensor, target: Tensor, *, reduction: Reduction | None = None) -> Tensor:
        """The negative log-likelihood of an 8-bit image under the parameters ``input``; ``reduction`` overrides the module's for this
        call."""
        return FV.logistic_mixture_nll(input, target, self.num_mixtures, reduction or self.reduction)

    def extra_repr(self) -> str:
        return f"num_mixtures={self.num_mixtures}, {super().extra_repr()}"


class KLPenalty(ScheduledKL):
    r"""The second term of a VAE's loss: :math:`\beta\, KL`, or with a capacity :math:`\beta\, |KL - C|`.

    For a KL that is at hand, from :func:`fastvae.functional.reparameterize_kl`; :class:`ELBOLoss` computes it from the posterior.

    Args:
        beta: weight of the KL, a number or a schedule (Higgins et al., *beta-VAE*, 2017).
        capacity: :math:`C` in nats per sample, a number or a schedule (Burgess et al., 2018); ``None`` for none.
    """

    def __init__(self, beta: float | Schedule = 1.0, capacity: float | Schedule | None = None):
        super().__init__(beta, capacity)

    def forward(self, kl: Tensor) -> Tensor:
        """``kl`` in nats per sample: a mean over the batch, or one value a sample."""
        capacity = self.capacity
        return self.beta * (kl if capacity is None else (kl - capacity).abs())


@documented
class ELBOLoss(ScheduledKL):
    """:func:`fastvae.functional.elbo_loss` as a module whose ``beta`` and ``capacity`` may follow a schedule.

    ``step()`` advances the schedules, before or after the backward pass; with a schedule the number of steps taken is in the
    ``state_dict``.

    Args:
        $likelihood
        beta: weight of the KL, a number or a schedule.
        $free_bits
        capacity: capacity of the KL in nats per sample, a number or a schedule; ``None`` for none.
        $bound_reduction
    """

    def __init__(
        self,
        *,
        likelihood: Likelihood = "bernoulli_logits",
        beta: float | Schedule = 1.0,
        free_bits: float = 0.0,
        capacity: float | Schedule | None = None,
        reduction: BoundReduction = "batchmean",
    ):
        super().__init__(beta, capacity)
        check_choice("likelihood", likelihood, get_args(Likelihood))
        check_choice("reduction", reduction, get_args(BoundReduction))
        self.likelihood = likelihood
        self.free_bits = check_nonnegative("free_bits", free_bits)
        self.reduction = reduction

    def forward(self, recon: Tensor, target: Tensor, mu: Tensor, logvar: Tensor) -> FV.ELBO:
        """``ELBO(loss, recon_loss, kl)`` of what the decoder gave, the data and the posterior."""
        return FV.elbo_loss(
            recon,
            target,
            mu,
            logvar,
            likelihood=self.likelihood,
            beta=self.beta,
            free_bits=self.free_bits,
            capacity=self.capacity,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return f"likelihood={self.likelihood!r}, {super().extra_repr()}, free_bits={self.free_bits}, reduction={self.reduction!r}"
