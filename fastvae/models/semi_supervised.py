"""The semi-supervised VAE, M2 (Kingma et al., *Semi-supervised Learning with Deep Generative Models*, 2014)."""

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import Likelihood as LikelihoodName
from fastvae.distributions.divergence import sample_with_kl
from fastvae.distributions.likelihood import Likelihood
from fastvae.distributions.posterior import Posterior
from fastvae.distributions.prior import Prior
from fastvae.functional._checks import check_nonnegative
from fastvae.models._class_terms import UNLABELLED, class_terms
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models.conditional import CVAE
from fastvae.nn.conditioning import call_at
from fastvae.nn.conditions import ClassCondition, ConditionEmbedding, repeat_rows
from fastvae.nn.schedules import Schedule


@exportable
class SemiSupervisedOutput(NamedTuple):
    """The terms of the loss in nats per sample, and the tensors behind them.

    ``class_kl`` is the KL of the classes to their prior; ``classification_loss`` is the cross-entropy of the labelled samples, summed and
    divided by the batch's size; ``accuracy`` is the share of the labelled samples that are classified right, 0 where there are none.
    ``recon``, ``z``, ``mu`` and ``logvar`` are those of each sample's label or most probable class; ``logits`` are the classifier's.
    """

    loss: Tensor
    recon_loss: Tensor
    kl: Tensor
    class_kl: Tensor
    classification_loss: Tensor
    accuracy: Tensor
    recon: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor
    logits: Tensor


class SemiSupervisedVAE(CVAE):
    r"""A conditional VAE of classes with a classifier q(y | x), which learns from samples with and without a label.

    .. math::
        L(x, y) &= -\mathbb{E}_{q(z|x, y)} \log p(x|z, y) + \beta\, KL(q(z|x, y) \| p(z|y)) - \log p(y) \\
        U(x) &= \sum_y q(y|x)\, L(x, y) - H(q(y|x))

    A sample with a label has the loss :math:`L(x, y) - \alpha \log q(y|x)`, one without :math:`U(x)`; the classes are equally probable a
    priori. The label -1 means that the sample has none. Every sample goes through encoder and decoder at all classes, as one batch, so a
    step does not depend on how many have a label.

    The methods that read a sample take the classifier's class where there is no label.

    Args:
        encoder, decoder, latent_shape, prior, posterior, likelihood, beta, capacity: see :class:`~fastvae.models.CVAE`.
        condition: embeds the classes.
        classifier: gives the logits of the classes for x, ``(batch, num_classes)``.
        alpha: :math:`\alpha`; in the paper 0.1 times the number of samples of the training set.
    """

    # A training may hide labels.
    takes_unlabelled: ClassVar[bool] = True

    condition: ClassCondition

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        condition: ClassCondition,
        latent_shape: int | Sequence[int] | None = None,
        *,
        classifier: nn.Module,
        alpha: float = 100.0,
        prior: Prior | None = None,
        posterior: Posterior | None = None,
        likelihood: LikelihoodName | Likelihood = "bernoulli_logits",
        beta: float | Schedule = 1.0,
        capacity: float | Schedule | None = None,
    ):
        parts: dict[str, Any] = {"prior": prior, "posterior": posterior, "likelihood": likelihood}
        super().__init__(encoder, decoder, _classes(condition), latent_shape, beta=beta, capacity=capacity, **parts)
        self.classifier = classifier
        self.alpha = check_nonnegative("alpha", alpha)

    @classmethod
    def _parts_of_condition(cls, encoder: nn.Sequential, condition: ConditionEmbedding) -> dict[str, nn.Module]:
        """The classifier, which has the encoder's architecture."""
        return {"classifier": with_outputs(encoder, _classes(condition).num_classes)}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha}"

    def class_logits(self, x: Tensor) -> Tensor:
        """log q(y | x) of each class up to a constant, ``(batch, num_classes)``."""
        return self.classifier(as_float(x, self.classifier))

    @reading
    def classify(self, x: Tensor) -> Tensor:
        """The most probable class of each sample, int64, ``(batch,)``."""
        return self.class_logits(x).argmax(1)

    def completed(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The labels, and the classifier's classes where there are none."""
        labels = self._labels(x, y)
        return torch.where(labels == UNLABELLED, self.classify(x), labels)

    def _labels(self, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None:
            return torch.full((len(x),), UNLABELLED, device=x.device)
        self.condition.check_classes(y, least=UNLABELLED)
        if len(y) != len(x):
            raise ValueError(f"y: got {len(y)} labels, takes one for each of {len(x)} samples")
        return y

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        y: Tensor | None = None,
        eps: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | int | None = None,
    ) -> SemiSupervisedOutput:
        """The loss of a batch.

        Args:
            x: data, ``(batch, ...)``; floating, or uint8, which means value / 255.
            y: int64, ``(batch,)``, -1 for a sample without a label; None where none has one.
            eps: the noise, ``(num_classes, batch, *latent_shape)``; drawn where it is not given, by ``generator`` or ``seed``.
        """
        labels, logits = self._labels(x, y), self.class_logits(x)
        weights, class_kl, classification_loss, accuracy = class_terms(logits, labels)

        # All samples at the first class, then all at the second one, and so on.
        count = self.condition.num_classes
        condition = self.condition(torch.arange(count, device=x.device).repeat_interleave(len(x)))
        copies = repeat_rows(x, count)
        q = self._posterior_at(copies, condition)
        noise: dict[str, Any] = {"eps": None if eps is None else eps.flatten(0, 1), "generator": generator, "seed": seed}
        z, kls = sample_with_kl(q, self._prior_at(q, condition), reduction="sample", **noise)
        recon = call_at(self.decoder, z, condition)
        recon_losses = self.likelihood(recon, copies, reduction="sample")

        recon_loss, kl = ((weights * losses.view(count, -1).T).sum(1).mean() for losses in (recon_losses, kls))
        loss = recon_loss + self.kl_penalty(kl) + class_kl + self.alpha * classification_loss
        chosen = weights.argmax(1) * len(x) + torch.arange(len(x), device=x.device)
        recon, z, mu, logvar = (tensor[chosen] for tensor in (recon, z, q.mu, q.logvar))
        return SemiSupervisedOutput(loss, recon_loss, kl, class_kl, classification_loss, accuracy, recon, z, mu, logvar, logits)

    @reading
    def sample(self, n: int, y: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The means of p(x | z, y) for ``n`` draws of z from the prior, at classes that are drawn too where y is None; see
        :meth:`fastvae.models.CVAE.sample`."""
        if y is None:
            device = next(self.parameters()).device
            source = device if generator is None else generator.device
            y = torch.randint(self.condition.num_classes, (n,), generator=generator, device=source).to(device)
        return super().sample(n, y, generator)

    @reading
    def log_prob_bound(
        self,
        x: Tensor,
        num_samples: int = 1,
        *,
        y: Tensor | None = None,
        samples_at_once: int = 50,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The importance-weighted lower bound on log p(x | y) of each sample in nats, ``(batch,)``; on log p(x), by the sum over all
        classes, where y is None."""
        options: dict[str, Any] = {"samples_at_once": samples_at_once, "generator": generator}
        if y is not None:
            return super().log_prob_bound(x, num_samples, y=y, **options)
        count = self.condition.num_classes
        classes = torch.arange(count, device=x.device).repeat_interleave(len(x))
        bounds = super().log_prob_bound(repeat_rows(x, count), num_samples, y=classes, **options)
        return torch.logsumexp(bounds.view(count, -1), 0) - math.log(count)


def _classes(condition: nn.Module) -> ClassCondition:
    if not isinstance(condition, ClassCondition):
        raise TypeError(f"condition: got {type(condition).__name__}, takes a ClassCondition, over whose classes the bound is a sum")
    return condition


def with_outputs(network: nn.Sequential, outputs: int) -> nn.Sequential:
    """A copy of a network whose last linear layer, the end of all of it, gives another number of values."""
    copied = copy.deepcopy(network)
    name, linear = [(name, module) for name, module in copied.named_modules() if isinstance(module, nn.Linear)][-1]
    copied.set_submodule(name, nn.Linear(linear.in_features, outputs))
    return copied
