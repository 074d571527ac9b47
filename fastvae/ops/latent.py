"""Sampling and the Gaussian KL: the operators and their autograd.Function."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops._autograd import first_derivative_only
from fastvae.ops._operator import Operator, Size
from fastvae.ops._results import accumulation_dtype, empty_if, empty_like, empty_reduced


class ForwardResults(NamedTuple):
    """Each has no elements where it was not asked for."""

    z: Tensor  # (num_samples, *mu.shape), or mu.shape
    kl: Tensor
    active: Tensor  # bool, mu.shape[1:]: with free bits, which dimensions are above them
    noise: Tensor  # the shape of z, in the accumulation dtype


class ForwardArguments(NamedTuple):
    """``z`` is drawn where there is ``eps`` or a ``seed``, and the noise of ``seed`` returned where ``keep_noise``."""

    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    eps: Tensor | None
    seed: Tensor | None
    num_samples: Size | None
    with_kl: bool
    reduction: int
    free_bits: float
    clamp_min: float
    clamp_max: float
    keep_noise: bool

    @property
    def posterior(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The posterior's and the prior's parameters."""
        return self[:4]

    @property
    def limits(self) -> tuple[float, float]:
        """The limits of the log variances."""
        return self.clamp_min, self.clamp_max

    @property
    def draws(self) -> bool:
        return self.eps is not None or self.seed is not None

    def allocate(self) -> ForwardResults:
        mu = self.mu
        z_shape = (0,) if not self.draws else mu.shape if self.num_samples is None else (self.num_samples, *mu.shape)
        kl = empty_reduced(mu, self.reduction) if self.with_kl else mu.new_empty((0,), dtype=accumulation_dtype(mu.dtype))
        active_shape = mu.shape[1:] if self.with_kl and self.free_bits > 0 else (0,)
        noise = mu.new_empty(z_shape if self.keep_noise else (0,), dtype=accumulation_dtype(mu.dtype))
        return ForwardResults(mu.new_empty(z_shape), kl, mu.new_empty(active_shape, dtype=torch.bool), noise)


class BackwardResults(NamedTuple):
    """The gradients of the prior have no elements where there is no prior."""

    grad_mu: Tensor
    grad_logvar: Tensor
    grad_prior_mu: Tensor
    grad_prior_logvar: Tensor


class BackwardArguments(NamedTuple):
    grad_z: Tensor | None
    grad_kl: Tensor | None
    mu: Tensor
    logvar: Tensor
    prior_mu: Tensor | None
    prior_logvar: Tensor | None
    eps: Tensor | None
    seed: Tensor | None
    active: Tensor
    num_samples: Size | None
    reduction: int
    clamp_min: float
    clamp_max: float

    @property
    def posterior(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The posterior's and the prior's parameters."""
        return self[2:6]

    @property
    def limits(self) -> tuple[float, float]:
        """The limits of the log variances."""
        return self.clamp_min, self.clamp_max

    def allocate(self) -> BackwardResults:
        mu, has_prior = self.mu, self.prior_mu is not None
        return BackwardResults(empty_like(mu), empty_like(mu), empty_if(has_prior, mu), empty_if(has_prior, mu))


forward = Operator("latent_forward", ForwardArguments)
backward = Operator("latent_backward", BackwardArguments)


class ReparameterizeKL(torch.autograd.Function):
    """Takes the :class:`ForwardArguments` one by one, then the backend."""

    generate_vmap_rule = True

    @staticmethod
    @forward.takes_arguments
    def forward(*inputs):
        return forward.overloads[inputs[-1]](*inputs[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *posterior, eps, seed, num_samples, ctx.with_kl, reduction, _, clamp_min, clamp_max, keep_noise, ctx.backend = inputs
        z, kl, active, noise = output
        ctx.draws = eps is not None or seed is not None
        ctx.options = num_samples, reduction, clamp_min, clamp_max
        ctx.set_materialize_grads(False)
        absent = (() if ctx.with_kl else (kl,)) + (() if ctx.draws else (z,))
        ctx.mark_non_differentiable(active, noise, *absent)
        ctx.save_for_backward(*posterior, noise if keep_noise else eps, None if keep_noise else seed, active)

    @staticmethod
    @first_derivative_only("fastvae.reference.latent")
    def backward(ctx, grad_z, grad_kl, *_):
        # torch.compile brings zeros as the gradients of results that the forward pass left empty.
        grad_z, grad_kl = grad_z if ctx.draws else None, grad_kl if ctx.with_kl else None
        mu, logvar, prior_mu, *_ = saved = ctx.saved_tensors
        grads = backward.overloads[ctx.backend](grad_z, grad_kl, *saved, *ctx.options)
        grad_mu, grad_logvar, *grad_priors = grads
        grad_prior_mu, grad_prior_logvar = (None, None) if prior_mu is None else grad_priors
        needs_eps = ctx.needs_input_grad[4] and grad_z is not None
        return forward.gradients(
            mu=grad_mu,
            logvar=grad_logvar,
            prior_mu=grad_prior_mu,
            prior_logvar=grad_prior_logvar,
            eps=_grad_eps(grad_z, mu, logvar, ctx.options[2:]) if needs_eps else None,
        )


def _grad_eps(grad_z: Tensor, mu: Tensor, logvar: Tensor, limits: tuple[float, float]) -> Tensor:
    """Rarely needed (the noise is a function of something that learns), so it is plain PyTorch."""
    dtype = accumulation_dtype(mu.dtype)
    return (grad_z.to(dtype) * torch.exp(0.5 * logvar.to(dtype).clamp(*limits))).to(mu.dtype)
