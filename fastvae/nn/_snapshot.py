"""A copy that torch.compile keeps. Of a plain clone it may keep the source for the backward pass, and find there what was written since."""

import torch
from torch import Tensor

from fastvae._torch_private import in_backward_pass

torch.library.define("fastvae::snapshot", "(Tensor tensor, bool once) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.register_fake("fastvae::snapshot")
def _empty_snapshot(tensor: Tensor, once: bool) -> Tensor:
    return torch.empty_like(tensor)


@torch.library.impl("fastvae::snapshot", "CompositeExplicitAutograd")
def _snapshot(tensor: Tensor, once: bool) -> Tensor:
    if once and in_backward_pass():
        raise RuntimeError(
            "a compiled quantizer runs again in a backward pass, where it cannot see the codebook of the first pass: "
            "compile the code around torch.utils.checkpoint, not the code inside"
        )
    return tensor.clone()


def snapshot(tensor: Tensor, *, once: bool = False) -> Tensor:
    """A copy of ``tensor`` in a compiled graph; ``once`` refuses to take it in a recomputation, which would see another value."""
    return torch.ops.fastvae.snapshot(tensor, once)
