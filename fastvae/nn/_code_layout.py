"""How the codes of a quantizer without a learned codebook lie in its input: projections, several codebooks, images and a rotation.

Names, arguments and what a ``state_dict`` holds are those of vector-quantize-pytorch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastvae.ops._autograd import without_autocast
from fastvae.ops._results import accumulation_dtype


def refuse_options(kind: str, given: dict[str, Any], served: dict[str, Any]) -> None:
    """Raises for an option of the original that is not served, unless it has the value in ``served``, which switches it off."""
    for name, value in given.items():
        if name not in served:
            raise TypeError(f"{kind} got an unexpected keyword argument {name!r}")
        if value != served[name]:
            raise NotImplementedError(f"{name}: got {value!r}, {kind} takes {served[name]!r}")


class CodeLayout(nn.Module):
    """The base of :class:`fastvae.nn.LFQ` and :class:`fastvae.nn.FSQ`, which quantize ``(..., num_codebooks, codebook_dim)``."""

    def __init__(
        self,
        dim: int | None,
        codebook_dim: int,
        *,
        num_codebooks: int,
        keep_num_codebooks_dim: bool | None,
        channel_first: bool | None,
        has_projections: bool | None,
        projection_has_bias: bool,
        orthogonal_rotation: bool,
    ):
        super().__init__()
        if num_codebooks < 1:
            raise ValueError(f"num_codebooks: got {num_codebooks}, takes at least 1")
        if keep_num_codebooks_dim is False and num_codebooks > 1:
            raise ValueError(f"keep_num_codebooks_dim: got False for {num_codebooks} codebooks, takes it for one")
        codes_dim = codebook_dim * num_codebooks
        self.dim, self.codebook_dim, self.num_codebooks = codes_dim if dim is None else dim, codebook_dim, num_codebooks
        self.keep_num_codebooks_dim = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        self.channel_first = channel_first
        self.has_projections = self.dim != codes_dim if has_projections is None else has_projections
        if not self.has_projections and self.dim != codes_dim:
            raise ValueError(f"has_projections: got False for dim {self.dim}, takes it for dim {codes_dim}, that of the codes")
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(self.dim, codes_dim, bias=projection_has_bias)
            self.project_out = nn.Linear(codes_dim, self.dim, bias=projection_has_bias)
        self.orthogonal_rotation = orthogonal_rotation
        if orthogonal_rotation:
            self.register_buffer("orthogonal_rot", nn.init.orthogonal_(torch.empty(codebook_dim, codebook_dim)))

    def _has_channels_first(self, positions: int) -> bool:
        """Whether a tensor with so many dimensions of positions has its channels in dimension 1; by default images have."""
        return positions >= 2 if self.channel_first is None else self.channel_first

    def _project_in(self, x: Tensor) -> Tensor:
        """``(..., dim of all codes)`` with the channels last, in the dtype of the projection."""
        if x.ndim < 2:
            raise ValueError(f"x: got shape {tuple(x.shape)}, takes at least two dimensions")
        if self._has_channels_first(x.ndim - 2):
            x = x.movedim(1, -1)
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: got {x.shape[-1]} channels, takes dim, {self.dim}")
        return self.project_in(x)

    def _split(self, x: Tensor) -> Tensor:
        """``(..., num_codebooks, codebook_dim)`` in float32 (float64 for float64), rotated where that is an option."""
        codes = x.to(accumulation_dtype(x.dtype)).unflatten(-1, (self.num_codebooks, self.codebook_dim))
        return self._rotate(codes, back=False)

    def _join(self, codes: Tensor, dtype: torch.dtype, *, channels_first: bool, project_out: bool = True) -> Tensor:
        """The inverse of :meth:`_split`, :meth:`_project_in` and the layout."""
        x = self._rotate(codes, back=True).flatten(-2).to(dtype)
        x = self.project_out(x) if project_out else x
        return x.movedim(-1, 1) if channels_first else x

    def _rotate(self, codes: Tensor, *, back: bool) -> Tensor:
        if not self.orthogonal_rotation:
            return codes
        rotation = self.get_buffer("orthogonal_rot").to(codes.dtype)
        with without_autocast(codes.device):
            return codes @ (rotation.t() if back else rotation)

    def _join_indices(self, indices: Tensor) -> Tensor:
        return indices if self.keep_num_codebooks_dim else indices.squeeze(-1)

    def _split_indices(self, indices: Tensor) -> tuple[Tensor, bool]:
        """Indices with a last dimension for the codebooks, and whether their codes have the channels first."""
        indices = indices if self.keep_num_codebooks_dim else indices.unsqueeze(-1)
        return indices, self._has_channels_first(indices.ndim - 2)
