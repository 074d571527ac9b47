"""Tries the changes of optimize() on copies of a module, and compares what they give with what the module gives."""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.nn._finding import Finding

# Changes a module, but for the findings that the mapping has a reason for, by their names.
Change = Callable[[nn.Module, Mapping[str, str]], list[Finding]]


def refusals(module: nn.Module, change: Change, example_inputs: tuple | dict[str, Any]) -> dict[str, str]:
    """What has to stay so that ``change`` keeps outputs and gradients: the names of findings, each with what it would change."""
    if not isinstance(example_inputs, tuple | dict):
        raise TypeError(f"example_inputs: got {type(example_inputs).__name__}, takes a tuple of arguments or a dict of keyword arguments")
    expected = _results(copy.deepcopy(module), example_inputs)
    if _results(copy.deepcopy(module), example_inputs).difference(expected):
        raise ValueError("example_inputs: the module gives something else in each call of them, so a change cannot be told")
    attempt = partial(_attempt, module, change, example_inputs, expected)
    names, reason = attempt({})
    if reason is None:
        return {}
    refused: dict[str, str] = {}
    # The norms of one module may share an activation, so they are tried together.
    for owner in {name.rpartition(".")[0] for name in names}:
        owned = {name for name in names if name.rpartition(".")[0] == owner}
        _, alone = attempt(dict.fromkeys(names - owned, reason))
        if alone is not None:
            refused |= dict.fromkeys(owned, alone)
    _, rest = attempt(refused)
    return refused if rest is None else dict.fromkeys(names, reason)


def _attempt(
    module: nn.Module, change: Change, example_inputs: tuple | dict[str, Any], expected: "_Results", refused: Mapping[str, str]
) -> tuple[set[str], str | None]:
    """The names of the findings that were changed in a copy, and what that does to the results."""
    trial = copy.deepcopy(module)
    names = {finding.name for finding in change(trial, refused) if finding.followed_by}
    return names, _results(trial, example_inputs).difference(expected)


@dataclass(frozen=True)
class _Results:
    """The outputs of a call and the gradients of parameters and inputs, each by its name in a message, and the unit of rounding, which is
    that of the coarsest type."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]
    eps: float

    def difference(self, expected: "_Results") -> str | None:
        """What differs most, where that is more than rounding makes of it; None where nothing does."""
        worst, message = 1.0, None
        for ours, theirs in ((self.outputs, expected.outputs), (self.gradients, expected.gradients)):
            if ours.keys() != theirs.keys():
                return f"it changes whether there is {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
            largest = max(map(_magnitude, theirs.values()), default=0.0)
            for name, tensor in theirs.items():
                allowed = _allowed(_magnitude(tensor), largest, expected.eps)
                error = _error(ours[name], tensor)
                if error > worst * allowed:
                    worst = error / allowed if allowed else math.inf
                    message = f"it changes {name}, whose largest element is {_magnitude(tensor):.3g}, by {error:.3g}"
        return message


def _allowed(magnitude: float, largest: float, eps: float) -> float:
    """How far a tensor may be from another way to compute it: each layer amplifies rounding, and where terms cancel as in the bias before a
    norm, it is rounding of the largest tensors that is left."""
    return 3.0 * eps**0.5 * magnitude + 8.0 * eps * largest


def _magnitude(tensor: Tensor) -> float:
    return tensor.nan_to_num().abs().max().item() if tensor.numel() else 0.0


def _error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where shapes differ or one of two elements is NaN."""
    if actual.shape != expected.shape:
        return math.inf
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return _magnitude((actual - expected).masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf))


def _results(module: nn.Module, example_inputs: tuple | dict[str, Any]) -> _Results:
    inputs = _copied(example_inputs)
    sources = {f"input {path}": tensor for path, tensor in _tensors(inputs)} | dict(module.named_parameters())
    devices = {tensor.device for tensor in sources.values() if tensor.device.type == "cuda"}
    with torch.enable_grad(), torch.random.fork_rng(devices):
        outputs = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
        named = {f"output {path}".strip(): tensor for path, tensor in _tensors(outputs)}
        if not named:
            raise ValueError(f"example_inputs: the module gives a {type(outputs).__name__} without tensors of floating point for them")
        gradients = _gradients(list(named.values()), {name: t for name, t in sources.items() if t.requires_grad})
    types = {tensor.dtype for tensor in (*sources.values(), *named.values()) if tensor.is_floating_point()}
    types |= {torch.get_autocast_dtype(kind) for kind in {t.device.type for t in named.values()} if torch.is_autocast_enabled(kind)}
    return _Results({name: tensor.detach() for name, tensor in named.items()}, gradients, max(torch.finfo(dtype).eps for dtype in types))


def _gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a sum of the outputs' elements with random weights: the sum alone has none behind a norm."""
    generator = torch.Generator().manual_seed(0)
    terms = [(output * torch.randn(output.shape, generator=generator).to(output)).sum() for output in outputs if output.requires_grad]
    if not terms or not leaves:
        return {}
    gradients = torch.autograd.grad(terms, list(leaves.values()), allow_unused=True)
    return {f"the gradient of {name}": grad for name, grad in zip(leaves, gradients, strict=True) if grad is not None}


def _copied(inputs: tuple | dict[str, Any]) -> tuple | dict[str, Any]:
    """A module may write into its inputs, and draw from generators among them."""
    memo = {id(tensor): tensor.detach().clone().requires_grad_(tensor.requires_grad) for _, tensor in _tensors(inputs)}
    return copy.deepcopy(inputs, memo)


def _tensors(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of floating point in a value, each with the keys, indices and fields that lead to it."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{path}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{path}.{index}".removeprefix("."))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(vars(value), path)
