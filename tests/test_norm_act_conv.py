"""GroupNorm, SiLU and convolution as one node: results and gradients to the last bit, memory, and the modules that must fall back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _helpers import LAYOUTS, Source, each_place, kept_bytes, lay_out, places
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from fastvae import functional as FV
from fastvae import nn as fnn
from fastvae.models import ImageVAE
from fastvae.nn.norm_act_conv import lean_obstacle, norm_then_conv

OPERATORS = "group_norm_forward", "group_norm_recompute", "group_norm_backward", "group_norm_restoring_backward"
SMALL = {"in_channels": 3, "channels": (8, 16), "groups": 4, "image_size": 8}


def parameters(source: Source, kernel=(3, 3), channels: int = 16, groups: int = 1):
    norm = source.normal(channels), source.normal(channels)
    return *norm, source.normal(6, channels // groups, *kernel) / 12, source.normal(6)


def results(function, *tensors) -> list[torch.Tensor]:
    """The output and the gradients of all tensors."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]
    output = function(*leaves)
    incoming = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, leaves, incoming)]


def assert_same_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def one_after_the_other(num_groups, activation="silu", **options):
    def function(input, norm_weight, norm_bias, weight, bias):
        normal = FV.group_norm_silu(input, num_groups, norm_weight, norm_bias, activation=activation)
        return CONVOLUTIONS[input.ndim](normal, weight, bias, **options)

    return function


def in_one(num_groups, activation="silu", **options):
    return lambda *tensors: FV.norm_act_conv(tensors[0], num_groups, *tensors[1:], activation=activation, **options)


@each_place(*OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_equals_norm_and_convolution_to_the_last_bit(place, layout, autocast):
    source = Source(place.device, torch.float32, 0)
    tensors = lay_out(source.normal(3, 16, 9, 8), layout), *parameters(source)
    with torch.autocast(place.device, torch.bfloat16, enabled=autocast):
        actual, expected = (results(function(4, padding=1), *tensors) for function in (in_one, one_after_the_other))
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("place", [place for place in places(*OPERATORS) if place.device == "cpu"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_each_dtype(place, dtype):
    source = Source("cpu", dtype, 0)
    tensors = source.normal(2, 16, 9, 8), *parameters(source)
    assert_same_bits(results(in_one(2, padding=1), *tensors), results(one_after_the_other(2, padding=1), *tensors))


@pytest.mark.parametrize(
    ("positions", "kernel", "options"),
    [
        ((9,), (3,), {"padding": 1}),
        ((6, 5), (1, 1), {}),
        ((9, 8), (3, 3), {"stride": 2, "padding": (1, 0)}),
        ((9, 8), (3, 3), {"dilation": 2, "padding": "same"}),
        ((9, 8), (3, 3), {"groups": 2, "padding": "valid"}),
        ((4, 5, 6), (3, 3, 3), {"padding": 1}),
        ((1, 1), (1, 1), {"activation": "none"}),
        ((9, 8), (3, 3), {"activation": "relu"}),
        ((9, 8), (3, 3), {"activation": "gelu"}),
    ],
    ids=str,
)
def test_each_geometry(positions, kernel, options):
    source = Source("cpu", torch.float32, 0)
    tensors = source.normal(2, 16, *positions), *parameters(source, kernel, groups=options.get("groups", 1))
    assert_same_bits(results(in_one(4, **options), *tensors), results(one_after_the_other(4, **options), *tensors))


def test_without_parameters():
    source = Source("cpu", torch.float32, 0)
    x, weight = source.normal(2, 16, 9, 8), source.normal(6, 16, 3, 3)
    actual = results(lambda x, weight: FV.norm_act_conv(x, 4, None, None, weight), x, weight)
    assert_same_bits(actual, results(lambda x, weight: F.conv2d(FV.group_norm_silu(x, 4), weight), x, weight))


@pytest.mark.parametrize("frozen", ["input", "norm", "weight", "bias"])
def test_what_learns_alone_gets_a_gradient(frozen):
    source = Source("cpu", torch.float32, 0)
    tensors = source.normal(2, 16, 9, 8), *parameters(source)
    learns = {"input": (0,), "norm": (1, 2), "weight": (3,), "bias": (4,)}
    gradients = []
    for function in (in_one, one_after_the_other):
        leaves = [tensor.clone().requires_grad_(i not in learns[frozen]) for i, tensor in enumerate(tensors)]
        function(4, padding=1)(*leaves).square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert [g is None for g in gradients[0]] == [g is None for g in gradients[1]]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@each_place(*OPERATORS)
def test_an_empty_batch(place):
    source = Source(place.device, torch.float32, 0)
    tensors = torch.empty(0, 16, 9, 8, device=place.device), *parameters(source)
    output, *gradients = results(in_one(4, padding=1), *tensors)
    assert output.shape == (0, 6, 9, 8)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    assert not any(gradient.any() for gradient in gradients)


def test_gradcheck():
    source = Source("cpu", torch.float64, 0)
    tensors = [t.requires_grad_() for t in (source.normal(2, 4, 3, 3), *parameters(source, channels=4))]
    assert torch.autograd.gradcheck(in_one(2, padding=1), tensors)


@each_place(*OPERATORS)
def test_keeps_two_numbers_a_group_beside_its_arguments(place):
    source = Source(place.device, torch.float32, 0)
    tensors = [t.requires_grad_() for t in (source.normal(3, 16, 9, 8), *parameters(source))]
    assert kept_bytes(lambda: in_one(4, padding=1)(*tensors), *tensors) == 2 * 3 * 4 * 8
    assert kept_bytes(lambda: one_after_the_other(4, padding=1)(*tensors), *tensors) == 2 * 3 * 4 * 8 + tensors[0].nbytes


def test_the_lean_vae_keeps_half():
    full, lean = (ImageVAE.residual(**SMALL | {"channels": (32, 32)}, memory=memory) for memory in ("full", "lean"))
    x = torch.rand(8, 3, 8, 8)
    kept = [kept_bytes(lambda model=model: model(x, seed=3).loss, x, *model.parameters()) for model in (full, lean)]
    assert kept[1] < 0.6 * kept[0]


@pytest.mark.parametrize("options", [{}, {"attention": True}, {"dropout": 0.3}, {"activation": "relu"}, {"precision": "bfloat16"}], ids=str)
def test_the_lean_vae_equals_the_full_one(options):
    torch.manual_seed(0)
    full = ImageVAE.residual(**SMALL, **options)
    lean = ImageVAE.residual(**SMALL, **options, memory="lean")
    lean.load_state_dict(full.state_dict())
    x, losses = torch.rand(2, 3, 8, 8), []
    for model in (full, lean):
        torch.manual_seed(1)
        losses.append(model(x, seed=3).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(full.parameters(), lean.parameters(), strict=True))


@pytest.mark.prove
def test_the_lean_vae_compiles_whole():
    torch.manual_seed(0)
    model = ImageVAE.residual(**SMALL, memory="lean", precision="float32")
    x = torch.rand(2, 3, 8, 8)
    expected = model(x, seed=3).loss
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    loss = compiled(x, seed=3).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_compiled_graph_computes_the_input_of_the_convolution_again():
    source = Source("cpu", torch.float32, 0)
    tensors = [t.requires_grad_() for t in (source.normal(3, 16, 9, 8), *parameters(source))]
    compiled = torch.compile(in_one(4, padding=1), fullgraph=True, backend="aot_eager")
    compiled(*tensors)
    assert kept_bytes(lambda: compiled(*tensors), *tensors) == 2 * 3 * 4 * 8


def pair(**options) -> tuple[nn.Module, nn.Module]:
    return fnn.GroupNormSiLU(4, 16), nn.Conv2d(16, 6, 3, padding=1, **options)


def hooked():
    norm, conv = pair()
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return norm, conv


def hooked_norm():
    norm, conv = pair()
    norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return norm, conv


def parametrized():
    norm, conv = pair()
    return norm, spectral_norm(conv)


FALL_BACK = {
    "hook": (hooked, "it is followed by a convolution that has hooks"),
    "hook of the norm": (hooked_norm, "it has hooks"),
    "parametrization": (parametrized, "it is followed by a ParametrizedConv2d and not by a convolution of torch"),
    "reflection": (lambda: pair(padding_mode="reflect"), "it is followed by a convolution with padding_mode 'reflect'"),
    "torch's norm": (lambda: (nn.GroupNorm(4, 16), pair()[1]), "it is a GroupNorm and not a GroupNormSiLU"),
    "uneven padding": (
        lambda: (pair()[0], nn.Conv2d(16, 6, 2, padding="same")),
        "it is followed by a convolution that pads its ends differently",
    ),
}


@pytest.mark.parametrize("make", FALL_BACK)
def test_modules_that_are_more_than_their_classes_are_called(make):
    build, reason = FALL_BACK[make]
    norm, conv = build()
    assert f"it {lean_obstacle(norm, conv)}" == reason
    x = torch.randn(2, 16, 9, 8)
    twin_norm, twin_conv = copy.deepcopy((norm, conv))
    assert torch.equal(norm_then_conv(norm, conv, x), twin_conv(twin_norm(x)))


def test_the_modules_have_the_parameters_of_their_parts():
    module = fnn.NormActConv3d(4, 16, 6, 3, padding=1)
    assert list(module.state_dict()) == ["norm.weight", "norm.bias", "conv.weight", "conv.bias"]
    x = torch.randn(2, 16, 4, 5, 6)
    assert torch.equal(module(x), module.conv(module.norm(x)))


def test_under_checkpointing_and_in_a_copy():
    module = fnn.NormActConv2d(4, 16, 6, 3, padding=1)
    twin, x = copy.deepcopy(module), torch.randn(2, 16, 9, 8)
    module(x).square().sum().backward()
    torch.utils.checkpoint.checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(module.parameters(), twin.parameters(), strict=True))


X, W = torch.zeros(2, 16, 5, 5), torch.zeros(6, 16, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_groups": 3}, ValueError, "num_groups: got 3 for 16 channels"),
        ({"norm_weight": torch.ones(6)}, ValueError, "norm_weight: "),
        ({"norm_bias": torch.ones(16).double()}, TypeError, "norm_bias: got torch.float64, takes the dtype of input"),
        ({"weight": torch.zeros(6, 8, 3, 3)}, ValueError, r"weight: got shape \(6, 8, 3, 3\) with groups 1, takes"),
        ({"weight": torch.zeros(6, 16, 3)}, ValueError, r"weight: got shape \(6, 16, 3\) with groups 1, takes"),
        ({"weight": W.double()}, TypeError, "weight: got torch.float64, takes the dtype of input, torch.float32, outside autocast"),
        ({"bias": torch.zeros(5)}, ValueError, "bias: "),
        ({"bias": torch.zeros(6).half()}, TypeError, "bias: got torch.float16, takes the dtype of weight, torch.float32"),
        ({"input": torch.zeros(2, 16)}, ValueError, r"input: got shape \(2, 16\), takes one to three dimensions"),
        ({"stride": 0}, ValueError, "stride: got 0, takes an integer >= 1 or 2 of them"),
        ({"padding": (1, 1, 1)}, ValueError, r"padding: got \(1, 1, 1\), takes an integer >= 0 or 2 of them"),
        ({"padding": "reflect"}, ValueError, "padding: got 'reflect', takes numbers, 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, ValueError, "padding: got 'same' for a kernel of"),
        ({"groups": True}, ValueError, "groups: got True, takes an integer >= 1"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh', takes one of"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0, takes a finite number >= 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, error, message):
    given = {"input": X, "num_groups": 4, "norm_weight": None, "norm_bias": None, "weight": W} | arguments
    with pytest.raises(error, match=message):
        FV.norm_act_conv(**given)


def test_memory_takes_two_words():
    with pytest.raises(ValueError, match="memory: got 'half', takes one of 'full', 'lean'"):
        ImageVAE.residual(memory="half")
