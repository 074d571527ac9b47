"""Mixtures of discretized logistics for 8-bit images, and their gradient."""

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, compiled, forced, forward_backward
from fastvae import functional as FV

MIXTURES = 10
LOG_HALF_RANGE = 4.848116364598481  # log(255 / 2)


def make_inputs(size, dtype, device) -> Inputs:
    batch, _, *positions = size
    # Scales and distances so moderate that the difference of two sigmoids, in which PixelCNN++'s form cancels, keeps four digits.
    input = torch.rand(size, dtype=dtype, device=device).sub_(0.5).requires_grad_()
    return Inputs({"input": input}, {"target": torch.randint(256, (batch, 3, *positions), dtype=torch.uint8, device=device)})


def bytes_moved(inputs: Inputs) -> int:
    """Input and target are read, the gradient of the input is written."""
    return 2 * inputs.leaves["input"].nbytes + inputs.others["target"].nbytes


def pixelcnnpp(input, target):
    """The formula of PixelCNN++'s ports to PyTorch, with the channels as its second dimension and its parameters in fastvae's order."""
    x = (target.to(input.dtype) * (2.0 / 255.0) - 1.0).unsqueeze(2)
    logits, means, log_scales, coefficients = input.split([MIXTURES, 3 * MIXTURES, 3 * MIXTURES, 3 * MIXTURES], 1)
    means, log_scales, coefficients = (t.unflatten(1, (3, MIXTURES)) for t in (means, log_scales, coefficients))
    log_scales, coefficients = log_scales.clamp(min=-7.0), torch.tanh(coefficients)
    green = means[:, 1] + coefficients[:, 0] * x[:, 0]
    blue = means[:, 2] + coefficients[:, 1] * x[:, 0] + coefficients[:, 2] * x[:, 1]
    centered = x - torch.stack((means[:, 0], green, blue), 1)
    inverse = torch.exp(-log_scales)
    above, below, middle = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255), inverse * centered
    difference = torch.sigmoid(above) - torch.sigmoid(below)
    density = middle - log_scales - 2.0 * F.softplus(middle) - LOG_HALF_RANGE
    inner = torch.where(difference > 1e-5, torch.log(difference.clamp(min=1e-12)), density)
    log_probability = torch.where(x < -0.999, above - F.softplus(above), torch.where(x > 0.999, -F.softplus(below), inner))
    return -torch.logsumexp(log_probability.sum(1) + F.log_softmax(logits, 1), 1).sum() / len(target)


def fused(input, target):
    return FV.logistic_mixture_nll(input, target, MIXTURES)


def _case(size, quick=False, dtype=torch.float32) -> Case:
    return Case(
        family="logistic_mixture",
        name="logistic_mixture_nll",
        size=size,
        tiny=(2, 10 * MIXTURES, 3, 5),
        setup=make_inputs,
        providers={
            "eager": forward_backward(pixelcnnpp),
            "compile": compiled(pixelcnnpp),
            "fastvae": forward_backward(fused),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
        },
        outputs=("loss",),
        work=bytes_moved,
        dtype=dtype,
        quick=quick,
    )


CASES = (_case((32, 100, 32, 32)), _case((16, 100, 64, 64)), _case((4, 100, 32, 32), quick=True))
