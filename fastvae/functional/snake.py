"""Snake, the periodic activation of audio autoencoders, in one operator, for training."""

from torch import Tensor

from fastvae import _backend
from fastvae.functional._call import apply
from fastvae.functional._checks import check_channel_parameter, check_eps, check_shape, check_tensor
from fastvae.functional._documentation import documented
from fastvae.ops.snake import ForwardArguments, Snake, gain_of


@documented
def snake(input: Tensor, alpha: Tensor, beta: Tensor | None = None, *, eps: float = 1e-9) -> Tensor:
    r"""Snake (Ziyin et al., *Neural Networks Fail to Learn Periodic Functions and How to Fix It*, 2020) in one operator; with ``beta``,
    SnakeBeta (Lee et al., *BigVGAN*, 2023).

    .. math:: y = x + \frac{\sin^2(\alpha_c x)}{\beta_c + \epsilon}, \qquad \beta = \alpha \text{ by default}

    For the backward pass ``input`` alone is kept; sines and cosines are computed again.

    Args:
        input: :math:`x`, ``(batch, channels, ...)``; float32, bfloat16, float16 or float64. Contiguous or with the channels last it is used
            as it lies in memory; other strides cost a copy.
        alpha: :math:`\alpha`, the frequency in radians, ``(channels,)``, which dimensions of size 1 may surround, in the dtype of ``input``
            or in float32. A network that learns its logarithm gives ``log_alpha.exp()``.
        beta: :math:`\beta`, shape and dtypes as of ``alpha``.
        eps: :math:`\epsilon`.

    Returns:
        :math:`y`, in the dtype and the memory layout of ``input``, also under autocast. Arithmetic is in float32 (float64 for float64).

    Raises:
        $errors
    """
    check_tensor("input", input)
    if input.ndim < 2:
        raise ValueError(f"input: got shape {tuple(input.shape)}, takes (batch, channels, ...)")
    alpha = _of_channels("alpha", alpha, input)
    beta = None if beta is None else _of_channels("beta", beta, input)
    arguments = ForwardArguments(input, alpha, gain_of(input, alpha, beta, check_eps(eps)))
    return apply(Snake, arguments, _backend.resolve("snake_forward", input.device, input.dtype))


def _of_channels(name: str, value, input: Tensor) -> Tensor:
    """``value`` as ``(channels,)``."""
    check_channel_parameter(name, value, input)
    channels = input.shape[1]
    if value.numel() != channels or (channels != 1 and channels not in value.shape):
        check_shape(name, value, (channels,), "one value a channel")
    return value.reshape(channels)
