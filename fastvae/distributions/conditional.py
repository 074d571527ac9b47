"""A prior that depends on a condition (Sohn, Lee and Yan, *Learning Structured Output Representation using Deep Conditional Generative
Models*, 2015)."""

import math
from collections.abc import Sequence

from torch import nn

from fastvae.distributions.normal import DiagonalNormal
from fastvae.distributions.prior import Prior, check_count
from fastvae.nn.conditions import Condition


class ConditionalPrior(Prior):
    """p(z | y) = N(mu(y), diag(exp(logvar(y)))) by a network of one hidden layer over the condition's vector; N(0, I) at first.

    A call takes the embedded conditions of a batch and gives a distribution for each. The KL of a diagonal posterior to it is in closed
    form and fused with sampling.

    Args:
        latent_shape: shape of one z, an integer for a vector.
        condition_dim: size of the condition's vector.
        hidden: units of the hidden layer.
    """

    def __init__(self, latent_shape: int | Sequence[int], condition_dim: int, hidden: int = 64):
        super().__init__(latent_shape)
        last = nn.Linear(check_count("hidden", hidden), 2 * math.prod(self.latent_shape))
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(check_count("condition_dim", condition_dim), hidden), nn.SiLU(), last)

    def forward(self, condition: Condition) -> DiagonalNormal:
        mu, logvar = self.network(condition.vector).unflatten(1, (2, *self.latent_shape)).unbind(1)
        return DiagonalNormal(mu, logvar)


class PriorAt(Prior):
    """A conditional prior at the conditions of a batch, as a prior of the latent alone.

    Args:
        prior: the conditional prior.
        condition: the embedded conditions.
    """

    def __init__(self, prior: ConditionalPrior, condition: Condition):
        super().__init__(prior.latent_shape)
        self.prior, self.condition = prior, condition

    def forward(self, encode: object = None) -> DiagonalNormal:
        return self.prior(self.condition)
