"""Reconstruction losses and their gradients."""

import dataclasses
import math

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, compiled, forced, forward_backward
from fastvae import functional as FV

IMAGES = (32, 3, 256, 256)
DIGITS = (128, 784)


def make_inputs(size, dtype, device) -> Inputs:
    return Inputs({"input": _logits(size, dtype, device)}, {"target": torch.rand(size, dtype=dtype, device=device)})


def make_inputs_uint8(size, dtype, device) -> Inputs:
    target = torch.randint(256, size, dtype=torch.uint8, device=device)
    return Inputs({"input": _logits(size, dtype, device)}, {"target": target})


def make_inputs_nll(size, dtype, device) -> Inputs:
    inputs = make_inputs(size, dtype, device)
    inputs.leaves["logvar"] = torch.randn(size[1], 1, 1, dtype=dtype, device=device, requires_grad=True)
    return inputs


def _logits(size, dtype, device):
    return torch.randn(size, dtype=dtype, device=device).mul_(2).requires_grad_()


def bytes_moved(inputs: Inputs) -> int:
    """Input and target are read, the gradient of the input is written."""
    return 2 * inputs.leaves["input"].nbytes + inputs.others["target"].nbytes


def bce_of_pixels(input, target):
    return F.binary_cross_entropy_with_logits(input, target.float() / 255)


def bce_after_sigmoid(input, target):
    return F.binary_cross_entropy(torch.sigmoid(input), target)


def bce_after_sigmoid_fused(input, target):
    return FV.binary_cross_entropy(torch.sigmoid(input), target)


def gaussian_nll(input, target, logvar):
    losses = 0.5 * (math.log(2 * math.pi) + logvar + (input - target) ** 2 * torch.exp(-logvar))
    return losses.sum() / len(input)


def with_float_target(function):
    """The provider whose target is converted to floating point before the clock runs."""

    def provide(inputs: Inputs):
        target = inputs.others["target"].float() / 255
        return forward_backward(function)(dataclasses.replace(inputs, others={"target": target}))

    return provide


def _case(name, size, eager, fused, *, setup=make_inputs, quick=False, **more_providers) -> Case:
    return Case(
        family="reconstruction",
        name=name,
        size=size,
        tiny=(3, 2, 4, 5) if len(size) == 4 else (3, 14),
        setup=setup,
        providers={
            "eager": forward_backward(eager),
            "compile": compiled(eager),
            "fastvae": forward_backward(fused),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
            **more_providers,
        },
        outputs=("loss",),
        work=bytes_moved,
        quick=quick,
    )


bce, fused_bce = F.binary_cross_entropy_with_logits, FV.binary_cross_entropy_with_logits

CASES = (
    _case("bce_with_logits", IMAGES, bce, fused_bce, quick=True),
    _case(
        "bce_with_logits_uint8",
        IMAGES,
        bce_of_pixels,
        fused_bce,
        setup=make_inputs_uint8,
        **{"fastvae-float": with_float_target(fused_bce)},
    ),
    # The loss from logits replaces both calls; the loss from probabilities is for models that cannot drop the sigmoid.
    _case(
        "bce_after_sigmoid",
        IMAGES,
        bce_after_sigmoid,
        fused_bce,
        **{"fastvae-prob": forward_backward(bce_after_sigmoid_fused)},
    ),
    _case("mse_loss", IMAGES, F.mse_loss, FV.mse_loss),
    _case("gaussian_nll", IMAGES, gaussian_nll, FV.gaussian_nll, setup=make_inputs_nll),
    _case("bce_with_logits", DIGITS, bce, fused_bce, quick=True),
    _case("mse_loss", DIGITS, F.mse_loss, FV.mse_loss, quick=True),
)
