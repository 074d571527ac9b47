"""The terms that a classifier adds to the bound of a semi-supervised VAE."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae._pytree import exportable
from fastvae.distributions.normal import widened

# The label of a sample whose class is not known.
UNLABELLED = -1


@exportable
class ClassTerms(NamedTuple):
    """The terms of a loss that come from the classifier.

    ``weights``, ``(batch, num_classes)``, are q(y | x), or 1 at the label of a labelled sample and 0 elsewhere.
    """

    weights: Tensor
    class_kl: Tensor
    classification_loss: Tensor
    accuracy: Tensor


def class_terms(logits: Tensor, labels: Tensor) -> ClassTerms:
    """The terms of a batch: the classifier's ``logits``, ``(batch, num_classes)``, and ``labels``, ``(batch,)``."""
    log_q, labelled = widened(logits).log_softmax(1), labels != UNLABELLED
    one_hot = F.one_hot(labels.clamp_min(0), logits.shape[1]).to(log_q.dtype)
    weights = torch.where(labelled[:, None], one_hot, log_q.exp())
    # A label leaves no entropy.
    entropy = torch.where(labelled, 0.0, -(log_q.exp() * log_q).sum(1))
    hits = labelled & (logits.argmax(1) == labels)
    return ClassTerms(
        weights,
        math.log(logits.shape[1]) - entropy.mean(),
        torch.where(labelled, -(one_hot * log_q).sum(1), 0.0).mean(),
        hits.sum() / labelled.sum().clamp_min(1),
    )
