"""The derivatives of the activations behind the normalisations, in plain PyTorch."""

import math

import torch
from torch import Tensor

from fastvae.ops.group_norm import NORM_ACTIVATIONS


def differentiated(grad_output: Tensor, u: Tensor, activation: int) -> Tensor:
    """act'(u) * grad_output, the gradient with respect to u."""
    if activation == NORM_ACTIVATIONS["silu"]:
        sigmoid = torch.sigmoid(u)
        return grad_output * sigmoid * (1.0 + u * (1.0 - sigmoid))
    if activation == NORM_ACTIVATIONS["relu"]:
        return torch.where(u <= 0.0, 0.0, grad_output)
    if activation == NORM_ACTIVATIONS["gelu"]:
        density = torch.exp(-0.5 * u.square()) / math.sqrt(2.0 * math.pi)
        # torch.special.ndtr is 1 + erf, which cancels.
        distribution = 0.5 * torch.erfc(-math.sqrt(0.5) * u)
        return grad_output * (distribution + u * density)
    return grad_output
