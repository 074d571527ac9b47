"""The norms of video autoencoders with SiLU: that of Wan, written as it is there, and that of LTX. The inputs have their channels last; the
``-ncdhw`` providers contiguous copies of them, converted before the clock runs."""

import dataclasses

import torch
import torch.nn.functional as F

from benchmarks.registry import Case, Inputs, Provider, compiled, forced, forward_backward
from fastvae import functional as FV


def wan(input, weight):
    normal = F.normalize(input.float(), dim=1).to(input.dtype)
    return F.silu(normal * input.shape[1] ** 0.5 * weight.view(-1, 1, 1, 1) + 0.0)


def fused_wan(input, weight):
    return FV.rms_norm_silu(input, weight, eps=1e-12, eps_mode="clamp")


def ltx(input, scale, shift):
    """``RMSNorm`` through ``movedim``, without parameters."""
    rows = input.movedim(1, -1)
    rows = rows * torch.rsqrt(rows.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    normal = rows.to(input.dtype).movedim(-1, 1)
    return F.silu(normal * (1 + scale.view(*scale.shape, 1, 1, 1)) + shift.view(*shift.shape, 1, 1, 1))


def fused_ltx(input, scale, shift):
    return FV.rms_norm_silu(input, scale=scale, shift=shift)


def make_inputs(size, dtype, device, of_samples: bool) -> Inputs:
    input, incoming = (torch.randn(size, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last_3d) for _ in range(2))
    shape = size[:2] if of_samples else size[1:2]
    names = ("scale", "shift") if of_samples else ("weight",)
    parameters = {name: torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for name in names}
    return Inputs({"input": input.requires_grad_(), **parameters}, incoming=(incoming,))


def contiguous(provider: Provider) -> Provider:
    """The provider on contiguous inputs."""

    def provide(inputs: Inputs):
        inputs.leaves["input"] = inputs.leaves["input"].detach().contiguous().requires_grad_()
        return provider(dataclasses.replace(inputs, incoming=(inputs.incoming[0].contiguous(),)))

    return provide


def bytes_moved(inputs: Inputs) -> int:
    """Forward reads the input and writes the output; backward reads the input and a gradient, and writes one."""
    return 5 * inputs.leaves["input"].nbytes


def _case(name, eager, fused, size, dtype=torch.bfloat16, of_samples=False, quick=False) -> Case:
    return Case(
        family="rms_norm",
        name=name,
        size=size,
        tiny=(2, 6, 2, 5, 3),
        dtype=dtype,
        setup=lambda size, dtype, device: make_inputs(size, dtype, device, of_samples),
        providers={
            "eager": forward_backward(eager),
            "eager-ncdhw": contiguous(forward_backward(eager)),
            "compile": compiled(eager),
            "compile-ncdhw": contiguous(compiled(eager)),
            "fastvae": forward_backward(fused),
            "fastvae-ncdhw": contiguous(forward_backward(fused)),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
        },
        outputs=("output",),
        work=bytes_moved,
        quick=quick,
    )


def _wan(size, dtype=torch.bfloat16, quick=False) -> Case:
    return _case("rms_norm_silu", wan, fused_wan, size, dtype, quick=quick)


CASES = (
    _wan((1, 96, 5, 64, 64), quick=True),
    _wan((1, 384, 5, 32, 32)),
    _wan((1, 45, 3, 65, 63)),
    _wan((1, 96, 5, 64, 64), torch.float32),
    _wan((1, 384, 5, 32, 32), torch.float32),
    _wan((1, 45, 3, 65, 63), torch.float32),
    _case("rms_norm_silu_modulated", ltx, fused_ltx, (2, 128, 3, 32, 32), of_samples=True),
)
