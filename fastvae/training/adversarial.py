"""The contract of a network with a part that has a loss of its own, such as the discriminator of FactorVAE.

The network's output has a second loss beside ``loss``, a number named ``discriminator_loss``, and the network has a method
``parameter_groups()``. The gradients of a step are those of ``loss + discriminator_loss``, so each loss has to keep off the weights of the
other: ``loss`` calls the discriminator by :func:`fastvae.models._adversarial.with_fixed_weights`, and ``discriminator_loss`` judges
detached tensors. In a loop without Lightning two optimizers and two backward passes then do the same.

``parameter_groups()`` gives the groups of a torch optimizer, mappings of ``params`` and options, which hold each weight once. A group has
the options of :class:`~fastvae.training.module.LitAutoencoder` but for those it names itself, ``lr`` or ``betas``.

One optimizer with a group for each part does what one optimizer for each would do: its steps are taken weight by weight, and
:func:`clip_by_group` clips each group by itself. Lightning's optimization by hand, for several optimizers, would do less: it refuses
``accumulate_grad_batches`` and ``gradient_clip_val``, counts two steps a batch, lets the loss scale change between the two, and expects
DistributedDataParallel to survive a backward pass in which half of the weights have no gradient.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from fastvae.training.errors import TrainingError

Groups = Iterable[nn.Parameter] | list[dict[str, Any]]


def total_loss(output: Any) -> Tensor:
    """The sum of the losses of a network's output: the gradient of each is that of the weights it is for."""
    adversary = getattr(output, "discriminator_loss", None)
    return output.loss if adversary is None else output.loss + adversary


def parameter_groups(network: nn.Module) -> Groups:
    """The groups that a network asks for, or all of its weights.

    Raises:
        TrainingError: where the groups leave weights out, which would stay as they are without a word.
    """
    groups = getattr(network, "parameter_groups", None)
    if groups is None:
        return network.parameters()
    found: list[dict[str, Any]] = [{**group, "params": list(group["params"])} for group in groups()]
    grouped = {parameter for group in found for parameter in group["params"]}
    if missing := [name for name, parameter in network.named_parameters() if parameter not in grouped]:
        raise TrainingError(f"parameter_groups: of {type(network).__name__} leave out {', '.join(missing)}, take each weight once")
    return found


def clip_by_group(optimizer: torch.optim.Optimizer, value: float, algorithm: Literal["norm", "value"]) -> None:
    """Clips the gradients of each group by themselves, so that a large gradient of one does not shorten the step of another."""
    clip = clip_grad_value_ if algorithm == "value" else clip_grad_norm_
    for group in optimizer.param_groups:
        clip(group["params"], value)
