"""The semi-supervised VAE, M2 (Kingma et al., *Semi-supervised Learning with Deep Generative Models*, 2014)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae._pytree import exportable
from fastvae._types import Conditioning, LayerActivation
from fastvae.distributions.divergence import sample_with_kl
from fastvae.distributions.likelihood import Likelihood
from fastvae.functional._checks import check_nonnegative
from fastvae.models import _networks
from fastvae.models._inputs import as_float
from fastvae.models._reading import reading
from fastvae.models._recipe import ready_made
from fastvae.models.conditional import CVAE
from fastvae.nn.conditioning import call_at
from fastvae.nn.conditions import ClassCondition
from fastvae.distributions.normal import widened

AnyM2 = TypeVar("AnyM2", bound="SemiSupervisedVAE")

# The label of a sample whose class is not known.
UNLABELLED = -1


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
        -L(x, y) &= -\mathbb{E}_{q(z|x, y)} \log p(x|z, y) + \beta\, KL(q(z|x, y) \| p(z)) - \log p(y) \\
        -U(x) &= \sum_y q(y|x)\, (-L(x, y)) - H(q(y|x))

    A labelled sample has the loss :math:`-L(x, y) - \alpha \log q(y|x)`, one without a label :math:`-U(x)`; classes are equally probable
    a priori. A batch has both kinds: the label of a sample that has none is -1. Every sample goes through encoder and decoder at all
    classes, as one batch, so that a step does not depend on how many are labelled.

    Args:
        encoder, decoder: see :class:`~fastvae.models.CVAE`.
        classifier: gives the logits of the classes for ``x``, ``(batch, num_classes)``.
        condition: embeds the classes.
        latent_shape: shape of one ``z``, an integer for a vector.
        alpha: :math:`\alpha`; the paper has 0.1 times the number of samples in the training set.
        options: ``prior``, ``posterior``, ``likelihood``, ``beta`` and ``capacity``, see :class:`~fastvae.models.VAE`.
    """

    condition: ClassCondition

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        classifier: nn.Module,
        condition: ClassCondition,
        latent_shape: int | Sequence[int] | None = None,
        *,
        alpha: float = 100.0,
        **options,
    ):
        super().__init__(encoder, decoder, condition, latent_shape, **options)
        self.classifier = classifier
        self.alpha = check_nonnegative("alpha", alpha)

    def class_logits(self, x: Tensor) -> Tensor:
        """log q(y | x) up to a constant of each sample, ``(batch, num_classes)``."""
        return self.classifier(as_float(x, self.classifier))

    @reading
    def classify(self, x: Tensor) -> Tensor:
        """The most probable class of each sample, int64, ``(batch,)``."""
        return self.class_logits(x).argmax(1)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        y: Tensor | None = None,
        eps: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | int | None = None,
    ) -> SemiSupervisedOutput:
        num_classes = self.condition.num_classes
        y = self._labels(x, y)
        labelled = (y != UNLABELLED).unsqueeze(1)
        logits = self.class_logits(x)
        log_q = widened(logits).log_softmax(1)
        one_hot = F.one_hot(y.clamp_min(0), num_classes).to(log_q.dtype)
        weights = torch.where(labelled, one_hot, log_q.exp())

        # All samples at the first class, then all at the second one.
        copies = x.repeat(num_classes, *(1,) * (x.ndim - 1))
        condition = self.condition(torch.arange(num_classes, device=x.device).repeat_interleave(len(x)))
        q = self._posterior_at(copies, condition)
        noise: dict[str, Any] = {"eps": None if eps is None else eps.flatten(0, 1), "generator": generator, "seed": seed}
        z, kl = sample_with_kl(q, self._prior_at(q, condition), reduction="sample", **noise)
        recon = call_at(self.decoder, z, condition)
        nll = self.likelihood(recon, copies, reduction="sample")
        def expected(values: Tensor) -> Tensor:
            return (weights * values.unflatten(0, (num_classes, -1)).T).sum(1).mean()
        recon_loss, kl = expected(nll), expected(kl)
        class_kl = math.log(num_classes) + torch.where(labelled, 0.0, weights * log_q).sum(1).mean()
        ce = -(labelled * one_hot * log_q).sum(1).mean()
        loss = recon_loss + self.kl_penalty(kl) + class_kl + self.alpha * ce
        hits = labelled[:, 0] & (logits.argmax(1) == y)
        accuracy = hits.sum() / labelled.sum().clamp_min(1)
        chosen = weights.argmax(1) * len(x) + torch.arange(len(x), device=x.device)
        return SemiSupervisedOutput(loss, recon_loss, kl, class_kl, ce, accuracy, recon[chosen], z[chosen], q.mu[chosen], q.logvar[chosen], logits)

    def _labels(self, x, y):
        return y if y is not None else torch.full((len(x),), UNLABELLED, device=x.device)
