"""What :func:`fastvae.optimize` makes of modules so that a normalisation and the convolution behind it keep one input."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.functional._modules import call_obstacle
from fastvae.nn.norm_act_conv import lean_obstacle, norm_then_conv


class LeanSequential(nn.Sequential):
    """An :class:`torch.nn.Sequential` that calls a normalisation and the convolution behind it at once. What it holds is looked at in each
    call, so modules may be replaced, hooked and parametrized as before."""

    def forward(self, input: Tensor) -> Tensor:
        pairs = lean_pairs(self)
        called_before = set(pairs.values())
        for name, module in self._modules.items():
            if name in pairs:
                input = norm_then_conv(module, self.get_submodule(pairs[name]), input)
            elif name not in called_before:
                input = module(input)
        return input


def lean_pairs(modules: nn.Sequential) -> dict[str, str]:
    """The names of the normalisations whose next module but for identities is a convolution that can be called with them, and its name."""
    doing_something = [(name, module) for name, module in modules._modules.items() if not is_identity(module)]
    return {name: other for (name, norm), (other, conv) in pairwise(doing_something) if lean_obstacle(norm, conv) is None}


def is_identity(module: object) -> bool:
    """Whether a call of ``module`` gives its argument and does nothing else."""
    return type(module) is nn.Identity and call_obstacle(module) is None


def residual_block_obstacle(block: Any, temb: Tensor | None = None) -> str | None:
    """Why a residual block of diffusers, whose norms do their activation, has to run its own code; None where
    :func:`residual_block` gives the same."""
    if temb is not None or block.time_emb_proj is not None or block.time_embedding_norm == "scale_shift":
        return "takes a time embedding"
    if block.upsample is not None or block.downsample is not None:
        return "changes the size of images"
    if not _drops_nothing(block.dropout):
        return "does something between a norm and its convolution"
    if not is_identity(block.nonlinearity):
        return "has another activation"
    return lean_obstacle(block.norm1, block.conv1) or lean_obstacle(block.norm2, block.conv2)


def has_lean_forward(cls: type[nn.Module]) -> bool:
    """Whether the ``forward`` of a class keeps one input of a normalisation and the convolution behind it."""
    names: Any = getattr(cls.forward, "__globals__", {})
    return cls is LeanSequential or names.get("residual_block") is residual_block or names.get("delayed_norm") is delayed_norm


def _drops_nothing(dropout: Any) -> bool:
    if type(dropout) is not nn.Dropout or call_obstacle(dropout):
        return False
    return dropout.p == 0 or not dropout.training


def residual_block(block: Any, original: Callable, input: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
    """A residual block of diffusers without a time embedding, or its ``original`` code where it is more than that now."""
    if residual_block_obstacle(block, temb):
        return original(block, input, temb, *args, **kwargs)
    hidden = norm_then_conv(block.norm2, block.conv2, norm_then_conv(block.norm1, block.conv1, input))
    if block.conv_shortcut is not None:
        # As the original does, so that the gradient has the strides that DDP expects.
        input = _of_contiguous(block.conv_shortcut, input) if block.training else block.conv_shortcut(input)
    return (input + hidden) / block.output_scale_factor


def _of_contiguous(conv: nn.Module, input: Tensor) -> Tensor:
    """``conv(input.contiguous())``, for whose backward pass the copy is made again, because ``input`` is kept by others."""
    copied = input.contiguous()
    if copied is input or torch.compiler.is_compiling():
        return conv(copied)
    source = input.detach()

    def pack(saved: Tensor) -> Tensor | None:
        return None if saved.data_ptr() == copied.data_ptr() and saved.shape == copied.shape else saved

    def unpack(packed: Tensor | None) -> Tensor:
        return source.contiguous() if packed is None else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return conv(copied)


def delayed_norm(parent: Any, norm: str, act: str, conv: str, input: Tensor) -> Tensor:
    """The output of a normalisation in the code of a ``forward``; its input where :func:`conv_of_delayed` normalises too."""
    return input if is_delayed_pair(parent, norm, act, conv) else parent.get_submodule(norm)(input)


def conv_of_delayed(parent: Any, norm: str, act: str, conv: str, input: Tensor) -> Tensor:
    """The output of the convolution behind the normalisation and an activation."""
    module = parent.get_submodule(conv)
    return norm_then_conv(parent.get_submodule(norm), module, input) if is_delayed_pair(parent, norm, act, conv) else module(input)


def is_delayed_pair(parent: Any, norm: str, act: str, conv: str) -> bool:
    """Whether nothing but an identity lies between a normalisation and a convolution that can be called with it."""
    return is_identity(parent.get_submodule(act)) and lean_obstacle(parent.get_submodule(norm), parent.get_submodule(conv)) is None


# The code of a lean residual block, whose class is made from it as from that of a traced module.
RESIDUAL_BLOCK_FORWARD = """
def forward(self, input_tensor, temb=None, *args, **kwargs):
    return residual_block(self, original, input_tensor, temb, *args, **kwargs)
"""
