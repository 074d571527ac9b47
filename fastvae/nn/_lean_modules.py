"""What :func:`fastvae.optimize` makes of modules so that a normalisation and the convolution behind it keep one input."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

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
        input = block.conv_shortcut(input.contiguous() if block.training else input)
    return (input + hidden) / block.output_scale_factor


# The code of a lean residual block, whose class is made from it as from that of a traced module.
RESIDUAL_BLOCK_FORWARD = """
def forward(self, input_tensor, temb=None, *args, **kwargs):
    return residual_block(self, original, input_tensor, temb, *args, **kwargs)
"""
