"""The exchangeable parts of a VAE, as modules: priors p(z), posteriors q(z | x) and likelihoods p(x | z)."""

import importlib
from typing import TYPE_CHECKING

from fastvae.distributions.bernoulli import BernoulliLikelihood, BernoulliProbsLikelihood
from fastvae.distributions.categorical import CategoricalLikelihood
from fastvae.distributions.conditional import ConditionalPrior
from fastvae.distributions.counts import NegativeBinomialLikelihood, ZeroInflatedNegativeBinomialLikelihood
from fastvae.distributions.gaussian import GaussianLikelihood
from fastvae.distributions.laplace import LaplaceLikelihood
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.logistic_mixture import DiscretizedLogisticLikelihood, LogisticMixtureLikelihood
from fastvae.distributions.posterior import CholeskyPosterior, DiagonalPosterior, Posterior
from fastvae.distributions.prior import DiagonalPrior, MixturePrior, Prior, StandardPrior, VampPrior

if TYPE_CHECKING:
    from fastvae.distributions.flow import FlowPosterior, FlowPrior

__all__ = [
    "BernoulliLikelihood",
    "BernoulliProbsLikelihood",
    "CategoricalLikelihood",
    "CholeskyPosterior",
    "ConditionalPrior",
    "DiagonalPosterior",
    "DiagonalPrior",
    "DiscretizedLogisticLikelihood",
    "FlowPosterior",
    "FlowPrior",
    "GaussianLikelihood",
    "LaplaceLikelihood",
    "Likelihood",
    "LogisticMixtureLikelihood",
    "MixturePrior",
    "NegativeBinomialLikelihood",
    "Posterior",
    "Prior",
    "StandardPrior",
    "VampPrior",
    "ZeroInflatedNegativeBinomialLikelihood",
]


def __getattr__(name: str):
    # Flows need zuko, which nothing else does.
    if name in ("FlowPosterior", "FlowPrior"):
        return getattr(importlib.import_module("fastvae.distributions.flow"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
