"""Distributions of data given a latent code, as modules: the exchangeable parts of a VAE."""

from fastvae.distributions.bernoulli import BernoulliLikelihood, BernoulliProbsLikelihood
from fastvae.distributions.categorical import CategoricalLikelihood
from fastvae.distributions.counts import NegativeBinomialLikelihood, ZeroInflatedNegativeBinomialLikelihood
from fastvae.distributions.gaussian import GaussianLikelihood
from fastvae.distributions.laplace import LaplaceLikelihood
from fastvae.distributions.likelihood import Likelihood

__all__ = [
    "BernoulliLikelihood",
    "BernoulliProbsLikelihood",
    "CategoricalLikelihood",
    "GaussianLikelihood",
    "LaplaceLikelihood",
    "Likelihood",
    "NegativeBinomialLikelihood",
    "ZeroInflatedNegativeBinomialLikelihood",
]
