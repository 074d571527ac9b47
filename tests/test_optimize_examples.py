"""``fastvae.optimize(example_inputs=...)``: what changes outputs or gradients stays, and nothing else about the module changes."""

import random
from dataclasses import dataclass

import pytest
import torch
from _helpers import Source
from torch import Tensor, nn

import fastvae
from fastvae.compat import patch_diffusers
from fastvae.nn import GroupNormSiLU, UpsampleConv2d


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Dropout(0.5), nn.BatchNorm2d(4))


class CallsAPart(nn.Module):
    """Calls a norm of a Sequential by itself, which optimize() cannot see."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers(), layers()

    def forward(self, x, scale=1.0):
        return self.second(self.first(x) + scale * self.first[1](x))


class Gives(nn.Module):
    """Normalises, and gives the result in some form."""

    def __init__(self, form):
        super().__init__()
        self.layers, self.form = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), form

    def forward(self, x):
        return self.form(self.layers(x))


@dataclass
class Output:
    sample: Tensor


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return Source("cpu", dtype).normal(2, 4, 6, 6)


def fused(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, GroupNormSiLU | UpsampleConv2d)]


@pytest.mark.parametrize("example_inputs", [(inputs(),), {"x": inputs(), "scale": 2.0}], ids=["tuple", "dict"])
def test_a_norm_that_something_else_calls_too_stays(example_inputs):
    torch.manual_seed(0)
    module, lines = CallsAPart(), []
    fastvae.optimize(module, report=lines.append, example_inputs=example_inputs)
    assert fused(module) == ["second.1"]
    assert lines[0].startswith("left first.1: it changes ")
    assert "whose largest element is" in lines[0]
    assert lines[1] == "fused second.1 with 2"


def test_nothing_else_changes():
    """Generators, buffers, gradients and inputs; the results are those of the module without a check."""
    torch.manual_seed(0)
    module, x = layers(), inputs()
    module(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    buffers, state = [buffer.clone() for buffer in module.buffers()], torch.get_rng_state()
    fastvae.optimize(module, report=None, example_inputs=(x,))
    assert fused(module) == ["1"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), buffers, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(module.parameters(), gradients, strict=True))
    assert torch.equal(x, inputs())


FORMS = {
    "a tuple": lambda y: (y, y.argmax(1)),
    "a dict": lambda y: {"sample": y, "shape": y.shape},
    "a dataclass": Output,
    "its own memory": lambda y: y.mul_(2),
    "NaN": lambda y: y.masked_fill(y > 1, torch.nan),
    "no gradient": lambda y: y.detach(),
    "nothing": lambda y: y[:0],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_what_a_module_may_give(form, dtype):
    module = Gives(form).to(dtype)
    fastvae.optimize(module, report=None, example_inputs=(inputs(dtype),))
    assert fused(module) == ["layers.0"]


class WritesIntoItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())

    def forward(self, x, generator):
        return self.layers(x.add_(torch.randn(x.shape, generator=generator)))


def test_each_call_has_inputs_of_its_own():
    x, generator = inputs(), torch.Generator().manual_seed(3)
    module = fastvae.optimize(WritesIntoItsInput(), report=None, example_inputs=(x, generator))
    assert fused(module) == ["layers.0"]
    assert torch.equal(x, inputs())
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_inputs_and_frozen_parameters():
    module = layers().requires_grad_(False)
    fastvae.optimize(module, report=None, example_inputs=((2 * inputs().requires_grad_()),))
    assert fused(module) == ["1"]


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        module = fastvae.optimize(layers(), report=None, example_inputs=(inputs(),))
    assert fused(module) == ["1"]


def test_an_upsampling_is_tried_too():
    module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1))
    fastvae.optimize(module, report=None, channels_last=True, example_inputs=(inputs(),))
    assert fused(module) == ["1"]


def test_where_the_gradient_alone_changes(monkeypatch):
    original = GroupNormSiLU.forward
    monkeypatch.setattr(GroupNormSiLU, "forward", lambda self, x: original(self, x.detach()))
    module, lines = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.SiLU()), []
    fastvae.optimize(module, report=lines.append, example_inputs=(inputs(),))
    assert fused(module) == []
    assert lines == ["left 1: it changes whether there is the gradient of 0.bias, the gradient of 0.weight"]


def test_where_an_operator_is_wrong(monkeypatch):
    original = GroupNormSiLU.forward
    for wrong in (lambda y: 1.1 * y, lambda y: y * torch.nan, lambda y: y[:1]):
        monkeypatch.setattr(GroupNormSiLU, "forward", lambda self, x, wrong=wrong: wrong(original(self, x)))
        assert fused(fastvae.optimize(layers().eval(), report=None, example_inputs=(inputs(),))) == []


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.terms = nn.ModuleList(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()) for _ in range(4))

    def forward(self, x):
        return sum(term(x) for term in self.terms)


def test_where_each_change_holds_and_all_of_them_do_not(monkeypatch):
    original = GroupNormSiLU.forward
    tolerance = 3.0 * torch.finfo(torch.float32).eps ** 0.5 * float(Sum()(inputs()).detach().abs().max())
    monkeypatch.setattr(GroupNormSiLU, "forward", lambda self, x: original(self, x) + 0.2 * tolerance)
    assert len(fused(fastvae.optimize(Sum(), report=None, example_inputs=(inputs(),)))) == 4
    monkeypatch.setattr(GroupNormSiLU, "forward", lambda self, x: original(self, x) + 0.5 * tolerance)
    assert fused(fastvae.optimize(Sum(), report=None, example_inputs=(inputs(),))) == []


class DrawsElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())

    def forward(self, x):
        return self.layers(x) * random.random()


def test_bad_inputs_are_named():
    for example_inputs in (inputs(), [inputs()]):
        with pytest.raises(TypeError, match=r"example_inputs: got \w+, takes a tuple of arguments or a dict of keyword arguments"):
            fastvae.optimize(layers(), example_inputs=example_inputs)
    with pytest.raises(RuntimeError, match="channels"):
        fastvae.optimize(layers(), example_inputs=(torch.ones(2, 3, 6, 6),))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Gives(lambda y: y.argmax(1)), "gives a Tensor without tensors of floating point"),
        (DrawsElsewhere(), "gives something else in each call"),
    ],
    ids=["no floating point", "another random generator"],
)
def test_what_cannot_be_compared_is_named(module, message):
    with pytest.raises(ValueError, match=f"example_inputs: the module {message}"):
        fastvae.optimize(module, report=None, example_inputs=(inputs(),))
    assert fused(module) == []


def test_an_autoencoder_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    vae = diffusers.VQModel(block_out_channels=(16,), norm_num_groups=8, num_vq_embeddings=16)
    lines: list[str] = []
    patch_diffusers(vae, report=lines.append, example_inputs={"sample": Source("cpu").uniform(1, 3, 8, 8), "return_dict": True})
    assert {line.split(": ", 1)[-1] for line in lines if line.startswith("left")} == {"attention follows it"}
    assert len(fused(vae)) == 16
