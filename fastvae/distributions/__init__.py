"""Distributions of data given a latent code, as modules: the exchangeable parts of a VAE."""

from fastvae.distributions.bernoulli import BernoulliLikelihood, BernoulliProbsLikelihood
from fastvae.distributions.likelihood import Likelihood

__all__ = ["BernoulliLikelihood", "BernoulliProbsLikelihood", "Likelihood"]
