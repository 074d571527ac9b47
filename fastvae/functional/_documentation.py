r"""The documentation of arguments that several public functions and modules share, written once.

A docstring names an entry on a line of its own, ``$reduction``, and :func:`documented` puts the entry there, so that ``help`` of each
function is complete in itself.
"""

import re
import textwrap
from typing import Any, TypeVar

T = TypeVar("T", bound=Any)

SHARED = {
    # Losses
    "reduction": r"""
reduction: ``"none"`` elementwise, ``"sample"`` sum over all but the batch dimension, ``"batchmean"`` mean of those (nats per
    sample), ``"sum"``, or ``"mean"`` over elements.
""",
    "bound_reduction": r"""
reduction: ``"batchmean"`` (nats per sample), ``"sum"``, or ``"sample"``, shape ``(batch,)``. Means over elements would weigh pixels
    against latents, so ``"mean"`` is not offered.
""",
    "probability_target": r"""
target: :math:`t` in [0, 1], the shape of ``input``; a floating dtype, or uint8, which means value / 255. As in torch, a target
    outside [0, 1] is not an error. Beside a float64 target the loss is computed in float64.
""",
    "weight": r"""
weight: :math:`w`, broadcast to ``input``; any real dtype, which does not change that of the loss.
""",
    "logvar": r"""
logvar: :math:`\log\sigma^2`: a number, or a tensor that broadcasts to ``input`` by torch's rules, so its shape says what it is of:
    ``()`` of all elements, ``(channels, 1, 1)`` of each channel of an image, ``(channels,)`` only where the channels are the last
    dimension.
""",
    "grad_scale": r"""
grad_scale: the gradient that the backward pass is expected to bring in (a loss scale, or 1 / accumulation steps): the forward pass
    writes so many times the gradient. The loss is not scaled, and the result is right whatever comes in.
""",
    "loss": r"""
The loss; for ``"none"`` in the dtype that ``input`` and ``target`` promote to (a uint8 target does not count), else in float32
(float64 where either is). The gradient is in the dtype of ``input``. 0 for an empty batch.
""",
    "likelihood": r"""
likelihood: ``"bernoulli_logits"``, ``"bernoulli"`` (probabilities), or ``"gaussian"`` (unit variance).
""",
    # Posteriors
    "posterior": r"""
mu, logvar: mean and log variance, ``(batch, ...)``; float32, bfloat16, float16 or float64, both of one dtype.
""",
    "prior": r"""
prior_mu, prior_logvar: the other Gaussian (both or neither; the default is the standard normal), broadcast to ``mu``, of its dtype.
""",
    "num_samples": r"""
num_samples: draws so many samples of each element; ``z`` then has the shape ``(num_samples, *mu.shape)``.
""",
    "noise": r"""
eps: the noise, in the shape of ``z``; nothing is drawn then.
generator: the generator that the seed is drawn from, on the device of ``mu`` or on the CPU; by default torch's own, so
    ``torch.manual_seed`` decides.
seed: an integer or a 0-dim int64 tensor on the device of ``mu``: the same seed gives the same noise on every backend and device.
""",
    "logvar_clamp": r"""
logvar_clamp: limits of log variances, outside which their gradients are 0; ``None`` for none.
""",
    "free_bits": r"""
free_bits: nats a dimension that are free: one whose mean KL over the batch is at or below them counts so many for each sample and has
    no gradient (Kingma et al., *Improved Variational Inference with Inverse Autoregressive Flow*, 2016).
""",
    # Codebooks
    "vectors": r"""
x: vectors, ``(..., dim)``; float32, bfloat16, float16 or float64. With several heads ``(heads, ..., dim)``.
""",
    "codebook": r"""
codebook: the codes, ``(codes, dim)``, or ``(heads, codes, dim)``: one codebook a head. Any floating dtype.
""",
    "quantizer_gradient": r"""
gradient: what ``x`` receives from ``quantized``: ``"straight_through"``, its gradient unchanged, or ``"rotation"``, its gradient
    turned and scaled by the rotation that takes ``x`` to its code (Fifty et al., *Restructuring Vector Quantization with the
    Rotation Trick*, 2024).
""",
    # Errors
    "errors": r"""
TypeError, ValueError: for an argument that does not fit, naming it.
""",
}

_ENTRY = re.compile(r"^( *)\$(\w+)$", re.MULTILINE)


def documented(thing: T) -> T:
    """Decorates a function or a class: puts the entries of ``SHARED`` where its docstring names them."""
    # Under python -OO there are no docstrings.
    if thing.__doc__ is not None:
        thing.__doc__ = filled_in(thing.__doc__)
    return thing


def filled_in(docstring: str) -> str:
    """``docstring`` with the entries of ``SHARED`` where it names them."""
    return _ENTRY.sub(lambda entry: textwrap.indent(SHARED[entry[2]].strip("\n"), entry[1]), docstring)
