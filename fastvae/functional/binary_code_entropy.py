"""Entropies of the codes of a lookup-free quantizer, without the probabilities of all codes for each vector."""

import math

import torch
from torch import Tensor, distributed

from fastvae import _backend
from fastvae.functional._call import apply
from fastvae.functional._checks import check_device, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops import binary_code_entropy as ops


@documented
def binary_code_entropy(
    x: Tensor, inv_temperature: float = 100.0, *, mask: Tensor | None = None, group: "distributed.ProcessGroup | None" = None
) -> tuple[Tensor, Tensor]:
    r"""The two entropies by which a lookup-free quantizer learns (Yu et al., *Language Model Beats Diffusion: Tokenizer Is Key to Visual
    Generation*, 2023): of each vector's distribution over the codes, and of the mean distribution. Both are exact, in nats.

    .. math:: p(c \mid x) = \frac{e^{2 \tau\, x \cdot c}}{\sum_{c'} e^{2 \tau\, x \cdot c'}}, \quad c \in \{-1, 1\}^D, \qquad
        \mathrm{H}\big[p(\cdot \mid x_n)\big] \quad\text{and}\quad \mathrm{H}\Big[\tfrac{1}{N} \sum_n p(\cdot \mid x_n)\Big]

    The bits are independent given :math:`x`, each 1 with probability :math:`\sigma(4 \tau x_d)`. So the first entropy is a sum of :math:`D`
    binary ones, and the mean distribution is one product :math:`A^\top B / N`, where :math:`A` and :math:`B` hold the probabilities of the
    first and of the last half of the bits, :math:`N \times 2^{D/2}`. The :math:`N \times 2^D` probabilities are never made; the backward
    pass is two products more, and keeps ``x`` and two numbers a code.

    Args:
        x: :math:`x`, ``(..., D)`` with :math:`1 \le D \le 24`; float32, bfloat16, float16 or float64. An infinite value is a bit that is
            certain, and has a gradient of 0. A vector with NaN makes its own entropy NaN and that of the mean.
        inv_temperature: :math:`\tau`; for codes in :math:`\{-s, s\}^D` :math:`s` times as much.
        mask: bool, the shape of ``x`` without its last dimension: ``False`` leaves a vector out, whatever it holds; its entropy is 0.
        group: a process group of ``torch.distributed``, such as ``torch.distributed.group.WORLD``: the mean is that of the vectors of all
            its processes, each of which has to make the call and to run its backward pass, with as few vectors as it likes. The gradient
            is that of the sum of all processes' losses, which ``DistributedDataParallel`` divides by their number.

    Returns:
        ``(per_sample, codebook)``: the entropies of the vectors, in the shape of ``x`` without its last dimension, and that of the mean
        distribution, a scalar, which is 0 where there are no vectors. In float32 (float64 for float64), also under autocast.

    Raises:
        $errors
    """
    _check(x, inv_temperature, mask, group)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    row_mask = None if mask is None else mask.reshape(rows.shape[0])
    backend = _backend.resolve("binary_code_entropy_forward", x.device, x.dtype)
    entropy, code_sums = apply(ops.BinaryCodeEntropy, ops.ForwardArguments(rows, row_mask, float(inv_temperature)), backend)
    return entropy.view(x.shape[:-1]), ops.entropy_of_mean(code_sums, rows.shape[0], row_mask, group)


def _check(x: Tensor, inv_temperature: float, mask: Tensor | None, group: "distributed.ProcessGroup | None") -> None:
    check_tensor("x", x)
    if x.ndim == 0 or not 1 <= x.shape[-1] <= ops.MAX_DIM:
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, takes (..., D) with 1 <= D <= {ops.MAX_DIM}: a number is kept for each of 2^D codes"
        )
    if isinstance(inv_temperature, bool) or not isinstance(inv_temperature, int | float) or not 0 <= inv_temperature < math.inf:
        raise ValueError(f"inv_temperature: got {inv_temperature!r}, takes a finite number >= 0")
    if mask is not None:
        check_tensor("mask", mask, (torch.bool,))
        check_device("mask", mask, "x", x)
        check_shape("mask", mask, x.shape[:-1], "the shape of x without its last dimension")
    if group is not None and not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
        raise TypeError(f"group: got {type(group).__name__}, takes a process group of torch.distributed, or None")
