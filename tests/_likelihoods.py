"""The likelihoods of the tests, each with data that fit and with the distribution of torch that it is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributions as D

from fastvae.distributions import (
    BernoulliLikelihood,
    BernoulliProbsLikelihood,
    CategoricalLikelihood,
    GaussianLikelihood,
    LaplaceLikelihood,
    Likelihood,
    NegativeBinomialLikelihood,
    ZeroInflatedNegativeBinomialLikelihood,
)

CHANNELS = 3


@dataclass(frozen=True)
class Case:
    """A likelihood, the kind of its data, and torch's distribution for given parameters, where it has one."""

    make: Callable[[], Likelihood]
    kind: str = "real"
    oracle: Callable[[Likelihood, Tensor], D.Distribution] | None = None
    layout: str = "channels"
    params_in_unit_interval: bool = False

    def data(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.kind == "real":
            return torch.randn(shape, generator=generator)
        if self.kind == "unit":
            return torch.rand(shape, generator=generator)
        if self.kind == "values":
            return torch.randint(5, shape, generator=generator)
        return torch.randint(30, shape, generator=generator).float() * (torch.rand(shape, generator=generator) < 0.7)

    def params(self, likelihood: Likelihood, *shape: int, seed: int = 1) -> Tensor:
        """What a decoder may give for data of the shape."""
        count = likelihood.parameters_per_element
        shape = (*shape, count) if self.layout == "last" else (shape[0], count * shape[1], *shape[2:])
        values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return values.sigmoid() if self.params_in_unit_interval else values


def over_channels(value: Tensor, params: Tensor) -> Tensor:
    """The learned values of the channels, along dimension 1."""
    return value if value.ndim != 1 else value.view(-1, *(1,) * (params.ndim - 2))


def normal(likelihood, params):
    if likelihood.parameters_per_element == 2:
        mean, logvar = params.chunk(2, 1)
        return D.Normal(mean, (0.5 * logvar).exp())
    return D.Normal(params, (0.5 * over_channels(likelihood.logvar, params)).exp().to(params))


def laplace(likelihood, params):
    if likelihood.parameters_per_element == 2:
        mean, log_scale = params.chunk(2, 1)
        return D.Laplace(mean, log_scale.exp())
    return D.Laplace(params, over_channels(likelihood.log_scale, params).exp().to(params))


def negative_binomial(likelihood, params):
    if likelihood.parameters_per_element == 2:
        log_mean, log_dispersion = params.chunk(2, 1)
    else:
        log_mean, log_dispersion = params, over_channels(likelihood.log_dispersion, params).to(params)
    return D.NegativeBinomial(log_dispersion.exp(), logits=log_mean - log_dispersion)


def categorical(likelihood, params):
    return D.Categorical(logits=params.unflatten(1, (5, -1)).movedim(1, -1))


CASES = {
    "bernoulli": Case(BernoulliLikelihood, "unit", lambda _, params: D.Bernoulli(logits=params, validate_args=False)),
    "bernoulli_probs": Case(
        BernoulliProbsLikelihood, "unit", lambda _, params: D.Bernoulli(params, validate_args=False), params_in_unit_interval=True
    ),
    "gaussian": Case(GaussianLikelihood, "real", normal),
    "gaussian_fixed": Case(lambda: GaussianLikelihood(0.3), "real", normal),
    "gaussian_tensor": Case(lambda: GaussianLikelihood(torch.tensor([0.3, 2.0, 5.0]).view(3, 1)), "real", normal),
    "gaussian_global": Case(lambda: GaussianLikelihood("global", logvar=-1.5), "real", normal),
    "gaussian_channel": Case(lambda: GaussianLikelihood("per_channel", channels=CHANNELS, logvar=0.5), "real", normal),
    "gaussian_element": Case(lambda: GaussianLikelihood("per_element"), "real", normal),
    "laplace_fixed": Case(lambda: LaplaceLikelihood(0.3), "real", laplace),
    "laplace_global": Case(lambda: LaplaceLikelihood("global", log_scale=-0.5), "real", laplace),
    "laplace_channel": Case(lambda: LaplaceLikelihood("per_channel", channels=CHANNELS), "real", laplace),
    "laplace_element": Case(lambda: LaplaceLikelihood("per_element"), "real", laplace),
    "categorical": Case(lambda: CategoricalLikelihood(5), "values", categorical),
    "categorical_images": Case(lambda: CategoricalLikelihood(5, "images"), "unit"),
    "categorical_tokens": Case(lambda: CategoricalLikelihood(5, "tokens"), "values", layout="last"),
    "nb_fixed": Case(lambda: NegativeBinomialLikelihood(2.5), "counts", negative_binomial),
    "nb_global": Case(NegativeBinomialLikelihood, "counts", negative_binomial),
    "nb_channel": Case(
        lambda: NegativeBinomialLikelihood("per_channel", channels=CHANNELS, log_dispersion=1.0), "counts", negative_binomial
    ),
    "nb_element": Case(lambda: NegativeBinomialLikelihood("per_element"), "counts", negative_binomial),
    "zinb_global": Case(ZeroInflatedNegativeBinomialLikelihood, "counts"),
    "zinb_element": Case(lambda: ZeroInflatedNegativeBinomialLikelihood("per_element"), "counts"),
}
