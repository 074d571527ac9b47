"""Snake and SnakeBeta between the convolutions of an audio autoencoder, written as diffusers' audio models have it."""

import torch

from benchmarks.registry import Case, Inputs, compiled, forced, forward_backward
from fastvae import functional as FV


def eager(input, alpha, beta):
    return input + (1.0 / (beta.view(1, -1, 1) + 1e-9)) * torch.sin(input * alpha.view(1, -1, 1)).pow(2)


def fused(input, alpha, beta):
    return FV.snake(input, alpha, beta)


def make_inputs(size, dtype, device) -> Inputs:
    input, incoming = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
    alpha, beta = ((torch.rand(size[1], dtype=dtype, device=device) + 0.5).requires_grad_() for _ in range(2))
    return Inputs({"input": input.requires_grad_(), "alpha": alpha, "beta": beta}, incoming=(incoming,))


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads the input and writes the output; backward reads the input and a gradient, and writes one."""
    return 5 * inputs.leaves["input"].nbytes


def _case(size, dtype=torch.float32, quick=False) -> Case:
    return Case(
        family="snake",
        name="snake",
        size=size,
        tiny=(2, 6, 35),
        dtype=dtype,
        setup=make_inputs,
        providers={
            "eager": forward_backward(eager),
            "compile": compiled(eager),
            "fastvae": forward_backward(fused),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
        },
        outputs=("output",),
        work=bytes_moved,
        quick=quick,
    )


CASES = (
    _case((2, 128, 12000), quick=True),
    _case((2, 1024, 1000)),
    _case((2, 45, 12345)),
    _case((2, 128, 12000), torch.bfloat16),
    _case((2, 1024, 1000), torch.bfloat16),
)
