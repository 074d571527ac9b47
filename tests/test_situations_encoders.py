"""What users do to an encoder whose Jacobian is read layer by layer: share layers, hang hooks on them, parametrize and replace them. The
norm is that of calling it."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from _helpers import Source
from _modules import double_input, double_output, one_process, shard
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from torch.nn.utils import parametrizations, prune

from fastvae import functional as FV
from fastvae.models import ContractiveAE


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
