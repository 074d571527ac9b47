"""Upsampling and convolution as one, against the two in float64."""

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source, leaf
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from fastvae.nn import UpsampleConv2d

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def plain(x, weight, bias=None):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def make(*channels: int, **options) -> UpsampleConv2d:
    torch.manual_seed(0)
    return UpsampleConv2d(*channels, **options)


@each_layout
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 6), (5, 3), (1, 7), (1, 1)], ids=str)
def test_the_same_function(layout, bias, size):
    module = make(3, 5, bias=bias, dtype=torch.float64)
    x = Source("cpu", torch.float64).normal(2, 3, *size).contiguous(memory_format=layout)
    inputs = [leaf(x), *module.parameters()]
    incoming = Source("cpu", torch.float64, seed=1).normal(2, 5, 2 * size[0], 2 * size[1])
    ours, expected = module(inputs[0]), plain(*inputs)
    torch.testing.assert_close(ours, expected)
    grads = [torch.autograd.grad(output, inputs, incoming) for output in (ours, expected)]
    for actual, oracle in zip(*grads, strict=True):
        torch.testing.assert_close(actual, oracle)


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_layouts(dtype, layout):
    module = make(16, 8, dtype=dtype).to(memory_format=layout)
    x = Source("cpu", dtype).normal(2, 16, 6, 5).contiguous(memory_format=layout)
    output = module(x)
    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=layout)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(output.double(), plain(x.double(), module.weight.double(), module.bias.double()), **tolerance)


def test_empty_batch():
    assert make(3, 5)(torch.zeros(0, 3, 4, 4)).shape == (0, 5, 8, 8)


def test_gradients_of_both_orders():
    module = make(2, 3, dtype=torch.float64)
    x = leaf(Source("cpu", torch.float64).normal(1, 2, 3, 2))

    def function(x, weight, bias):
        return torch.func.functional_call(module, {"weight": weight, "bias": bias}, (x,))

    arguments = [x, *module.parameters()]
    assert gradcheck(function, arguments)
    assert gradgradcheck(function, arguments)


@each_layout
def test_what_follows_may_change_it_in_place(layout):
    module, x = make(3, 4), Source("cpu").normal(2, 3, 4, 4).contiguous(memory_format=layout)
    output = F.relu(module(x), inplace=True)
    output.sum().backward()
    torch.testing.assert_close(output, plain(x, module.weight, module.bias).relu())
    assert module.weight.grad.isfinite().all()


def test_vmap_and_compile():
    torch.compiler.reset()
    module, x = make(2, 3), Source("cpu").normal(4, 2, 3, 5)
    expected = module(x)
    torch.testing.assert_close(torch.func.vmap(module)(x.unsqueeze(1)).squeeze(1), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(*(torch.autograd.grad(m(x).square().sum(), module.weight)[0] for m in (compiled, module)))


def test_autocast_adds_the_weights_before_it_rounds_them():
    module, x = make(8, 8), Source("cpu").normal(1, 8, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), module(x), rtol=2e-2, atol=2e-2)


def test_names_and_values_are_those_of_a_convolution():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, padding=1)
    module = make(3, 5)
    assert {name: t.shape for name, t in module.state_dict().items()} == {name: t.shape for name, t in conv.state_dict().items()}
    assert torch.equal(module.weight, conv.weight)
    shared = UpsampleConv2d.sharing(conv.eval())
    assert shared.weight is conv.weight
    assert shared.bias is conv.bias
    assert not shared.training


def test_it_takes_fewer_multiplications():
    module, x = make(4, 4), Source("cpu").normal(1, 4, 32, 32)
    counts = []
    for function in (module, lambda x: plain(x, module.weight, module.bias)):
        with FlopCounterMode(display=False) as counter:
            function(leaf(x)).sum().backward()
        counts.append(counter.get_total_flops())
    # Four of nine, on an image that is larger by one in each direction.
    assert counts[0] / counts[1] == pytest.approx(4 / 9 * (33 / 32) ** 2)
