"""Finite scalar quantization: each dimension of a vector is rounded to one of a few levels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.nn._code_layout import CodeLayout, refuse_options

# Options of the original that are not served, with the values that switch them off.
_SERVED = {"scale": None, "allowed_dtypes": (torch.float32, torch.float64), "force_quantization_f32": True}
# The bound of a level is wider than its values by this share, so that the outermost ones are reached.
_EPS = 1e-3
# With more levels that share is half a level.
_MOST_LEVELS = 1000
_MOST_CODES = 2**31 - 1


class FSQ(CodeLayout):
    r"""Finite scalar quantization (Mentzer et al., *Finite Scalar Quantization: VQ-VAE Made Simple*, 2023), with the names, arguments and
    results of ``vector_quantize_pytorch.FSQ``.

    .. math:: c_d = \mathrm{round}\big(\tfrac{L_d - 1}{2} (1 + \epsilon) \tanh(x_d + b_d) - o_d\big) \big/ \lfloor L_d / 2 \rfloor

    where :math:`o_d` is 1/2 for an even number of levels :math:`L_d` and 0 for an odd one, :math:`\epsilon = 0.001`, and :math:`b_d` such
    that :math:`c(0) = 0`. The gradient passes straight through the rounding. There is no loss.

    The arithmetic is in float32 (float64 for float64), also in 16-bit modules and under autocast: 16 bits would round before the levels
    do. Numbers of codes are exact for all sizes. A vector with NaN gives NaN, and counts as the lowest level in its number.

    Args:
        levels: how many levels each dimension of a code has, at most 1000 without ``preserve_symmetry``; their product, the number of
            codes, is below 2^31.
        dim: length of the vectors; by default that of the codes.
        num_codebooks: each vector has so many codes of its own; indices then have a last dimension for them.
        keep_num_codebooks_dim: whether one codebook has that dimension too.
        channel_first: takes ``(batch, dim, ...)``; inputs with at least four dimensions are always such, others ``(batch, ..., dim)``.
        projection_has_bias: whether the linear layers from ``dim`` to the codes' dimension and back, which are there where the two differ,
            have a bias.
        return_indices: False gives ``None`` in their place.
        preserve_symmetry: levels at equal distances from -1 to 1 (Parker et al., *Scaling Transformers for Low-Bitrate High-Quality Speech
            Coding*, 2024, section 3.2); needed for 2 levels.
        noise_dropout: in training mode the probability with which a value gets uniform noise in [-1/2, 1/2]; with ``preserve_symmetry``.
        bound_hard_clamp: limits to [-1, 1] in the place of :math:`\tanh`.
        orthogonal_rotation: rotates vectors by a fixed random matrix before they are quantized, and codes back.
        others: further arguments of the original; they raise unless they have the values that switch them off.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        *,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        preserve_symmetry: bool = False,
        noise_dropout: float = 0.0,
        bound_hard_clamp: bool = False,
        orthogonal_rotation: bool = False,
        **others,
    ):
        refuse_options("FSQ", others, _SERVED)
        _check_levels(levels, preserve_symmetry)
        if not 0 <= noise_dropout <= 1 or (noise_dropout > 0 and not preserve_symmetry):
            raise ValueError(f"noise_dropout: got {noise_dropout!r}, takes a number in [0, 1], and 0 without preserve_symmetry")
        super().__init__(
            dim,
            len(levels),
            num_codebooks=num_codebooks,
            keep_num_codebooks_dim=keep_num_codebooks_dim,
            channel_first=channel_first or None,
            has_projections=None,
            projection_has_bias=projection_has_bias,
            orthogonal_rotation=orthogonal_rotation,
        )
        self.levels, self.codebook_size = tuple(levels), math.prod(levels)
        self.return_indices, self.preserve_symmetry = return_indices, preserve_symmetry
        self.noise_dropout, self.bound_hard_clamp = noise_dropout, bound_hard_clamp
        basis = [math.prod(levels[:d]) for d in range(len(levels))]
        self.register_buffer("_levels", torch.tensor(levels, dtype=torch.int32), persistent=False)
        self.register_buffer("_basis", torch.tensor(basis, dtype=torch.int32), persistent=False)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, ``(codebook_size, len(levels))``; made anew at each access."""
        return self._codes(torch.arange(self.codebook_size, device=self._levels.device))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """``(quantized, indices)`` of ``z``, ``(batch, ..., dim)`` or ``(batch, dim, ...)``: the shape and dtype of ``z``, and int32 in its
        shape without ``dim``."""
        channels_first = self._has_channels_first(z.ndim - 2)
        z = self._project_in(z)
        codes = self.quantize(self._split(z))
        indices = self._join_indices(self.codes_to_indices(codes)) if self.return_indices else None
        return self._join(self._with_noise(codes), z.dtype, channels_first=channels_first), indices

    def quantize(self, z: Tensor) -> Tensor:
        """The codes of ``z``, ``(..., len(levels))``, in [-1, 1]."""
        return self._symmetric_levels(z) if self.preserve_symmetry else self._rounded_levels(z)

    def codes_to_indices(self, zhat: Tensor) -> Tensor:
        """The int32 numbers of codes, ``(..., len(levels))``, the first level counting least."""
        if zhat.shape[-1] != self.codebook_dim:
            raise ValueError(f"zhat: got {zhat.shape[-1]} values a code, takes {self.codebook_dim}")
        steps = (zhat + 1.0) / (2.0 / (self._levels - 1)) if self.preserve_symmetry else zhat * self._half + self._half
        return (steps.nan_to_num(0.0).round().to(torch.int32) * self._basis).sum(-1, dtype=torch.int32)

    def indices_to_level_indices(self, indices: Tensor) -> Tensor:
        """The level of each dimension, from 0, in a new last dimension."""
        return (indices.unsqueeze(-1) // self._basis) % self._levels

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """The codes at ``indices`` as :meth:`forward` returns them in evaluation mode, in the layout of its input."""
        indices, channels_first = self._split_indices(indices)
        codes = self._codes(indices)
        weights = [parameter.dtype for parameter in self.project_out.parameters()]
        return self._join(codes, weights[0] if weights else codes.dtype, channels_first=channels_first)

    @property
    def _half(self) -> Tensor:
        return self._levels // 2

    def _squash(self, z: Tensor) -> Tensor:
        return z.clamp(-1.0, 1.0) if self.bound_hard_clamp else z.tanh()

    def _rounded_levels(self, z: Tensor) -> Tensor:
        half_width = (self._levels - 1) * (1 + _EPS) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = offset / half_width if self.bound_hard_clamp else (offset / half_width).atanh()
        return _straight_through(torch.round, self._squash(z + shift) * half_width - offset) / self._half

    def _symmetric_levels(self, z: Tensor) -> Tensor:
        steps = self._levels - 1
        return 2.0 / steps * _straight_through(torch.floor, steps * (self._squash(z) + 1) / 2.0 + 0.5) - 1.0

    def _codes(self, indices: Tensor) -> Tensor:
        level_indices = self.indices_to_level_indices(indices)
        if self.preserve_symmetry:
            return level_indices * (2.0 / (self._levels - 1)) - 1.0
        return (level_indices - self._half) / self._half

    def _with_noise(self, codes: Tensor) -> Tensor:
        if not self.training or self.noise_dropout == 0.0:
            return codes
        chosen = torch.full_like(codes, self.noise_dropout).bernoulli_().bool()
        return torch.where(chosen, codes + (torch.rand_like(codes) - 0.5), codes).clamp(-1.0, 1.0)

    def extra_repr(self) -> str:
        names = (
            "levels", "dim", "num_codebooks", "keep_num_codebooks_dim", "channel_first", "return_indices", "preserve_symmetry",
            "noise_dropout", "bound_hard_clamp", "orthogonal_rotation",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _straight_through(function, z: Tensor) -> Tensor:
    return z + (function(z) - z).detach()


def _check_levels(levels: Sequence[int], preserve_symmetry: bool) -> None:
    least, most = (2, _MOST_CODES) if preserve_symmetry else (3, _MOST_LEVELS)
    if len(levels) == 0 or not all(least <= level <= most for level in levels):
        more = "" if preserve_symmetry else "; with preserve_symmetry any from 2"
        raise ValueError(f"levels: got {list(levels)}, takes one or more of {least} to {most}{more}")
    if math.prod(levels) > _MOST_CODES:
        raise ValueError(
            f"levels: got {list(levels)}, {math.prod(levels)} codes, takes at most {_MOST_CODES}; num_codebooks has more together"
        )
