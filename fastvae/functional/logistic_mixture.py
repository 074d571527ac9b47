"""The negative log-likelihood of 8-bit images under a mixture of discretized logistics."""

import torch
from torch import Tensor

from fastvae import _backend
from fastvae._backend import FLOATS
from fastvae._types import Reduction
from fastvae.functional._call import apply, writes_gradient
from fastvae.functional._checks import check_device, check_scale, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops._results import reduction_number
from fastvae.ops.logistic_mixture import ForwardArguments, LogisticMixture, parameters_per_position


@documented
def logistic_mixture_nll(
    input: Tensor, target: Tensor, num_mixtures: int = 10, reduction: Reduction = "batchmean", *, grad_scale: float = 1.0
) -> Tensor:
    r"""Negative log-likelihood of 8-bit images under a mixture of discretized logistics, in nats (Salimans et al., *PixelCNN++*, 2017).

    .. math:: -\log \sum_m \pi_m \prod_c \left[ \sigma\!\left( \frac{x_c + 1/255 - \mu_{mc}}{s_{mc}} \right)
              - \sigma\!\left( \frac{x_c - 1/255 - \mu_{mc}}{s_{mc}} \right) \right],
              \qquad \mu_{mc} = \mathrm{mean}_{mc} + \sum_{d < c} \tanh(\mathrm{coefficient}_{mcd})\, x_d

    for the value :math:`x_c` of channel c, scaled to [-1, 1]. The lowest bin is open below and the highest above, so that the 256
    probabilities sum to 1. Their logarithms are computed without cancellation, however narrow a bin is beside the scale.

    With M = ``num_mixtures`` and C channels, the parameters of a position lie on dimension 1 in this order:

    ===============  ===============  ==============================================================================
    part             numbers          entry
    ===============  ===============  ==============================================================================
    logits           M, 0 if M = 1    of :math:`\pi` (softmax)
    means            C M              c M + m
    log scales       C M              c M + m; those below -7 count as -7 and have no gradient
    coefficients     C (C - 1) / 2 M  (c (c - 1) / 2 + d) M + m, of channel c on channel d < c; tanh is applied to them
    ===============  ===============  ==============================================================================

    That is 10 M for RGB images and 3 M for grey ones. A single component has no logit, so ``num_mixtures=1`` is the plain discretized
    logistic, from 2 parameters for grey images. One whose C channels are independent is that of grey images of C times the positions:
    ``logistic_mixture_nll(input.unflatten(1, (2, C)), target.unsqueeze(1), 1)``.

    Args:
        input: the parameters, ``(batch, parameters, ...)``; float32, bfloat16, float16 or float64. A copy is made where it is not
            contiguous.
        target: the image, ``(batch, C, ...)``: uint8, or a floating dtype with values in [0, 1], which are rounded to the nearest of the
            256 levels value / 255. It has no gradient.
        num_mixtures: M, the number of components.
        reduction: ``"none"`` one value a position, ``(batch, ...)``, ``"sample"`` sum over all but the batch dimension, ``"batchmean"``
            mean of those (nats per sample), ``"sum"``, or ``"mean"`` over positions.
        $grad_scale

    Returns:
        The loss; for ``"none"`` in the dtype of ``input``, else in float32 (float64 for float64). 0 for an empty batch.

    Raises:
        $errors
    """
    check_tensor("input", input)
    check_tensor("target", target, (*FLOATS, torch.uint8))
    check_device("target", target, "input", input)
    if isinstance(num_mixtures, bool) or not isinstance(num_mixtures, int) or num_mixtures < 1:
        raise ValueError(f"num_mixtures: got {num_mixtures!r}, takes a positive integer")
    _check_shapes(input, target, num_mixtures)
    if target.requires_grad:
        raise ValueError("target: got a tensor that requires grad, takes one that does not: the loss is constant between levels")
    number, scale = reduction_number(reduction), check_scale(grad_scale)
    with_grad = input.requires_grad and writes_gradient([input], reduction, scale)
    arguments = ForwardArguments(input, target, num_mixtures, number, scale, with_grad)
    return apply(LogisticMixture, arguments, _backend.resolve("logistic_mixture_forward", input.device, input.dtype))[0]


def _check_shapes(input: Tensor, target: Tensor, num_mixtures: int) -> None:
    if target.ndim < 2 or target.shape[1] < 1:
        raise ValueError(f"target: got shape {tuple(target.shape)}, takes (batch, channels, ...)")
    channels = target.shape[1]
    shape = (target.shape[0], parameters_per_position(num_mixtures, channels), *target.shape[2:])
    if input.shape != shape:
        what = f"{num_mixtures} components of {channels} channels"
        raise ValueError(f"input: got shape {tuple(input.shape)}, takes {shape}, the parameters of {what} for each position of target")
