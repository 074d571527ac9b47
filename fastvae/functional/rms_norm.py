"""RMS normalisation and its activation in one operator, for training."""

from torch import Tensor

from fastvae import _backend
from fastvae._types import EpsMode, NormActivation, check_choice
from fastvae.functional._call import apply
from fastvae.functional._checks import check_channel_parameter, check_eps, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops.group_norm import NORM_ACTIVATIONS
from fastvae.ops.rms_norm import EPS_MODES, ForwardArguments, RMSNorm, modulated


@documented
def rms_norm_silu(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    dim: int = 1,
    activation: NormActivation = "silu",
    eps_mode: EpsMode = "add",
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    r"""Root mean square normalisation of the channels of each position (Zhang and Sennrich, *Root Mean Square Layer Normalization*, 2019)
    followed by an activation, SiLU by default, in one operator.

    .. math:: y = a(u), \qquad u = \left(\gamma_c \frac{x_c}{r} + \beta_c\right) (1 + s_{nc}) + t_{nc}, \qquad
        r = \sqrt{\tfrac{1}{C} \sum_c x_c^2 + \epsilon} \quad\text{or}\quad \max(\lVert x \rVert_2, \epsilon) / \sqrt{C}

    The norms of video autoencoders: the second form of :math:`r` (``eps_mode="clamp"``) with :math:`\gamma` is that of Wan, Qwen-Image and
    HunyuanVideo 1.5, ``F.normalize(x) * sqrt(C) * gamma``; the first one without parameters is the pixel norm (Karras et al., *Progressive
    Growing of GANs*, 2017), with ``scale`` and ``shift`` that of LTX. For the backward pass ``input`` and one number a position are kept.

    Args:
        input: :math:`x`; float32, bfloat16, float16 or float64. Contiguous or with the channels last (``torch.channels_last``,
            ``torch.channels_last_3d``, or ``dim=-1`` of a contiguous tensor) it is used as it lies in memory; other strides cost a copy.
        weight, bias: :math:`\gamma` and :math:`\beta`, ``(channels,)``, in the dtype of ``input`` or in float32; 1 and 0 by default.
        eps: :math:`\epsilon`.
        dim: the dimension of the channels. Dimension 0 is the batch.
        activation: :math:`a`, that of :func:`group_norm_silu`: ``"silu"``, ``"relu"``, ``"gelu"``, or ``"none"`` for the normalisation
            alone.
        eps_mode: ``"add"``, or ``"clamp"``, where a position whose norm is at most :math:`\epsilon` is divided by a constant.
        scale, shift: :math:`s` and :math:`t`, ``(batch, channels)``, which dimensions of size 1 may follow; dtypes as of ``weight``; 0 by
            default.

    Returns:
        :math:`y` (:math:`u` without activation), in the dtype and the memory layout of ``input``, also under autocast. Arithmetic is in
        float32 (float64 for float64).

    Raises:
        $errors
    """
    check_tensor("input", input)
    moved = input.movedim(_checked_dim(dim, input), 1)
    check_choice("eps_mode", eps_mode, EPS_MODES)
    check_choice("activation", activation, NORM_ACTIVATIONS)
    eps = check_eps(eps)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_channel_parameter(name, value, input)
            check_shape(name, value, (moved.shape[1],), "one value a channel")
    scale, shift = (_of_samples(name, value, moved) for name, value in (("scale", scale), ("shift", shift)))
    parameters = modulated(moved, weight, bias, scale, shift)
    arguments = ForwardArguments(moved, *parameters, eps, EPS_MODES[eps_mode], NORM_ACTIVATIONS[activation])
    output = apply(RMSNorm, arguments, _backend.resolve("rms_norm_forward", input.device, input.dtype))[0]
    return output if dim == 1 else output.movedim(1, dim)


def _checked_dim(dim: int, input: Tensor) -> int:
    takes = f"takes 1 to {input.ndim - 1} or -1 to {1 - input.ndim}"
    if input.ndim < 2:
        raise ValueError(f"input: got shape {tuple(input.shape)}, takes (batch, channels, ...)")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -input.ndim < dim < input.ndim or dim == 0:
        raise ValueError(f"dim: got {dim!r} for an input of {input.ndim} dimensions, {takes}")
    return dim


def _of_samples(name: str, value: Tensor | None, moved: Tensor) -> Tensor | None:
    """``value`` as ``(batch, channels)``."""
    if value is None:
        return None
    check_channel_parameter(name, value, moved)
    if value.ndim < 2 or any(size != 1 for size in value.shape[2:]):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, takes (batch, channels), which dimensions of size 1 may follow")
    check_shape(name, value, (*moved.shape[:2], *value.shape[2:]), "one value a channel of each sample")
    return value.reshape(moved.shape[:2])
