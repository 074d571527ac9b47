"""Lookup-free quantization: a code is the signs of a vector, and two entropies take the place of a codebook that learns."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae.functional._checks import check_nonnegative
from fastvae.nn import _processes
from fastvae.nn._code_layout import CodeLayout, refuse_options
from fastvae.ops.binary_code_entropy import MAX_DIM

# Options of the original that are not served, with the values that switch them off.
_SERVED = {
    "frac_per_sample_entropy": 1.0,
    "cosine_sim_project_in": False,
    "cosine_sim_project_in_scale": None,
    "experimental_softplus_entropy_loss": False,
    "entropy_loss_offset": 5.0,
    "force_quantization_f32": True,
}


@exportable
class LFQOutput(NamedTuple):
    """The results of :class:`LFQ`; ``entropy_aux_loss`` is the sum of its weighted losses."""

    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


@exportable
class LFQLosses(NamedTuple):
    """The losses of :class:`LFQ` without their weights: the mean of the vectors' entropies and the entropy of their mean distribution, in
    nats, and the mean squared difference between vectors and codes."""

    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(CodeLayout):
    r"""Lookup-free quantization (Yu et al., *Language Model Beats Diffusion: Tokenizer Is Key to Visual Generation*, 2023), with the names,
    arguments and results of ``vector_quantize_pytorch.LFQ``.

    .. math:: c = s\, \mathrm{sign}(x), \qquad \lambda \Big( \tfrac{1}{N} \sum_n \mathrm{H}[p(\cdot \mid x_n)]
        - \gamma\, \mathrm{H}\big[\tfrac{1}{N} \sum_n p(\cdot \mid x_n)\big] \Big)
        + \beta\, \tfrac{1}{N D} \sum_n \lVert x_n - c_n \rVert^2

    A code's number has a bit for each dimension, the first one the highest. The gradient of ``quantized`` passes straight through. The
    entropies are those of :func:`fastvae.functional.binary_code_entropy`, without the probabilities of all codes for each vector. They
    are exact, where the original takes the logarithm of 1e-5 for that of any smaller probability: of more than 1e5 codes nearly all are
    that rare, and their entropy has no gradient there.

    In evaluation mode losses are 0. In training mode, where ``torch.distributed`` runs, the mean distribution is that of all processes'
    vectors: all of them have to make each training step. The arithmetic is in float32 (float64 for float64), also under autocast. A
    vector with NaN has the bit 0 in the place of each NaN, and losses of NaN unless ``mask`` leaves it out.

    Args:
        dim: length of the vectors; by default that of the codes.
        codebook_size: a power of 2, at most 2^24; by default 2^``dim``. At least one of the two has to be given.
        entropy_loss_weight: :math:`\lambda`.
        commitment_loss_weight: :math:`\beta`.
        diversity_gamma: :math:`\gamma`.
        straight_through_activation: a module, through which the gradient of ``quantized`` passes.
        num_codebooks: each vector has so many codes of its own; indices then have a last dimension for them.
        keep_num_codebooks_dim: whether one codebook has that dimension too.
        codebook_scale: :math:`s`.
        has_projections: linear layers from ``dim`` to the codes' dimension and back; by default where the two differ.
        projection_has_bias: whether those have a bias.
        soft_clamp_input_value: the limit :math:`v` of :math:`v \tanh(x / v)` in the place of :math:`x`; ``None`` for none.
        channel_first: takes ``(batch, dim, ...)``; by default inputs with at least four dimensions are such, others ``(batch, ..., dim)``.
        spherical: vectors and codes are scaled to length :math:`s`: see :class:`BSQ`.
        orthogonal_rotation: rotates vectors by a fixed random matrix before they are quantized, and codes back.
        others: further arguments of the original; they raise unless they have the values that switch them off. There is no
            ``frac_per_sample_entropy``, because no memory is to be saved.
    """

    mask: Tensor
    zero: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        spherical: bool = False,
        orthogonal_rotation: bool = False,
        **others,
    ):
        refuse_options(type(self).__name__, others, _SERVED)
        super().__init__(
            dim,
            _checked_bits(dim, codebook_size),
            num_codebooks=num_codebooks,
            keep_num_codebooks_dim=keep_num_codebooks_dim,
            channel_first=channel_first,
            has_projections=has_projections,
            projection_has_bias=projection_has_bias,
            orthogonal_rotation=orthogonal_rotation,
        )
        if not 0 < codebook_scale < math.inf:
            raise ValueError(f"codebook_scale: got {codebook_scale!r}, takes a finite number > 0")
        if soft_clamp_input_value is not None and not soft_clamp_input_value >= codebook_scale:
            raise ValueError(f"soft_clamp_input_value: got {soft_clamp_input_value!r}, takes at least codebook_scale, {codebook_scale}")
        self.codebook_size = 1 << self.codebook_dim
        self.entropy_loss_weight, self.diversity_gamma = entropy_loss_weight, diversity_gamma
        self.commitment_loss_weight = check_nonnegative("commitment_loss_weight", commitment_loss_weight)
        self.activation = nn.Identity() if straight_through_activation is None else straight_through_activation
        self.codebook_scale, self.soft_clamp_input_value, self.spherical = codebook_scale, soft_clamp_input_value, spherical
        # The value of each bit in a code's number.
        self.register_buffer("mask", 2 ** torch.arange(self.codebook_dim - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the codes."""
        return self.zero.dtype

    @property
    def codebook(self) -> Tensor:
        """All codes, ``(codebook_size, codebook_dim)``, before they are scaled where ``spherical``; made anew at each access."""
        return self._codes(torch.arange(self.codebook_size, device=self.mask.device))

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """``-codebook_scale`` for 0 and ``codebook_scale`` for 1."""
        return bits * self.codebook_scale * 2 - self.codebook_scale

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The codes at ``indices`` as :meth:`forward` returns them, in the layout of its input.

        Args:
            indices: ``(batch, ...)``, with a last dimension for the codebooks where :meth:`forward` gives one.
            project_out: False for the codes before the projection to ``dim``.
        """
        indices, channels_first = self._split_indices(indices)
        return self._join(self._scale(self._codes(indices)), self.dtype, channels_first=channels_first, project_out=project_out)

    def forward(
        self, x: Tensor, inv_temperature: float = 100.0, return_loss_breakdown: bool = False, mask: Tensor | None = None
    ) -> LFQOutput | tuple[LFQOutput, LFQLosses]:
        """Quantizes ``x``.

        Args:
            x: ``(batch, ..., dim)``, or ``(batch, dim, ...)``: see ``channel_first``.
            inv_temperature: of the distributions whose entropies are taken.
            return_loss_breakdown: returns the losses without their weights too.
            mask: bool, the shape of ``indices`` without codebooks, or ``(batch, positions)``: ``False`` leaves a vector out of the losses,
                which are 0 where it leaves out all.

        Returns:
            :class:`LFQOutput`, or a tuple of it and :class:`LFQLosses`; ``quantized`` has the shape of ``x``, int64 ``indices`` that
            without ``dim``.
        """
        channels_first = self._has_channels_first(x.ndim - 2)
        x = self._project_in(x)
        dtype = x.dtype
        if self.soft_clamp_input_value is not None:
            x = (x / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        x = self._scale(self._split(x))
        positive = x > 0
        quantized = self._scale(self.bits_to_codes(positive.to(x.dtype)))
        indices = self._join_indices((positive * self.mask).sum(-1))
        losses = self._losses(x, quantized, inv_temperature, mask) if self.training else LFQLosses(self.zero, self.zero, self.zero)
        aux_loss = (losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy) * self.entropy_loss_weight
        aux_loss = aux_loss + losses.commitment * self.commitment_loss_weight
        if self.training:
            x = self.activation(x)
            quantized = x + (quantized - x).detach()
        output = LFQOutput(self._join(quantized, dtype, channels_first=channels_first), indices, aux_loss)
        return (output, losses) if return_loss_breakdown else output

    def _losses(self, x: Tensor, quantized: Tensor, inv_temperature: float, mask: Tensor | None) -> LFQLosses:
        mask = None if mask is None else _checked_mask(mask, x.shape[:-2])
        group = distributed.group.WORLD if _processes.is_distributed() else None
        # A code of length s has s / sqrt(D) in each dimension.
        size = self.codebook_scale / math.sqrt(self.codebook_dim) if self.spherical else self.codebook_scale
        entropies = [FV.binary_code_entropy(vectors, inv_temperature * size, mask=mask, group=group) for vectors in x.unbind(-2)]
        per_sample, batch = (torch.stack(values, -1) for values in zip(*entropies, strict=True))
        commitment = self.zero
        if self.commitment_loss_weight > 0.0:
            commitment = _mean((x - quantized.detach()).flatten(-2), mask, torch.square)
        return LFQLosses(_mean(per_sample, mask), batch.mean(), commitment)

    def _scale(self, codes: Tensor) -> Tensor:
        return F.normalize(codes, dim=-1) * self.codebook_scale if self.spherical else codes

    def _codes(self, indices: Tensor) -> Tensor:
        return self.bits_to_codes(((indices[..., None] & self.mask) != 0).to(self.dtype))

    def extra_repr(self) -> str:
        names = (
            "dim", "codebook_size", "entropy_loss_weight", "commitment_loss_weight", "diversity_gamma", "num_codebooks",
            "keep_num_codebooks_dim", "codebook_scale", "soft_clamp_input_value", "channel_first", "spherical", "orthogonal_rotation",
        )  # fmt: skip
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class BSQ(LFQ):
    """Binary spherical quantization (Zhao et al., *Image and Video Tokenization with Binary Spherical Quantization*, 2024): :class:`LFQ`
    whose vectors and codes lie on a sphere, ``vector_quantize_pytorch.LFQ(spherical=True)``.

    Args:
        options: those of :class:`LFQ` but ``spherical``.
    """

    def __init__(self, **options):
        if "spherical" in options:
            raise TypeError("spherical: not an option of BSQ, which always is")
        super().__init__(spherical=True, **options)


def _checked_bits(dim: int | None, codebook_size: int | None) -> int:
    if codebook_size is None:
        if dim is None:
            raise ValueError("codebook_size: got None, takes a power of 2 where dim is not given")
        name, got, bits = "dim", str(dim), dim
    else:
        if codebook_size < 2 or codebook_size.bit_count() != 1:
            raise ValueError(f"codebook_size: got {codebook_size}, takes a power of 2")
        name, got, bits = "codebook_size", str(codebook_size), codebook_size.bit_length() - 1
    if not 1 <= bits <= MAX_DIM:
        raise ValueError(f"{name}: got {got}, takes 1 to {MAX_DIM} bits a code; several codebooks (num_codebooks) have more together")
    return bits


def _checked_mask(mask: Tensor, positions: torch.Size) -> Tensor:
    shapes = tuple(positions), (positions[0], math.prod(positions[1:]))
    if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
        raise ValueError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, takes torch.bool of shape {' or '.join(map(str, shapes))}")
    return mask.reshape(positions)


def _mean(values: Tensor, mask: Tensor | None, of: Callable[[Tensor], Tensor] = lambda values: values) -> Tensor:
    """The mean of ``of(values)``, ``(..., columns)``, over the positions that count; 0 where there are none."""
    if mask is None:
        return of(values).sum() / max(values.numel(), 1)
    # A position that does not count may hold NaN, which stays out of the gradient too.
    return of(torch.where(mask[..., None], values, 0.0)).sum() / (mask.sum() * values.shape[-1]).clamp(min=1)
