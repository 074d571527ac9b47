"""The contractive penalty and the norm of an encoder's Jacobian."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import jacrev, vmap

from benchmarks.registry import Case, Inputs, Operation, Unavailable, compiled, forced, forward_backward
from fastvae import functional as FV


def make_layer(size, dtype, device) -> Inputs:
    """Hidden values and weight, of a size (batch, inputs, units)."""
    batch, inputs, units = size
    hidden = torch.rand(batch, units, dtype=dtype, device=device, requires_grad=True)
    return Inputs({"hidden": hidden, "weight": _weight(units, inputs, dtype, device)})


def make_encoder(size, dtype, device) -> Inputs:
    batch, inputs, units = size
    bias = torch.zeros(units, dtype=dtype, device=device, requires_grad=True)
    x = torch.rand(batch, inputs, dtype=dtype, device=device)
    return Inputs({"weight": _weight(units, inputs, dtype, device), "bias": bias}, {"x": x})


def make_mlp(size, dtype, device) -> Inputs:
    batch, *units = size
    layers = [layer for below, above in pairwise(units) for layer in (nn.Linear(below, above, dtype=dtype), nn.Sigmoid())]
    return _make_module(nn.Sequential(*layers).to(device), torch.rand(batch, units[0], dtype=dtype, device=device))


def make_conv(size, dtype, device) -> Inputs:
    encoder = nn.Sequential(nn.Conv2d(size[1], 16, 3, stride=2), nn.SiLU(), nn.Conv2d(16, 32, 3, stride=2), nn.Flatten()).to(device, dtype)
    return _make_module(encoder, torch.rand(size, dtype=dtype, device=device))


def without_second_derivatives(inputs: Inputs) -> Operation:
    raise Unavailable("torch.compile has no second derivatives")


def _make_module(encoder: nn.Module, x) -> Inputs:
    return Inputs(dict(encoder.named_parameters()), {"encoder": encoder, "x": x})


def _weight(units, inputs, dtype, device):
    return torch.randn(units, inputs, dtype=dtype, device=device).mul_(inputs**-0.5).requires_grad_()


def penalty_formula(hidden, weight):
    return ((hidden * (1 - hidden)) ** 2 @ (weight**2).sum(1)).mean()


def encoder_formula(weight, bias, x):
    return penalty_formula(torch.sigmoid(F.linear(x, weight, bias)), weight)


def encoder_jacrev(weight, bias, x):
    jacobians = vmap(jacrev(lambda sample: torch.sigmoid(F.linear(sample, weight, bias))))(x)
    return jacobians.square().sum((1, 2)).mean()


def encoder_fused(weight, bias, x):
    return FV.contractive_penalty(torch.sigmoid(F.linear(x, weight, bias)), weight)


# The parameters are those of the encoder.
def gram_formula(encoder, x, **parameters):
    first, _, second, _ = encoder
    h1 = torch.sigmoid(first(x))
    h2 = torch.sigmoid(second(h1))
    above = (h2 * (1 - h2)).unsqueeze(2) * second.weight * (h1 * (1 - h1)).unsqueeze(1)
    return (above @ (first.weight @ first.weight.T) * above).sum((1, 2)).mean()


def module_jacrev(encoder, x, **parameters):
    return vmap(jacrev(encoder))(x).square().sum((1, 2)).mean()


def module_fused(encoder, x, **parameters):
    return FV.jacobian_frobenius(encoder, x, method="gram")


def projection_formula(encoder, x, **parameters):
    x = x.detach().requires_grad_()
    output = encoder(x)
    directions = F.normalize(torch.randn(1, *output.shape, dtype=output.dtype, device=output.device), dim=2)[0]
    (row,) = torch.autograd.grad(output, x, directions, create_graph=True)
    return output.shape[1] * row.square().sum((1, 2, 3)).mean()


def projection_fused(encoder, x, **parameters):
    return FV.jacobian_frobenius(encoder, x, method="projection")


def bytes_moved(inputs: Inputs) -> int:
    """Weight and hidden values are read, their gradients written."""
    return 2 * sum(leaf.nbytes for leaf in inputs.leaves.values())


def multiplications(inputs: Inputs) -> int:
    """The Gram matrix and its gradient, a product with it for each sample, and three quarters of such a product for the gradient."""
    first, second = inputs.leaves["0.weight"], inputs.leaves["2.weight"]
    units, columns = first.shape
    return int(2 * (2 * units**2 * columns + 1.75 * len(inputs.others["x"]) * len(second) * units**2))


def elements_read(inputs: Inputs) -> int:
    return inputs.others["x"].nbytes


def penalty(size, quick=False) -> Case:
    return Case(
        family="jacobian",
        name="contractive_penalty",
        size=size,
        tiny=(7, 5, 6),
        setup=make_layer,
        providers={
            "eager": forward_backward(penalty_formula),
            "compile": compiled(penalty_formula),
            "fastvae": forward_backward(FV.contractive_penalty),
            "fastvae-fallback": forced(forward_backward(FV.contractive_penalty), "fallback"),
        },
        outputs=("penalty",),
        work=bytes_moved,
        quick=quick,
    )


CASES = (
    penalty((128, 784, 256), quick=True),
    penalty((512, 3072, 1024)),
    Case(
        family="jacobian",
        name="contractive_penalty_with_encoder",
        size=(128, 784, 256),
        tiny=(7, 5, 6),
        setup=make_encoder,
        providers={
            "eager": forward_backward(encoder_formula),
            "compile": compiled(encoder_formula),
            "jacrev": forward_backward(encoder_jacrev),
            "fastvae": forward_backward(encoder_fused),
            "fastvae-fallback": forced(forward_backward(encoder_fused), "fallback"),
        },
        outputs=("penalty",),
        work=bytes_moved,
    ),
    Case(
        family="jacobian",
        name="contractive_mlp",
        size=(128, 784, 256, 64),
        tiny=(7, 20, 6, 4),
        setup=make_mlp,
        providers={
            "eager": forward_backward(gram_formula),
            "compile": compiled(gram_formula),
            "jacrev": forward_backward(module_jacrev),
            "fastvae": forward_backward(module_fused),
            "fastvae-fallback": forced(forward_backward(module_fused), "fallback"),
        },
        outputs=("norm",),
        work=multiplications,
        unit="FLOP",
        quick=True,
    ),
    Case(
        family="jacobian",
        name="jacobian_projection",
        size=(128, 1, 28, 28),
        tiny=(3, 1, 9, 9),
        setup=make_conv,
        providers={
            "eager": forward_backward(projection_formula),
            "compile": without_second_derivatives,
            "fastvae": forward_backward(projection_fused),
            "fastvae-fallback": forced(forward_backward(projection_fused), "fallback"),
        },
        outputs=("norm",),
        work=elements_read,
    ),
)
