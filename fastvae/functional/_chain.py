"""Encoders that are chains of linear layers and activations: reading one, running it, and the cheapest order of its Jacobian's products."""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fastvae.functional._modules import call_obstacle, describe, is_exactly, read_obstacle
from fastvae.ops._results import accumulation_dtype
from fastvae.ops.jacobian import ACTIVATIONS
from fastvae.reference.jacobian import derivative

_DROPOUTS = (nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)


class NotAChain(ValueError):
    """The encoder has a layer that the closed form and the Gram form cannot serve; the message names it."""


class Layer(NamedTuple):
    """A linear layer and what follows it up to the next: batch-norm in evaluation mode, and at most one activation."""

    linear: nn.Linear
    followers: list[nn.Module]


class Affine(NamedTuple):
    """A :class:`Layer` with its parameters, which are read once a call: a parametrization computes them anew at each reading, and that of
    spectral_norm takes a step of its power iteration."""

    weight: Tensor
    bias: Tensor | None
    followers: list[nn.Module]


class Link(NamedTuple):
    """One factor of a Jacobian: ``diag(slopes of hidden) weight``, the hidden values ``(batch, units)``, the weight ``(units, inputs)``."""

    weight: Tensor
    hidden: Tensor
    activation: str
    alpha: float

    def slopes(self) -> Tensor:
        return derivative(self.hidden.to(self.weight.dtype), self.activation, self.alpha)


def read_chain(encoder: nn.Module, dimensions: int) -> list[Layer]:
    """The layers of an MLP for an input of so many dimensions. Raises :class:`NotAChain`, naming the layer that is in the way."""
    layers: list[Layer] = []
    for name, module in _leaves(encoder, ""):
        if is_exactly(module, nn.Linear):
            if dimensions != 2:
                raise NotAChain(_in_the_way(name, module, f"gets an input of {dimensions} dimensions and not (batch, features)"))
            layers.append(Layer(module, []))
        elif is_exactly(module, nn.Flatten) and not layers and (module.start_dim, module.end_dim) == (1, -1):
            dimensions = 2
        elif not _does_nothing(name, module):
            _check_follower(name, module, layers)
            layers[-1].followers.append(module)
    if not layers:
        raise NotAChain("the encoder has no Linear layer")
    return layers


def _leaves(module: nn.Module | None, name: str):
    """The modules that a call of ``module`` calls, in order, each as often as it is called."""
    if isinstance(module, nn.Sequential) and is_exactly(module, nn.Sequential) and type(module).__iter__ is nn.Sequential.__iter__:
        if reason := call_obstacle(module):
            raise NotAChain(_in_the_way(name, module, reason))
        # named_children() would leave out a module that comes a second time.
        for child_name, child in module._modules.items():
            yield from _leaves(child, f"{name}.{child_name}" if name else child_name)
        return
    if isinstance(module, nn.Module) and (reason := read_obstacle(module)):
        raise NotAChain(_in_the_way(name, module, reason))
    yield name, module


def _does_nothing(name: str, module: nn.Module) -> bool:
    dropout = any(is_exactly(module, kind) for kind in _DROPOUTS)
    if dropout and module.training and cast("nn.Dropout", module).p > 0:
        raise NotAChain(_in_the_way(name, module, "is in training mode"))
    return dropout or is_exactly(module, nn.Identity)


def _check_follower(name: str, module: nn.Module, layers: list[Layer]) -> None:
    norm = is_exactly(module, nn.BatchNorm1d)
    if norm and (module.training or module.running_var is None):
        raise NotAChain(_in_the_way(name, module, "is in training mode, where it mixes samples"))
    if norm and is_parametrized(module):
        raise NotAChain(_in_the_way(name, module, "is parametrized"))
    if not norm and activation_of(module) is None:
        raise NotAChain(_in_the_way(name, module, "is not one of Linear, a known activation, Dropout, BatchNorm1d, a leading Flatten"))
    if not layers:
        raise NotAChain(_in_the_way(name, module, "comes before the first Linear layer"))
    if not norm and any(activation_of(follower) for follower in layers[-1].followers):
        raise NotAChain(_in_the_way(name, module, "follows another activation"))


def _in_the_way(name: str, module: nn.Module, reason: str) -> str:
    place = f"layer {name!r}, {describe(module)}," if name else f"the encoder, {type(module).__name__},"
    return f"{place} {reason}"


def activation_of(module: nn.Module) -> tuple[str, float] | None:
    """The operators' name of an activation and its parameter."""
    for name, activation in ACTIVATIONS.items():
        if is_exactly(module, activation.module) and all(getattr(module, key) == value for key, value in activation.settings):
            return name, getattr(module, activation.parameter) if activation.parameter else 0.0
    return None


def read_parameters(layers: list[Layer]) -> list[Affine]:
    return [Affine(linear.weight, linear.bias, followers) for linear, followers in layers]


def encode_chain(layers: list[Affine], x: Tensor) -> tuple[list[Link], Tensor]:
    """The factors of the Jacobian, first layer first, their weights in the accumulation dtype; and the code of ``x``."""
    value = x.flatten(1) if x.ndim > 2 else x
    links, values = zip(*_walk(layers, value), strict=True)
    return list(links), values[-1]


def _walk(layers: list[Affine], value: Tensor):
    for layer in layers:
        value = F.linear(value, layer.weight, layer.bias)
        weight = layer.weight.to(accumulation_dtype(layer.weight.dtype))
        hidden, activation, alpha = value, "identity", 0.0
        for follower in layer.followers:
            if isinstance(follower, nn.BatchNorm1d):
                weight = weight * _gain(follower).to(weight.dtype).unsqueeze(1)
                value = follower(value)
                continue
            activation, alpha = cast("tuple[str, float]", activation_of(follower))
            before = value
            value = follower(value.clone() if getattr(follower, "inplace", False) else value)
            hidden = before if ACTIVATIONS[activation].from_preactivation else value
        # Without an activation any tensor of the shape serves; without a batch-norm after it, the hidden value is the layer's output.
        yield Link(weight, hidden, activation, alpha), value


def _gain(norm: nn.BatchNorm1d) -> Tensor:
    gain = torch.rsqrt(cast("Tensor", norm.running_var) + norm.eps)
    return gain if norm.weight is None else gain * norm.weight


class Plan(NamedTuple):
    """How the Jacobian's norm is multiplied out.

    The layers up to ``meet`` are multiplied from below: explicitly up to ``gram_at``, there into the product with its own transpose, and
    that is carried on; with ``None`` explicitly all the way. The layers above ``meet`` are multiplied from the top. ``operations`` is the
    number of multiplications of a batch.
    """

    gram_at: int | None
    meet: int
    operations: int


def plan(sizes: tuple[int, ...], batch: int) -> Plan:
    """The cheapest plan for an MLP of these sizes, input first, and a batch; pure arithmetic."""
    depth = len(sizes) - 1
    plans = [Plan(None, meet, _operations(sizes, batch, None, meet)) for meet in range(1, depth + 1)]
    plans += [Plan(gram_at, meet, _operations(sizes, batch, gram_at, meet)) for meet in range(1, depth) for gram_at in range(1, meet + 1)]
    cheapest = plans[0]
    for other in plans[1:]:
        # min() with a key is not traced by torch.compile where the batch is dynamic.
        if other.operations < cheapest.operations:
            cheapest = other
    return cheapest


def _operations(sizes: tuple[int, ...], batch: int, gram_at: int | None, meet: int) -> int:
    inputs, outputs, depth = sizes[0], sizes[-1], len(sizes) - 1
    explicit_to = meet if gram_at is None else gram_at
    each = sum(sizes[layer] * sizes[layer - 1] * inputs for layer in range(2, explicit_to + 1))
    shared = 0
    if gram_at == 1:
        shared = sizes[1] ** 2 * inputs
    elif gram_at is not None:
        each += sizes[gram_at] ** 2 * inputs
    if gram_at is not None:
        each += sum(sizes[layer] * sizes[layer - 1] * (sizes[layer] + sizes[layer - 1]) for layer in range(gram_at + 1, meet + 1))
    each += sum(outputs * sizes[layer] * sizes[layer - 1] for layer in range(meet + 1, depth))
    if meet < depth:
        each += outputs * sizes[meet] * (inputs if gram_at is None else sizes[meet])
    return batch * each + shared
