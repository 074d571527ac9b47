"""GroupNormSiLU and RMSNormSiLU as modules, what ``fastvae.optimize`` changes, and what it leaves alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source, brief, leaf
from torch import nn

import fastvae
from fastvae.nn import GroupNormSiLU, RMSNormSiLU, UpsampleConv2d
from fastvae.nn.optimize import examine


def test_the_module_is_group_norm_and_silu():
    x = Source("cpu").normal(2, 12, 5, 5)
    ours, norm = GroupNormSiLU(4, 12, eps=1e-3), nn.GroupNorm(4, 12, eps=1e-3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    ours.load_state_dict(norm.state_dict())
    torch.testing.assert_close(ours(x), F.silu(norm(x)))
    without = GroupNormSiLU(4, 12, affine=False, activation="none")
    torch.testing.assert_close(without(x), F.group_norm(x, 4))
    assert list(ours.state_dict()) == list(norm.state_dict())
    assert not list(without.parameters())
    assert "activation='silu'" in repr(ours)
    for name, function in (("relu", F.relu), ("gelu", F.gelu)):
        torch.testing.assert_close(ours(x, activation=name), function(norm(x)))


def test_the_module_checks_its_arguments():
    with pytest.raises(ValueError, match="activation: got 'gelu_tanh'"):
        GroupNormSiLU(2, 4, activation="gelu_tanh")
    with pytest.raises(ValueError, match="num_channels"):
        GroupNormSiLU(3, 4)


@pytest.mark.parametrize("bias", [False, True])
def test_the_other_module_is_rms_norm_and_silu(bias):
    x, norm = Source("cpu").normal(2, 5, 12), nn.RMSNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    ours = RMSNormSiLU(12, 1e-3, bias=bias, dim=-1)
    ours.load_state_dict(norm.state_dict() | ({"bias": torch.linspace(-1, 1, 12)} if bias else {}))
    expected = norm(x) + (ours.bias if bias else 0.0)
    torch.testing.assert_close(ours(x), F.silu(expected))
    torch.testing.assert_close(ours(x, activation="none"), expected)
    assert "dim=-1, activation='silu', eps_mode='add'" in repr(ours)


def test_the_other_module_bounds_a_norm():
    x = Source("cpu").normal(2, 12, 3, 3)
    module = RMSNormSiLU(12, 1e-12, elementwise_affine=False, activation="none", eps_mode="clamp")
    torch.testing.assert_close(module(x), F.normalize(x, dim=1) * 12**0.5)
    assert list(module.parameters()) == []
    assert list(module.state_dict()) == []


def test_the_other_module_checks_its_arguments():
    for options, message in (
        ({"num_channels": 0}, "num_channels: got 0, takes an int >= 1"),
        ({"num_channels": 2, "activation": "gelu_tanh"}, "activation: got 'gelu_tanh'"),
        ({"num_channels": 2, "eps_mode": "max"}, "eps_mode: got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            RMSNormSiLU(**options)
    with pytest.raises(ValueError, match="weight: "):
        RMSNormSiLU(4)(torch.ones(2, 5, 3))


@pytest.mark.parametrize("affine", [True, False])
def test_sharing_takes_the_parameters_themselves(affine):
    norm = nn.GroupNorm(2, 4, affine=affine).eval()
    module = GroupNormSiLU.sharing(norm)
    assert module.weight is norm.weight
    assert module.bias is norm.bias
    assert module.affine is affine
    assert not module.training


# Modules in which everything is understood.


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.n1, self.n2 = nn.GroupNorm(2, 4), nn.GroupNorm(4, 8)
        self.c1, self.c2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 8, 1)

    def forward(self, x):
        h = self.c1(F.silu(self.n1(x)))
        h = self.c2(torch.nn.functional.silu(self.n2(h), inplace=True))
        return h + (self.shortcut(x) if self.shortcut is not None else x)


class Submodule(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.act, self.conv = nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        h = self.norm(x)
        h = self.act(h)
        if self.conv is not None:
            h = self.conv(h)
        return self.act(x * self.scale) + h


def sequential():
    shared = nn.SiLU()
    return nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), shared, nn.Conv2d(4, 4, 1), nn.GroupNorm(4, 4, affine=False), shared, nn.Tanh()
    )


def other_activations():
    return nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 1), nn.GroupNorm(4, 4), nn.GELU(),
        nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4), nn.ReLU(),
    )  # fmt: skip


class Functions(nn.Module):
    """ReLU and GELU in every form that code has for them."""

    def __init__(self):
        super().__init__()
        self.n1, self.n2, self.n3, self.n4, self.n5, self.n6, self.n7 = (nn.GroupNorm(2, 4) for _ in range(7))
        self.relu, self.gelu, self.conv = nn.ReLU(inplace=True), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        h = self.conv(F.relu(self.n1(x)))
        h = self.conv(F.relu(self.n2(h), inplace=True)) + x
        h = self.conv(torch.relu(self.n3(h))) + self.conv(self.n4(h).relu())
        h = self.conv(F.gelu(self.n5(h))) - F.gelu(h, approximate="tanh")
        return self.gelu(self.n6(h)) * self.relu(self.n7(x))


def upsampling():
    return nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.UpsamplingNearest2d(scale_factor=2),
        nn.Conv2d(4, 6, 3, padding="same", bias=False), nn.GroupNorm(2, 6), nn.SiLU(),
    )  # fmt: skip


MAKERS = {
    "upsampling": (upsampling, 3),
    "sequential": (sequential, 2),
    "functional": (Functional, 2),
    "submodule": (Submodule, 1),
    "other activations": (other_activations, 3),
    "functions": (Functions, 7),
    "nested": (lambda: nn.Sequential(Submodule(), nn.ModuleDict({"block": Functional()})["block"]), 3),
}
each_module = pytest.mark.parametrize(("make", "count"), MAKERS.values(), ids=MAKERS)


@each_module
@pytest.mark.parametrize("channels_last", [False, True])
def test_same_outputs_gradients_and_names(make, count, channels_last):
    torch.manual_seed(0)
    module = make()
    before, keys, parameters = copy.deepcopy(module), list(module.state_dict()), list(module.parameters())
    lines = []
    assert fastvae.optimize(module, channels_last=channels_last, report=lines.append) is module
    assert len([line for line in lines if line.startswith("fused")]) == count
    assert sum(isinstance(m, GroupNormSiLU | UpsampleConv2d) for m in module.modules()) == count
    assert list(module.state_dict()) == keys
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    x = Source("cpu").normal(2, 4, 8, 8)
    inputs, outputs = [leaf(x), leaf(x)], []
    for m, t in zip((before, module), inputs, strict=True):
        outputs.append(m(t))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    for ours, expected in zip(module.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-4)
    wide = [p for p in module.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in wide) or not channels_last


@each_module
def test_examine_changes_nothing_and_says_the_same(make, count):
    module = make()
    text = repr(module)
    findings = examine(module)
    assert repr(module) == text
    lines = []
    fastvae.optimize(module, report=lines.append)
    assert [str(finding) for finding in findings] == lines
    assert not [finding for finding in examine(module) if finding.followed_by]


@each_module
def test_it_is_still_a_module(make, count):
    """Copied, pickled, moved, switched between modes and compiled; the copies have parameters of their own."""
    torch.compiler.reset()
    torch.manual_seed(0)
    module = fastvae.optimize(make(), report=None)
    x = Source("cpu").normal(2, 4, 8, 8)
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert not torch.equal(other(x), expected)
        assert torch.equal(module(x), expected)
    assert torch.equal(module.eval()(x), expected)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    assert module.double()(x.double()).dtype == torch.float64


def test_each_activation_becomes_that_of_its_norm():
    layers, functions = (fastvae.optimize(make(), report=None) for make in (other_activations, Functions))
    assert [m.activation for m in layers if isinstance(m, GroupNormSiLU)] == ["relu", "gelu", "relu"]
    assert [m.activation for m in functions.children() if isinstance(m, GroupNormSiLU)] == ["relu"] * 4 + ["gelu"] * 2 + ["relu"]
    lines = [str(finding) for finding in examine(Functions())]
    names = *["functional.relu"] * 4, "functional.gelu", "gelu", "relu"
    assert lines == [f"fused n{number} with {name}" for number, name in enumerate(names, 1)]


@pytest.mark.parametrize("act", [nn.SiLU(), nn.Tanh(), nn.GELU("tanh"), nn.ReLU(), nn.GELU()], ids=str)
@pytest.mark.parametrize("name", brief(["relu", "gelu"], ["relu"]))
def test_an_activation_that_is_replaced_afterwards(name, act):
    """The norm leaves its own out, also where it is replaced too."""
    torch.manual_seed(0)
    module, x = Functions(), Source("cpu").normal(2, 4, 8, 8)
    optimized = fastvae.optimize(copy.deepcopy(module), report=None)
    for changed in (module, optimized):
        setattr(changed, name, act)
    torch.testing.assert_close(optimized(x), module(x), rtol=1e-5, atol=1e-5)
    for changed in (module, optimized):
        changed.n1, changed.n6, changed.n7 = nn.GroupNorm(1, 4), nn.Identity(), nn.GroupNorm(4, 4)
    torch.testing.assert_close(optimized(x), module(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(optimized, fullgraph=True, backend="aot_eager")(x), module(x), rtol=1e-5, atol=1e-5)


def test_it_prints_by_default(capsys):
    fastvae.optimize(sequential())
    assert capsys.readouterr().out == "fused 1 with 2\nfused 4 with 5\n"


SHARED = nn.Conv2d(4, 4, 3, padding=1)
NOT_DOUBLED = {
    "nothing behind it": nn.Sequential(nn.Upsample(scale_factor=2)),
    "another mode": nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)),
    "another factor": nn.Sequential(nn.Upsample(scale_factor=(2, 3)), nn.Conv2d(4, 4, 3, padding=1)),
    "a size": nn.Sequential(nn.Upsample(size=(16, 16)), nn.Conv2d(4, 4, 3, padding=1)),
    "another padding": nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)),
    "reflected borders": nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
    "another stride": nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, 2, padding=1)),
    "a convolution in two places": nn.Sequential(SHARED, nn.Upsample(scale_factor=2), SHARED),
    "another layer": nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)),
    "other code": nn.ModuleList([nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1)]),
}


@pytest.mark.parametrize("module", NOT_DOUBLED.values(), ids=NOT_DOUBLED)
def test_other_upsamplings_stay(module):
    text = repr(module)
    fastvae.optimize(module, report=None)
    assert repr(module) == text


def test_modules_with_a_forward_of_their_own_stay():
    module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    for layer in (module[1], module[2]):
        layer.forward = layer.forward
    assert [finding.followed_by for finding in examine(module)] == [None, None]


def test_an_upsampling_that_stays_is_reported():
    lines = []
    fastvae.optimize(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1)), report=lines.append)
    assert lines == ["left 0: what follows it, 1, is not a convolution of size 3 with padding 1"]


# Modules that must stay as they are, and the reason that is given.


class Block(nn.Module):
    def __init__(self, channels: int = 4):
        super().__init__()
        self.norm, self.act, self.flag, self.eps = nn.GroupNorm(2, channels), nn.SiLU(), True, 0.5


class ReadsAFlag(Block):
    def forward(self, x):
        return F.silu(self.norm(x)) if self.flag else self.norm(x)


class ReadsANumber(Block):
    def forward(self, x):
        return F.silu(self.norm(x)) + self.eps


class DependsOnTheMode(Block):
    def forward(self, x):
        return F.dropout(F.silu(self.norm(x)), 0.5, self.training)


class Loops(Block):
    def forward(self, x):
        for _ in range(2):
            x = F.silu(self.norm(x))
        return x


class UsesBoth(Block):
    def forward(self, x):
        h = self.norm(x)
        return h + F.silu(h)


class Approximates(Block):
    def forward(self, x):
        return F.gelu(self.norm(x), approximate="tanh")


class ReadsTheNormAgain(Block):
    """What ReLU changes in place is read again."""

    def forward(self, x):
        h = self.norm(x)
        return F.relu(h, inplace=True) + h


class CallsTwice(Block):
    def forward(self, x):
        return F.silu(self.norm(x)) + self.norm(x)


class ComesBefore(Block):
    def forward(self, x):
        return self.norm(F.silu(x))


class TakesKeywords(Block):
    def forward(self, x, **options):
        return F.silu(self.norm(x))


def helper(x):
    return x


class CallsAHelper(Block):
    def forward(self, x):
        return helper(F.silu(self.norm(x)))


class CallsAMethod(Block):
    def activate(self, x):
        return F.silu(x) if self.flag else x

    def forward(self, x):
        return self.activate(self.norm(x))


class InstanceForward(Block):
    def __init__(self):
        super().__init__()
        self.forward = lambda x: F.silu(self.norm(x))


class OwnSequential(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x) * 2)


def hooked():
    norm = nn.GroupNorm(2, 4)
    norm.register_forward_hook(lambda module, inputs, output: output * 2)
    return nn.Sequential(norm, nn.SiLU())


def hooked_activation():
    act = nn.SiLU()
    act.register_forward_hook(lambda module, inputs, output: output * 2)
    return nn.Sequential(nn.GroupNorm(2, 4), act)


def shared_norm():
    norm = nn.GroupNorm(2, 4)
    return nn.Sequential(norm, nn.SiLU(), norm)


class Subclass(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x) * 2


LEFT = [
    (ReadsAFlag, "branches on self.flag"),
    (ReadsANumber, "reads self.eps"),
    (DependsOnTheMode, "reads self.training"),
    (Loops, "has a For"),
    (UsesBoth, "no SiLU, ReLU or GELU follows it"),
    (CallsTwice, "no SiLU, ReLU or GELU follows it"),
    (ReadsTheNormAgain, "no SiLU, ReLU or GELU follows it"),
    (Approximates, "GELU by tanh follows it, and not the exact one"),
    (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.GELU("tanh")), "GELU by tanh follows it, and not the exact one"),
    (ComesBefore, "no SiLU, ReLU or GELU follows it"),
    (TakesKeywords, "other than plain arguments"),
    (CallsAHelper, "uses helper"),
    (CallsAMethod, "reads self.activate"),
    (InstanceForward, "its forward was replaced"),
    (lambda: OwnSequential(nn.GroupNorm(2, 4), nn.SiLU()), "no SiLU, ReLU or GELU follows it"),
    (lambda: nn.Sequential(nn.GroupNorm(2, 4), nn.Mish(), nn.SiLU()), "no SiLU, ReLU or GELU follows it"),
    (lambda: nn.Sequential(nn.GroupNorm(2, 4)), "no SiLU, ReLU or GELU follows it"),
    (hooked, "has hooks"),
    (hooked_activation, "no SiLU, ReLU or GELU follows it"),
    (shared_norm, "used in more than one place"),
    (lambda: nn.ModuleList([nn.GroupNorm(2, 4), nn.SiLU()]), "in a ModuleList"),
    (lambda: nn.GroupNorm(2, 4), "the module itself"),
]


@pytest.mark.parametrize(("make", "reason"), LEFT, ids=[reason for _, reason in LEFT])
def test_what_is_not_understood_stays(make, reason):
    module = make()
    before, forward = repr(module), module.forward
    lines = []
    fastvae.optimize(module, report=lines.append)
    assert repr(module) == before
    assert module.forward == forward
    assert lines
    assert all(line.startswith("left") and reason in line for line in lines)


def test_a_subclass_is_not_a_group_norm():
    module = nn.Sequential(Subclass(2, 4), nn.SiLU())
    fastvae.optimize(module, report=None)
    assert type(module[0]) is Subclass


def test_an_unknown_attribute_of_the_package():
    with pytest.raises(AttributeError, match="'fastvae' has no attribute 'optimise'"):
        _ = fastvae.optimise
