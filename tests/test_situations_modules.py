"""What users do to modules: share them, hang hooks on them, parametrize, wrap and replace them. Where a module is read, or one takes the
place of another, the result is that of calling it."""

import copy
import itertools
import pickle
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastvae
from fastvae import functional as FV
from fastvae.models import ContractiveAE
from fastvae.models.image_vae import ResidualBlock
from fastvae.nn import GroupNormSiLU, UpsampleConv2d
from fastvae.nn.optimize import examine


@contextmanager
def one_process():
    """A process group of this process, for DTensor."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def shard(layer: nn.Module) -> nn.Module:
    """Makes the parameters of a layer DTensors."""
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    return distributed.tensor.distribute_module(layer, mesh)


# Encoders that are read: the norm of the Jacobian.


def jacobian_norm(encoder: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The mean over samples, from the encoder as it is called."""
    jacobians = torch.autograd.functional.jacobian(lambda x: encoder(x).sum(0), x, create_graph=True)
    return jacobians.square().sum() / len(x)


def vectors(count: int = 5) -> torch.Tensor:
    return Source("cpu", torch.float64).normal(count, 6)


def assert_norm_is_that_of_calling(encoder: nn.Module, x: torch.Tensor, **options) -> None:
    """In value and gradients; random projections are exact for an encoder of one output."""
    parameters = list(encoder.parameters())
    results = [FV.jacobian_frobenius(encoder, x, **options), jacobian_norm(encoder, x)]
    torch.testing.assert_close(*results)
    ours, expected = (torch.autograd.grad(norm, parameters, allow_unused=True, materialize_grads=True) for norm in results)
    torch.testing.assert_close(ours, expected)


def shared_activation():
    act = nn.Sigmoid()
    return nn.Sequential(nn.Linear(6, 5), act, nn.Linear(5, 4), act)


def shared_layer():
    layer, act = nn.Linear(6, 6), nn.Tanh()
    return nn.Sequential(layer, act, layer, act, nn.Linear(6, 3))


def shared_block():
    block = nn.Sequential(nn.Linear(6, 6), nn.Softplus())
    return nn.Sequential(block, nn.Sequential(block, block), nn.Linear(6, 2))


@pytest.mark.parametrize("make", [shared_activation, shared_layer, shared_block])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_layer_that_comes_twice_counts_twice(make, chunk_size):
    torch.manual_seed(0)
    encoder = make().double()
    assert FV.explain_jacobian_method(encoder, vectors()).method == "gram"
    assert_norm_is_that_of_calling(encoder, vectors(), chunk_size=chunk_size)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Sigmoid(), nn.Identity(), nn.Dropout(0.5), nn.Sequential(nn.Linear(5, 1))).double().eval()


def with_hook(name: str, register: str, hook):
    def make():
        encoder = mlp()
        getattr(encoder.get_submodule(name), register)(hook)
        return encoder

    return make


def double_output(module, inputs, output):
    return 2 * output


def double_input(module, inputs):
    return (2 * inputs[0],)


def with_old_weight_norm():
    encoder = mlp()
    with pytest.warns(FutureWarning, match="weight_norm"):
        encoder[0] = nn.utils.weight_norm(encoder[0])
    with torch.no_grad():
        encoder[0].weight_g.mul_(3)
    return encoder


def with_pruned_weight():
    encoder = mlp()
    prune.l1_unstructured(encoder[0], "weight", 0.5)
    return encoder


def with_replaced_forward():
    encoder = mlp()
    encoder[0].forward = lambda x, layer=encoder[0]: 2 * F.linear(x, layer.weight, layer.bias)
    return encoder


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubling(nn.Identity):
    def forward(self, x):
        return 2 * x


class AlwaysDropsHalf(nn.Dropout):
    def forward(self, x):
        return x * (torch.arange(x.shape[1]) % 2)


class SquaringNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).square()


class OwnCall(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed(list(super().__iter__()))


def with_layer(index: int, layer: nn.Module):
    def make():
        encoder = mlp()
        encoder[index] = copy.deepcopy(layer).double().eval()
        return encoder

    return make


def backwards():
    torch.manual_seed(0)
    return Backwards(nn.Linear(5, 1), nn.Linear(6, 5)).double()


def lazy():
    torch.manual_seed(0)
    return nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 1)).double()


CALLED = {
    "forward hook on a layer": (with_hook("0", "register_forward_hook", double_output), "layer '0', Linear.* has hooks"),
    "forward hook on an activation": (with_hook("1", "register_forward_hook", double_output), "layer '1', Sigmoid.* has hooks"),
    "forward hook on a dropout that is off": (with_hook("3", "register_forward_hook", double_output), "layer '3', Dropout.* has hooks"),
    "forward hook on a nested container": (with_hook("4", "register_forward_hook", double_output), "layer '4', Sequential"),
    "forward hook on the encoder": (with_hook("", "register_forward_hook", double_output), "the encoder, Sequential, has hooks"),
    "pre-hook on a layer": (with_hook("0", "register_forward_pre_hook", double_input), "has hooks"),
    "pre-hook on the encoder": (with_hook("", "register_forward_pre_hook", double_input), "has hooks"),
    "the hook of the older weight_norm": (with_old_weight_norm, "has hooks"),
    "pruning": (with_pruned_weight, "has hooks"),
    "a replaced forward": (with_replaced_forward, "layer '0', Linear.* has a forward of its own"),
    "a subclass of Linear": (with_layer(0, Scaled(6, 5)), "layer '0', Scaled"),
    "a subclass of Identity": (with_layer(2, Doubling()), r"layer '2', Doubling\(\), is not one of"),
    "a subclass of Dropout": (with_layer(3, AlwaysDropsHalf()), "layer '3', AlwaysDropsHalf"),
    "a subclass of BatchNorm1d": (with_layer(2, SquaringNorm(5)), "layer '2', SquaringNorm"),
    "a parametrized BatchNorm1d": (with_layer(2, parametrizations.weight_norm(nn.BatchNorm1d(5), dim=None)), "is parametrized"),
    "a __call__ of its own": (with_layer(0, OwnCall(6, 5)), "has a __call__ of its own"),
    "another order": (backwards, "the encoder, Backwards"),
    "a lazy layer": (lazy, r"layer '0', LazyLinear.* is lazy and has seen no data"),
}


@pytest.mark.parametrize(("make", "reason"), CALLED.values(), ids=CALLED)
def test_an_encoder_that_does_more_than_its_class_is_called(make, reason):
    encoder, x = make(), vectors()
    explanation = FV.explain_jacobian_method(encoder, x)
    assert explanation.method == "projection"
    with pytest.raises(ValueError, match=rf"method: got 'gram', but .*{reason}.*use method='projection'"):
        FV.jacobian_frobenius(encoder, x, method="gram")
    assert_norm_is_that_of_calling(encoder, x)


def test_a_lazy_encoder_is_read_once_it_has_seen_data():
    encoder, x = lazy(), vectors()
    encoder(x)
    assert FV.explain_jacobian_method(encoder, x).method == "gram"
    assert_norm_is_that_of_calling(encoder, x, method="gram")


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_full_backward_hook])
def test_hooks_for_all_modules_see_the_layers_of_an_encoder(register):
    encoder, x, seen = mlp(), vectors(), []
    handle = register(lambda module, *_: seen.append(module))
    try:
        FV.jacobian_frobenius(encoder, x).backward()
        assert "for all modules" in FV.explain_jacobian_method(encoder, x).reason
    finally:
        handle.remove()
    assert {*seen} >= {encoder, *encoder.modules()}
    assert FV.explain_jacobian_method(encoder, x).method == "gram"


def test_hooks_on_the_encoder_of_a_contractive_autoencoder_fire_once_a_call():
    encoder, x, calls = mlp().float(), vectors().float(), []
    model = ContractiveAE(encoder, nn.Linear(1, 6))
    encoder.register_forward_hook(lambda *_: calls.append("forward"))
    encoder[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    for _ in range(2):
        calls.clear()
        model(x).loss.backward()
        assert calls.count("forward") == 1
        assert "backward" in calls
    assert encoder[0].weight.grad.isfinite().all()


def test_an_encoder_of_distributed_tensors_is_called():
    """Its weights answer each operator in their own way, so the operators of the closed form do not get them."""
    with one_process():
        encoder = nn.Sequential(shard(nn.Linear(6, 5)), nn.Tanh())
        explanation = FV.explain_jacobian_method(encoder, vectors())
    assert explanation.method == "projection"
    assert "layer '0'" in explanation.reason
    assert "holds a DTensor" in explanation.reason


PARAMETRIZATIONS = {"weight_norm": parametrizations.weight_norm, "spectral_norm": parametrizations.spectral_norm}


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS.values(), ids=PARAMETRIZATIONS)
@pytest.mark.parametrize(("sizes", "method"), [((6, 4), "closed_form"), ((6, 5, 4), "gram")])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_parametrized_layers_are_read(parametrization, sizes, method, chunk_size):
    torch.manual_seed(0)
    layers = [parametrization(nn.Linear(a, b)) for a, b in itertools.pairwise(sizes)]
    encoder = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh()))).double().eval()
    assert FV.explain_jacobian_method(encoder, vectors()).method == method
    assert_norm_is_that_of_calling(encoder, vectors(), chunk_size=chunk_size)


@pytest.mark.parametrize("method", ["auto", "gram", "projection", "autograd"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_power_iteration_takes_one_step_a_call(method, chunk_size):
    """As many as the encoder is called: projections and autograd call it for each chunk."""
    torch.manual_seed(0)
    encoder = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 4)).double()
    called, x = copy.deepcopy(encoder), vectors(4)
    for _ in range(2 if chunk_size and method in ("projection", "autograd") else 1):
        called(x)
    FV.jacobian_frobenius(encoder, x, method=method, chunk_size=chunk_size).backward()
    for ours, expected in zip(encoder.buffers(), called.buffers(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_recomputed_chunks_start_from_the_buffers_of_the_first_pass():
    """The gradient is that of the forward pass, though power iteration and batch statistics have moved since; they move once a chunk."""
    torch.manual_seed(0)
    layer = parametrizations.spectral_norm(nn.Linear(6, 5))
    encoder = nn.Sequential(layer, nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    by_hand, x = copy.deepcopy(encoder), vectors(6)
    norm = FV.jacobian_frobenius(encoder, x, method="projection", chunk_size=3, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    parts = [FV.jacobian_frobenius(by_hand, part, method="projection", reduction="sum", generator=generator) for part in x.split(3)]
    expected = sum(parts) / 6
    torch.testing.assert_close(norm, expected)
    for _ in range(2):
        ours, theirs = (
            torch.autograd.grad(value, list(module.parameters()), retain_graph=True, allow_unused=True, materialize_grads=True)
            for value, module in ((norm, encoder), (expected, by_hand))
        )
        torch.testing.assert_close(ours, theirs)
    assert encoder[1].num_batches_tracked == 2
    for ours, theirs in zip(encoder.buffers(), by_hand.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


# Modules that take over the parameters of others.


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


# The residual block, whose sum is in place where nobody looks.


def residual_block() -> tuple[ResidualBlock, torch.Tensor]:
    torch.manual_seed(0)
    return ResidualBlock(8, 8, 4), Source("cpu").normal(2, 8, 6, 6).requires_grad_()


def plain_sum(block: ResidualBlock, x: torch.Tensor) -> torch.Tensor:
    return block.conv2(block.norm2(block.conv1(block.norm1(x)))) + block.shortcut(x)


def test_what_a_hook_keeps_of_a_residual_block_stays_as_it_was():
    block, x = residual_block()
    kept = []
    for layer in (block.conv1, block.conv2, block.shortcut, block.norm1, block.norm2):
        layer.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    output = block(x)
    assert all(torch.equal(now, then) for now, then in kept)
    torch.testing.assert_close(output, plain_sum(block, x))


def test_hooks_for_all_modules_keep_what_they_saw():
    block, x = residual_block()
    kept = []
    handle = register_module_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    try:
        block(x)
    finally:
        handle.remove()
    assert all(torch.equal(now, then) for now, then in kept)


@pytest.mark.parametrize("names", [["conv2"], [""], ["conv1", "norm2", "shortcut", "conv2", ""]], ids=str)
def test_full_backward_hooks_on_a_residual_block(names):
    block, x = residual_block()
    expected = torch.autograd.grad(plain_sum(block, x).square().sum(), x)[0]
    seen = []
    for name in names:
        block.get_submodule(name).register_full_backward_hook(lambda module, *_: seen.append(module))
    block(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert len(seen) == len(names)


def test_selective_activation_checkpointing_of_a_residual_block():
    """It keeps what convolutions gave, and refuses it where it was changed since."""
    block, x = residual_block()
    expected = torch.autograd.grad(plain_sum(block, x).square().sum(), x)[0]

    def keeps(context, operator, *args, **kwargs):
        convolution = operator is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE

    output = checkpoint(block, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(keeps))
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x)[0], expected)


def test_a_residual_block_promotes_as_a_sum_does():
    block, x = residual_block()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x).dtype == plain_sum(block, x).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_a_residual_block_under_function_transforms():
    block, x = residual_block()
    rows = torch.func.vmap(lambda row: block(row[None])[0])(x)
    torch.testing.assert_close(rows, plain_sum(block, x), rtol=1e-5, atol=1e-5)
