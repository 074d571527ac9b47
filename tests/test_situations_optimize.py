"""What users do to modules that optimize() exchanges or rewrites: hang hooks on them, parametrize, wrap, replace them. The result is that
of the modules as they were."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source
from _modules import double_input, double_output, one_process, shard
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, parametrize, prune

import fastvae
from fastvae.nn import GroupNormSiLU, UpsampleConv2d
from fastvae.nn.optimize import examine


class Norm(nn.GroupNorm):
    pass


class Conv(nn.Conv2d):
    pass


def hooked(module: nn.Module, register: str = "register_forward_hook") -> nn.Module:
    getattr(module, register)(lambda *_: None)
    return module


def own_forward(module: nn.Module) -> nn.Module:
    module.forward = module.forward
    return module


def with_child(module: nn.Module) -> nn.Module:
    module.adapter = nn.Linear(2, 2)
    return module


NOT_SHARED = {
    "has hooks": hooked,
    "has hooks for its state_dict": lambda m: hooked(m, "register_state_dict_post_hook"),
    "has a forward of its own": own_forward,
    "is parametrized": lambda m: parametrizations.weight_norm(m, dim=None),
    "holds more than a weight and a bias": with_child,
}


@pytest.mark.parametrize(("change", "reason"), [(change, reason) for reason, change in NOT_SHARED.items()], ids=NOT_SHARED)
def test_a_module_that_is_more_than_its_class_is_not_taken_over(change, reason):
    with pytest.raises(ValueError, match=rf"norm: .* {reason}, takes a GroupNorm"):
        GroupNormSiLU.sharing(change(nn.GroupNorm(2, 4)))
    with pytest.raises(ValueError, match=rf"conv: .* {reason}, takes a Conv2d"):
        UpsampleConv2d.sharing(change(nn.Conv2d(4, 4, 3, padding=1)))
    module = nn.Sequential(nn.Upsample(scale_factor=2), change(nn.Conv2d(4, 4, 3, padding=1)), change(nn.GroupNorm(2, 4)), nn.SiLU())
    findings = {finding.name: finding for finding in examine(module)}
    assert all(finding.followed_by is None and reason in finding.reason for finding in findings.values())
    assert len(findings) == 2


def test_a_subclass_or_another_size_is_not_taken_over():
    with pytest.raises(ValueError, match="is a Norm and not a GroupNorm"):
        GroupNormSiLU.sharing(Norm(2, 4))
    with pytest.raises(ValueError, match="is a GroupNormSiLU and not a GroupNorm"):
        GroupNormSiLU.sharing(GroupNormSiLU(2, 4))
    with pytest.raises(ValueError, match="is a Conv and not a Conv2d"):
        UpsampleConv2d.sharing(Conv(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match="is not a convolution of size 3 with padding 1"):
        UpsampleConv2d.sharing(nn.Conv2d(4, 4, 3))


def test_one_norm_that_must_stay_leaves_the_others():
    module = nn.Sequential(hooked(nn.GroupNorm(2, 4)), nn.SiLU(), nn.GroupNorm(2, 4), nn.SiLU())
    assert [str(finding) for finding in examine(module)] == ["left 0: it has hooks", "fused 2 with 3"]


def test_sharded_modules_stay():
    """What shards a module keeps it to write its weights into, so no other can take its place."""
    with one_process():
        module = nn.Sequential(nn.Upsample(scale_factor=2), shard(nn.Conv2d(4, 4, 3, padding=1)), shard(nn.GroupNorm(2, 4)), nn.SiLU())
        reasons = [finding.reason for finding in examine(module)]
        strides = [p.stride() for p in module.parameters()]
        fastvae.optimize(module, channels_last=True, report=None)
        assert [p.stride() for p in module.parameters()] == strides
    assert reasons == ["it holds a DTensor", "what follows it, 1, holds a DTensor"]


def test_nothing_is_swapped_under_hooks_for_all_modules():
    module = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert all(finding.followed_by is None for finding in examine(module))
    finally:
        handle.remove()
    assert all(finding.followed_by for finding in examine(module))


def test_a_sequential_with_a_forward_of_its_own_stays():
    module = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1))
    module.forward = lambda x: module[1](2 * module[0](x))
    assert [str(finding) for finding in examine(module)] == ["left 0: its forward was replaced"]


def test_a_parametrized_upsampling_takes_one_step_of_power_iteration_a_call():
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(UpsampleConv2d(4, 4))
    plain = parametrizations.spectral_norm(nn.Conv2d(4, 4, 3, padding=1))
    plain.load_state_dict(layer.state_dict())
    x = Source("cpu").normal(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), plain(F.interpolate(x, scale_factor=2)), rtol=1e-5, atol=1e-5)
    for ours, expected in zip(layer.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


# Blocks whose forward optimize() has rewritten.


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(4, 4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.act, self.layers = nn.SiLU(), nn.ModuleList([nn.Conv2d(4, 4, 1)])
        self.scale, self.shift = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.full((4, 1, 1), 0.2))
        self.shortcut = None
        self.register_buffer("offset", torch.linspace(0, 1, 4).view(4, 1, 1))
        self.register_buffer("table", torch.arange(3.0))
        self.tied = self.scale

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h)
        h = self.layers[0](self.conv2(self.act(h)))
        h = (h + self.shift) * self.scale + self.offset * self.table[1] + self.tied
        return h + (x if self.shortcut is None else self.shortcut(x))


class Adapted(nn.Module):
    """A layer with something of low rank beside it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.beside = layer, nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x):
        return self.layer(x) + self.beside(x)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def pair() -> tuple[Block, Block]:
    """A block and the same one optimized."""
    torch.manual_seed(0)
    block = Block()
    optimized = copy.deepcopy(block)
    lines = []
    fastvae.optimize(optimized, report=lines.append)
    assert lines == ["fused norm1 with functional.silu", "fused norm2 with act"]
    return block, optimized


def inputs() -> torch.Tensor:
    return Source("cpu").normal(2, 4, 6, 6)


def assert_same(block, optimized, x=None):
    x = inputs() if x is None else x
    torch.testing.assert_close(optimized(x), block(x), rtol=1e-5, atol=1e-5)


def seeded(change):
    def apply(block):
        torch.manual_seed(1)
        return change(block)

    return apply


def perturbed_state(block: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value + 0.1 for name, value in block.state_dict().items()}


CHANGES = {
    "an adapter around a convolution": lambda b: setattr(b, "conv1", Adapted(b.conv1)),
    "an adapter in a list": lambda b: b.layers.__setitem__(0, Adapted(b.layers[0])),
    "a new parameter": lambda b: setattr(b, "scale", nn.Parameter(torch.tensor(-0.4))),
    "a new parameter under one of two names": lambda b: setattr(b, "tied", nn.Parameter(torch.tensor(-0.4))),
    "load_state_dict with assign": lambda b: b.load_state_dict(perturbed_state(b), assign=True),
    "load_state_dict": lambda b: b.load_state_dict(perturbed_state(b)),
    "a new buffer": lambda b: setattr(b, "offset", torch.full((4, 1, 1), 3.0)),
    "a new buffer that is indexed": lambda b: setattr(b, "table", torch.full((3,), 3.0)),
    "a buffer that is written": lambda b: b.table.mul_(-2),
    "to another dtype and back": lambda b: b.double().float(),
    "pruning a convolution": lambda b: prune.l1_unstructured(b.conv2, "weight", 0.5),
    "pruning a parameter": lambda b: prune.l1_unstructured(b, "shift", 0.5),
    "a parametrized convolution": lambda b: parametrizations.weight_norm(b.conv1),
    "a parametrized parameter": lambda b: parametrize.register_parametrization(b, "scale", Twice()),
    "checkpointing of a convolution": lambda b: setattr(b, "conv2", checkpoint_wrapper(b.conv2)),
    "checkpointing of a norm": lambda b: setattr(b, "norm1", checkpoint_wrapper(b.norm1)),
    "a hook on a convolution": lambda b: b.conv1.register_forward_hook(double_output),
    "a hook on a norm's input": lambda b: b.norm1.register_forward_pre_hook(double_input),
    "a hook on the activation": lambda b: b.act.register_forward_hook(double_output),
    "another activation": lambda b: setattr(b, "act", nn.Tanh()),
    "another norm before a function": lambda b: setattr(b, "norm1", nn.InstanceNorm2d(4)),
    "another norm before an activation": lambda b: setattr(b, "norm2", nn.Identity()),
    "a norm and an activation": lambda b: (setattr(b, "norm2", nn.Identity()), setattr(b, "act", nn.ReLU())),
    "a hook on the block": lambda b: b.register_forward_hook(double_output),
}


@pytest.mark.parametrize("change", [seeded(change) for change in CHANGES.values()], ids=CHANGES)
def test_an_optimized_block_follows_what_is_done_to_it(change):
    for copied in (lambda m: m, copy.deepcopy, copy.copy):
        block, optimized = pair()
        optimized = copied(optimized)
        assert_same(block, optimized)
        change(block)
        change(optimized)
        assert_same(block, optimized)


@pytest.mark.parametrize("change", [seeded(change) for change in CHANGES.values()], ids=CHANGES)
def test_a_compiled_optimized_block_follows_too(change):
    torch.compiler.reset()
    block, optimized = pair()
    change(block)
    change(optimized)
    x = inputs()
    compiled = torch.compile(optimized, backend="eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_an_optimized_block_has_all_of_its_own(duplicate):
    block, optimized = pair()
    other = duplicate(optimized)
    assert_same(block, other)
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.fill_(0.5)
    assert_same(block, optimized)
    block.load_state_dict(other.state_dict())
    assert_same(block, other)
    assert_same(block, duplicate(other))


def test_functional_call_and_gradients_take_the_tensors_that_are_given():
    block, optimized = pair()
    block.tied = optimized.tied = nn.Parameter(torch.tensor(0.3))
    state, x = perturbed_state(block), inputs()
    torch.testing.assert_close(
        torch.func.functional_call(optimized, state, x), torch.func.functional_call(block, state, x), rtol=1e-5, atol=1e-5
    )
    gradients = [
        torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, x).square().sum())(dict(m.named_parameters()))
        for m in (optimized, block)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
    assert gradients[0]["scale"] != 0


def test_a_submodule_that_comes_or_goes_is_named():
    """The code was traced for one course of its branches."""
    block, optimized = pair()
    optimized.shortcut = nn.Conv2d(4, 4, 1)
    with pytest.raises(RuntimeError, match="shortcut: is there now"):
        optimized(inputs())
    optimized.shortcut = None
    assert_same(block, optimized)


def test_optimizing_twice_changes_nothing():
    block, optimized = pair()
    kind = type(optimized)
    fastvae.optimize(optimized, report=None)
    assert type(optimized) is kind
    assert isinstance(optimized, Block)
    assert_same(block, optimized)


def test_blocks_that_are_alike_share_their_code():
    assert type(pair()[1]) is type(pair()[1])


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)

    def forward(self, x):
        y = x
        y += 1.0
        n = x.shape[0]
        m = n
        n += 1
        return F.silu(self.norm(y)) * n + x * m


def test_arithmetic_in_place_stays_in_place():
    """Another name of the tensor sees it, and so does the caller; a number is another one then."""
    torch.manual_seed(0)
    block = ChangesItsInput()
    optimized = fastvae.optimize(copy.deepcopy(block), report=None)
    assert isinstance(optimized.norm, GroupNormSiLU)
    inputs_, outputs = [inputs(), inputs()], []
    for module, x in zip((block, optimized), inputs_, strict=True):
        outputs.append(module(x))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*inputs_)


class ReadsAWeight(Block):
    def forward(self, x):
        return F.silu(self.norm1(x)) * self.conv1.weight.mean()


class HandsOnASubmodule(Block):
    def forward(self, x):
        conv = self.conv1
        return F.silu(self.norm1(x)) * conv.out_channels


class CallsForward(Block):
    def forward(self, x):
        return F.silu(self.norm1.forward(x))


@pytest.mark.parametrize("kind", [ReadsAWeight, HandsOnASubmodule, CallsForward])
def test_code_that_reads_a_submodule_stays(kind):
    findings = examine(kind())
    assert all(finding.followed_by is None for finding in findings)
    assert "other than by calling it" in findings[0].reason
