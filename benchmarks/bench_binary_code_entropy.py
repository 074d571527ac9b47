"""The entropies by which a lookup-free quantizer learns: those of the vectors' distributions over the codes, and that of their mean."""

from unittest import mock

import torch
from torch import Tensor

from benchmarks.registry import Case, Inputs, Unavailable, compiled, forced, forward_backward
from fastvae import functional as FV

# That of the layer of vector-quantize-pytorch.
INV_TEMPERATURE = 100.0


def with_logarithm(p: Tensor) -> Tensor:
    """``-p log p``, 0 at 0."""
    return -p * p.clamp(min=torch.finfo(p.dtype).tiny).log()


def eager(x):
    """As it is written in papers: a softmax over all codes."""
    dim = x.shape[1]
    codes = ((torch.arange(2**dim, device=x.device)[:, None] >> torch.arange(dim - 1, -1, -1, device=x.device)) & 1).to(x.dtype) * 2 - 1
    p = torch.softmax(2 * INV_TEMPERATURE * x @ codes.T, -1)
    return with_logarithm(p).sum(-1).mean(), with_logarithm(p.mean(0)).sum()


def fused(x):
    per_sample, codebook = FV.binary_code_entropy(x, INV_TEMPERATURE)
    return per_sample.mean(), codebook


def vector_quantize_pytorch(inputs: Inputs):
    """The layer, whose entropies are exact once its logarithm does not begin at 1e-5."""
    try:
        from vector_quantize_pytorch import lookup_free_quantization as library
    except ModuleNotFoundError:
        raise Unavailable("vector-quantize-pytorch is not installed") from None
    x = inputs.leaves["x"]
    layer = library.LFQ(dim=x.shape[1]).to(x.device)

    def exact_logarithm(p: Tensor) -> Tensor:
        return p.clamp(min=torch.finfo(p.dtype).tiny).log()

    def entropies(x):
        _, losses = layer(x[None], inv_temperature=INV_TEMPERATURE, return_loss_breakdown=True)
        return losses.per_sample_entropy, losses.batch_entropy

    operation = forward_backward(entropies)(inputs)

    def with_exact_logarithm():
        with mock.patch.object(library, "log", exact_logarithm):
            return operation()

    return with_exact_logarithm


def make_inputs(size, dtype, device) -> Inputs:
    """Vectors as a trained tokenizer's, whose bits are undecided now and then, so that no entropy is 0 nor rounded away."""
    x = torch.randn(size, dtype=dtype, device=device) / 8
    return Inputs({"x": x.requires_grad_()}, incoming=(None, None))


def products(inputs: Inputs) -> float:
    """The floating-point operations of the three products, one of the forward pass and two of the backward pass."""
    rows, dim = inputs.leaves["x"].shape
    return 3 * 2.0 * rows * 2**dim


def _case(size, quick=False) -> Case:
    return Case(
        family="binary_code_entropy",
        name="binary_code_entropy",
        size=size,
        tiny=(50, 7),
        setup=make_inputs,
        providers={
            "eager": forward_backward(eager),
            "compile": compiled(eager),
            "vector-quantize-pytorch": vector_quantize_pytorch,
            "fastvae": forward_backward(fused),
            "fastvae-fallback": forced(forward_backward(fused), "fallback"),
        },
        outputs=("per_sample", "codebook"),
        work=products,
        unit="FLOP",
        quick=quick,
    )


CASES = (
    _case((2048, 12), quick=True),
    _case((256, 18)),
)
