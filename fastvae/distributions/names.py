"""The likelihoods that have names."""

from collections.abc import Callable, Mapping
from typing import Any

from fastvae._types import Likelihood as LikelihoodName
from fastvae._types import check_choice
from fastvae.distributions.bernoulli import BernoulliLikelihood, BernoulliProbsLikelihood
from fastvae.distributions.gaussian import GaussianLikelihood
from fastvae.distributions.likelihood import Likelihood

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli_logits": BernoulliLikelihood,
    "bernoulli": BernoulliProbsLikelihood,
    "gaussian": GaussianLikelihood,
}


def likelihood_of(likelihood: LikelihoodName | Likelihood) -> Likelihood:
    """The likelihood of a name; a likelihood as it is."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if not isinstance(likelihood, str):
        raise TypeError(f"likelihood: got {type(likelihood).__name__}, takes a Likelihood of fastvae.distributions or a name")
    check_choice("likelihood", likelihood, LIKELIHOODS)
    return LIKELIHOODS[likelihood]()


def decoder_channels(channels: int, options: Mapping[str, Any]) -> int:
    """The size of dimension 1 of what a decoder gives for data of so many channels, by the option ``likelihood`` of a model.

    It takes the options as one argument: from calls with ``**options`` the command line reads which options there are.
    """
    return likelihood_of(options.get("likelihood", "bernoulli_logits")).parameters_for(channels)
