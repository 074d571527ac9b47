"""Priors and posteriors that are normalizing flows, whose transformations are zuko's (Rezende and Mohamed, *Variational Inference with
Normalizing Flows*, 2015)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastvae._extras import extra
from fastvae._types import check_choice
from fastvae.distributions.normal import DiagonalNormal, StandardNormal, draw_noise, widened
from fastvae.distributions.posterior import DiagonalPosterior, Posterior
from fastvae.distributions.prior import Encode, Prior, check_count

with extra("flows"):
    import zuko

PriorFlow = Literal["autoregressive", "coupling", "spline"]
PosteriorFlow = Literal["inverse_autoregressive", "planar"]

_PRIOR_FLOWS = {"autoregressive": zuko.flows.MAF, "coupling": zuko.flows.RealNVP, "spline": zuko.flows.NSF}


def transformed(transforms: Sequence[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors x after all transformations, and the log determinant of the Jacobian, at least in float32.

    torch.compile does not trace the composition that zuko has.
    """
    total = widened(x.new_zeros(x.shape[:-1]))
    for transform in transforms:
        x, log_determinant = transform.call_and_ladj(x)
        total = total + widened(log_determinant)
    return x, total


def inverted(transforms: Sequence[Any], y: Tensor) -> Tensor:
    """The vectors that the transformations turn into y."""
    for transform in reversed(transforms):
        y = transform.inv(y)
    return y


class FlowDistribution:
    """The distribution of the latents that the transformations turn into standard normal noise."""

    def __init__(self, transforms: Sequence[Any], origin: Tensor):
        self._transforms, self._origin = transforms, origin

    def log_prob(self, z: Tensor) -> Tensor:
        noise, log_determinant = transformed(self._transforms, z.flatten(-self._origin.ndim).to(self._origin.dtype))
        return StandardNormal(self._origin.flatten()).log_prob(noise) + log_determinant

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        noise = draw_noise(n, self._origin, generator).flatten(1)
        return inverted(self._transforms, noise).view(n, *self._origin.shape)


class FlowPrior(Prior):
    """A normalizing flow over the latent's elements.

    Args:
        latent_shape: shape of one z, an integer for a vector.
        kind: ``"autoregressive"`` (Papamakarios et al., *Masked Autoregressive Flow*, 2017), ``"coupling"`` (Dinh et al., *Real NVP*, 2017)
            or ``"spline"`` (Durkan et al., *Neural Spline Flows*, 2019).
        transforms: number of transformations.
        hidden: units of the hidden layers of each.
    """

    origin: Tensor

    def __init__(
        self, latent_shape: int | Sequence[int], kind: PriorFlow = "autoregressive", transforms: int = 3, hidden: Sequence[int] = (64, 64)
    ):
        super().__init__(latent_shape)
        check_choice("kind", kind, get_args(PriorFlow))
        size = math.prod(self.latent_shape)
        flow = _PRIOR_FLOWS[kind](size, transforms=check_count("transforms", transforms), hidden_features=tuple(hidden))
        self.transforms = flow.transform.transforms
        # It gives draws their device and dtype, and is no weight.
        self.register_buffer("origin", torch.zeros(self.latent_shape), persistent=False)

    def forward(self, encode: Encode | None = None) -> FlowDistribution:
        return FlowDistribution([make() for make in self.transforms], self.origin)


class TransformedNormal:
    """The distribution of what the transformations make of u, which is diagonal normal.

    ``mean`` is the transformed mean of u; ``mu`` and ``logvar`` are those of u.
    """

    def __init__(self, base: DiagonalNormal, transforms: Sequence[Any]):
        self._base, self._transforms = base, transforms
        self.mu, self.logvar = base

    @property
    def mean(self) -> Tensor:
        return transformed(self._transforms, self.mu)[0]

    def log_prob(self, z: Tensor) -> Tensor:
        u = inverted(self._transforms, z)
        return self._base.log_prob(u) - transformed(self._transforms, u)[1]

    def rsample(self, num_samples: int | None = None, **noise) -> Tensor:
        """A draw with gradients."""
        return transformed(self._transforms, self._base.rsample(num_samples, **noise))[0]

    def rsample_and_log_prob(self, num_samples: int | None = None, **noise) -> tuple[Tensor, Tensor]:
        u = self._base.rsample(num_samples, **noise)
        z, log_determinant = transformed(self._transforms, u)
        return z, self._base.log_prob(u) - log_determinant


class FlowPosterior(Posterior):
    r"""z = f(u, h) with u diagonal normal and f a normalizing flow that h steers: the encoder gives mu, logvar and h on dimension 1.

    Args:
        latent_dim: size of z, a vector.
        kind: ``"inverse_autoregressive"`` (Kingma et al., *Improved Variational Inference with Inverse Autoregressive Flow*, 2016), or
            ``"planar"`` (Rezende and Mohamed, 2015), whose ``log_prob`` is known at its own draws alone.
        transforms: number of transformations.
        context: size of h; 0 for a flow that is the same for every x.
        hidden: units of the hidden layers of each inverse autoregressive transformation.
    """

    def __init__(
        self,
        latent_dim: int,
        kind: PosteriorFlow = "inverse_autoregressive",
        transforms: int = 4,
        context: int = 0,
        hidden: Sequence[int] = (64, 64),
    ):
        super().__init__()
        check_choice("kind", kind, get_args(PosteriorFlow))
        check_count("latent_dim", latent_dim)
        self.latent_dim, self.context = latent_dim, context
        self.diagonal = DiagonalPosterior()
        self.transforms = nn.ModuleList()
        for index in range(check_count("transforms", transforms)):
            if kind == "planar":
                self.transforms.append(PlanarTransform(latent_dim, context))
            else:
                # Every other transformation sees the dimensions in the opposite order.
                order = torch.arange(latent_dim) if index % 2 == 0 else torch.arange(latent_dim).flip(0)
                options = {"order": order, "hidden_features": tuple(hidden)}
                self.transforms.append(zuko.flows.MaskedAutoregressiveTransform(latent_dim, context, **options))

    def parameters_for(self, latent_dim: int) -> int:
        return 2 * latent_dim + self.context

    def forward(self, encoded: Tensor) -> TransformedNormal:
        expected = self.parameters_for(self.latent_dim)
        if not isinstance(encoded, Tensor) or encoded.ndim != 2 or encoded.shape[1] != expected:
            given = f"shape {tuple(encoded.shape)}" if isinstance(encoded, Tensor) else type(encoded).__name__
            raise ValueError(f"encoder: gave {given}, has to give (batch, {expected}) for this FlowPosterior")
        base, context = encoded.split((2 * self.latent_dim, self.context), dim=1)
        steering = context if self.context else None
        return TransformedNormal(self.diagonal(base), [make(steering) for make in self.transforms])


class PlanarTransform(zuko.lazy.LazyTransform):
    r"""Gives :math:`z = u + \hat a \tanh(w^T u + b)`; zuko has none. :math:`\hat a` is a with :math:`w^T \hat a > -1`, which makes it
    invertible. a, w and b are affine in the context."""

    def __init__(self, features: int, context: int):
        super().__init__()
        self.features = features
        self.offset = nn.Parameter(torch.randn(2 * features + 1) / math.sqrt(features))
        self.slope = nn.Parameter(torch.zeros(2 * features + 1, context))

    def forward(self, c: Tensor | None = None) -> "Planar":
        parameters = self.offset if c is None else F.linear(c, self.slope, self.offset)
        return Planar(*parameters.split((self.features, self.features, 1), dim=-1))


class Planar(torch.distributions.Transform):
    """One planar transformation of vectors. Its inverse has no closed form."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, a: Tensor, w: Tensor, b: Tensor):
        super().__init__()
        product = (a * w).sum(-1, keepdim=True)
        wanted = F.softplus(product) - 1
        self.a = a + (wanted - product) * w / w.square().sum(-1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        self.w, self.b = w, b

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        raise NotImplementedError("kind: 'planar' has no inverse in closed form, 'inverse_autoregressive' has one")

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bent = torch.tanh((x * self.w).sum(-1, keepdim=True) + self.b)
        slope = (1 - bent.square()) * (self.w * self.a).sum(-1, keepdim=True)
        return x + self.a * bent, torch.log1p(slope).squeeze(-1)
