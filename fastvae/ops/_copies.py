"""Copies that a compiler keeps: it may take the source of a plain copy for the copy, and find there what was written to it since."""

import torch

torch.library.define("fastvae::snapshot", "(Tensor tensor) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("fastvae::snapshot", torch.empty_like)

torch.library.define("fastvae::kept", "(Tensor value) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


@torch.library.impl("fastvae::kept", "CompositeExplicitAutograd")
@torch.library.register_fake("fastvae::kept")
def kept(value: torch.Tensor) -> torch.Tensor:
    """A copy of ``value``, on every device, that torch.compile keeps for the backward pass. Of a plain copy it may keep the source: a
    buffer, which the next step changes before the backward pass comes."""
    return value.clone()
