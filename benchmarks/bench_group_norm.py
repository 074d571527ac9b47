"""GroupNorm with its activation between the convolutions of an image model. The inputs have their channels last; the ``-nchw`` providers
take contiguous copies of them, converted before the clock runs."""

import dataclasses

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, Provider, compiled, forced, forward_backward
from fastvae import functional as FV
from fastvae._types import NormActivation


def groups_of(channels: int) -> int:
    """The most groups up to 32, as the models of Stable Diffusion have."""
    return max(groups for groups in range(1, 33) if channels % groups == 0)


def eager_with(function):
    def eager(input, weight, bias):
        return function(F.group_norm(input, groups_of(input.shape[1]), weight, bias))

    return eager


def fused_with(activation: NormActivation):
    def fused(input, weight, bias):
        return FV.group_norm_silu(input, groups_of(input.shape[1]), weight, bias, activation=activation)

    return fused


def make_inputs(size, dtype, device) -> Inputs:
    input, incoming = (torch.randn(size, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = (torch.randn(size[1], dtype=dtype, device=device, requires_grad=True) for _ in range(2))
    return Inputs({"input": input.requires_grad_(), "weight": weight, "bias": bias}, incoming=(incoming,))


def make_relu_inputs(size, dtype, device) -> Inputs:
    """No gradient comes in where the argument of ReLU is 0 to within rounding: there it goes through or not, as rounding decides."""
    inputs = make_inputs(size, dtype, device)
    input, weight, bias = (leaf.detach().double() for leaf in inputs.leaves.values())
    near = F.group_norm(input, groups_of(input.shape[1]), weight, bias).abs() < 1e-4
    inputs.incoming[0].masked_fill_(near, 0.0)
    return inputs


def contiguous(provider: Provider) -> Provider:
    """The provider on contiguous inputs."""

    def provide(inputs: Inputs):
        inputs.leaves["input"] = inputs.leaves["input"].detach().contiguous().requires_grad_()
        return provider(dataclasses.replace(inputs, incoming=(inputs.incoming[0].contiguous(),)))

    return provide


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads the input twice and writes the output; backward reads the input and a gradient twice and writes one."""
    return 8 * inputs.leaves["input"].nbytes


def _case(size, dtype=torch.bfloat16, quick=False, activation: NormActivation = "silu", setup=make_inputs) -> Case:
    eager, fused = eager_with(getattr(F, activation)), fused_with(activation)
    return Case(
        family="group_norm",
        name=f"group_norm_{activation}",
        size=size,
        tiny=(2, 6, 5, 3),
        dtype=dtype,
        setup=setup,
        providers={
            "eager": forward_backward(eager),
            "eager-nchw": contiguous(forward_backward(eager)),
            "compile": compiled(eager),
            "compile-nchw": contiguous(compiled(eager)),
            "fastvae": forward_backward(fused),
            "fastvae-nchw": contiguous(forward_backward(fused)),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
            "fastvae-fallback-nchw": forced(contiguous(forward_backward(fused)), "fallback"),
        },
        outputs=("output",),
        work=bytes_moved,
        quick=quick,
    )


CASES = (
    _case((4, 32, 128, 128), quick=True),
    _case((4, 128, 64, 64)),
    _case((4, 512, 32, 32)),
    _case((4, 45, 65, 63)),
    _case((4, 32, 128, 128), torch.float32),
    _case((4, 128, 64, 64), torch.float32, quick=True),
    _case((4, 512, 32, 32), torch.float32),
    _case((4, 45, 65, 63), torch.float32),
    *(_case((4, 128, 64, 64), dtype, activation="relu", setup=make_relu_inputs) for dtype in (torch.bfloat16, torch.float32)),
    *(_case((4, 128, 64, 64), dtype, activation="gelu") for dtype in (torch.bfloat16, torch.float32)),
)
