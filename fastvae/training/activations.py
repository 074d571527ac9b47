"""Activation checkpointing: the layers of encoders and decoders keep their inputs alone for the backward pass."""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvae.models import ContractiveAE, HierarchicalVAE


def checkpoint_activations(network: nn.Module) -> None:
    """Lets each layer of the encoders and decoders keep its input alone, from which the backward pass computes the rest again.

    The network is changed in place; names and types of its modules stay. An encoder that is an ``nn.Sequential`` has its entries as layers,
    any other is one layer. The encoder of a :class:`~fastvae.models.ContractiveAE` keeps its activations: the closed forms of its penalty
    take the encoder apart, and a layer whose ``forward`` is replaced would have the penalty estimated. The networks of the levels of a
    :class:`~fastvae.models.HierarchicalVAE` are its decoder's.

    Args:
        network: has modules whose names end in ``encoder`` or ``decoder``.
    """
    endings = ("decoder",) if isinstance(network, ContractiveAE) else ("encoder", "decoder")
    coders = [module for name, module in network.named_children() if name.endswith(endings)]
    if isinstance(network, HierarchicalVAE):
        coders += [module for level in network.levels for module in level.children()]
    if not coders:
        raise ValueError(f"gradient_checkpointing: got {type(network).__name__}, takes a network with an encoder or a decoder")
    layers = [layer for coder in coders for layer in (coder if isinstance(coder, nn.Sequential) else [coder])]
    # A layer that stands in two places is checkpointed once.
    for layer in dict.fromkeys(layers):
        layer.forward = functools.partial(_checkpointed, layer, layer.forward)


def _checkpointed(layer: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    if torch.compiler.is_compiling():
        # The compiler separates writes to buffers from what it recomputes.
        return checkpoint(forward, *inputs, use_reentrant=False)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), _BuffersReplaced(layer, before)))


class _BuffersReplaced:
    """Runs a recomputation on copies of the buffers of the first pass: it sees the same values, and running statistics move once.

    No generator, because torch enters it again for each backward pass over the same graph.
    """

    def __init__(self, layer: nn.Module, values: dict[str, Tensor]):
        self.layer, self.values = layer, values
        self.buffers: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        self.buffers = dict(self.layer.named_buffers())
        _set_buffers(self.layer, {name: value.clone() for name, value in self.values.items()})

    def __exit__(self, *_: Any) -> None:
        _set_buffers(self.layer, self.buffers)


def _set_buffers(layer: nn.Module, buffers: dict[str, Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(layer.get_submodule(owner), last, buffer)
