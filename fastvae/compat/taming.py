"""The quantizer of taming-transformers and latent-diffusion, neither of which need be installed: the class, and a patch of models."""

import os
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._types import UnknownIndex
from fastvae.functional._modules import read_obstacle
from fastvae.nn._forward_code import rewritten

Quantized = tuple[Tensor, Tensor, tuple[None, None, Tensor]]


class VectorQuantizer2(nn.Module):
    r"""taming-transformers' class of that name, which latent-diffusion imports as ``VectorQuantizer``: the same arguments, results and
    ``state_dict``, without the matrix of all distances.

    .. math:: \lVert \mathrm{sg}[z] - c \rVert^2 \text{ and } \lVert z - \mathrm{sg}[c] \rVert^2

    where :math:`c` is the nearest code (van den Oord et al., *Neural Discrete Representation Learning*, 2017); the loss is the mean over
    elements of one of the two and ``beta`` times that of the other. It computes what :func:`fastvae.functional.vector_quantize` does.

    This class serves code that builds its own model; a model that holds the original keeps its module and takes :func:`patch_taming`.

    Args:
        n_e: number of codes.
        e_dim: length of a code.
        beta: weight of the commitment's term; of the codebook's where ``legacy``.
        remap: file of :func:`numpy.load` with the indices in use, which become the buffer ``used``. Indices are then places in ``used``.
        unknown_index: the place of an index that is not in ``used``: ``"random"`` draws one from torch's generator of the CPU,
            ``"extra"`` is one more place behind the others, an integer is the place itself.
        sane_index_shape: gives indices the shape ``(batch, height, width)``.
        legacy: puts ``beta`` on the codebook's term, as the original's default does by mistake.

    Raises:
        ValueError: for another ``unknown_index``.
    """

    used: Tensor
    unknown_index: str | int

    def __init__(
        self,
        n_e: int,
        e_dim: int,
        beta: float,
        remap: str | os.PathLike | None = None,
        unknown_index: UnknownIndex | int = "random",
        sane_index_shape: bool = False,
        legacy: bool = True,
    ):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        self.remap, self.re_embed, self.sane_index_shape = remap, n_e, sane_index_shape
        if remap is not None:
            if unknown_index not in get_args(UnknownIndex) and not isinstance(unknown_index, int):
                raise ValueError(f"unknown_index: got {unknown_index!r}, takes 'random', 'extra' or an integer")
            self.register_buffer("used", torch.tensor(np.load(remap)))
            extra = unknown_index == "extra"
            self.unknown_index = len(self.used) if extra else unknown_index
            self.re_embed = len(self.used) + extra

    def extra_repr(self) -> str:
        remap = "" if self.remap is None else f", remap={self.remap!r}, unknown_index={self.unknown_index!r}"
        return f"{self.n_e}, {self.e_dim}, beta={self.beta}{remap}, sane_index_shape={self.sane_index_shape}, legacy={self.legacy}"

    def forward(self, z: Tensor, temp: float | None = None, rescale_logits: bool = False, return_logits: bool = False) -> Quantized:
        """Quantizes the vectors of an image's channels.

        Args:
            z: ``(batch, channels, height, width)``; the channels are one code, or several side by side.
            temp, rescale_logits, return_logits: those of a Gumbel quantizer, which have to be switched off.

        Returns:
            ``(z_q, loss, (None, None, indices))``: ``z_q`` contiguous in the shape of ``z``; the loss, a scalar; int64 indices
            ``(vectors,)``, with ``remap`` ``(vectors, 1)``, with ``sane_index_shape`` ``(batch, height, width)``.

        Raises:
            ValueError: for another shape, and for an option of a Gumbel quantizer that is not switched off.
        """
        return _quantize(self, z, temp, rescale_logits, return_logits)

    def remap_to_used(self, inds: Tensor) -> Tensor:
        """The places of indices in ``used``, in the shape of ``inds``: ``(batch, ...)``.

        Raises:
            ValueError: where there is no dimension beside the batch.
        """
        _check_batched(inds)
        used, order = self.used.to(inds).sort(stable=True)
        place = torch.searchsorted(used, inds.contiguous()).clamp(max=len(used) - 1)
        new, unknown = order[place], used[place] != inds
        if self.unknown_index == "random":
            new[unknown] = torch.randint(self.re_embed, (int(unknown.sum()),)).to(new.device)
        else:
            new[unknown] = int(self.unknown_index)
        return new

    def unmap_to_all(self, inds: Tensor) -> Tensor:
        """The indices at places in ``used``, the inverse of :meth:`remap_to_used`. The extra place has the first index of ``used``.

        Raises:
            ValueError: where there is no dimension beside the batch.
        """
        _check_batched(inds)
        used = self.used.to(inds)
        if self.re_embed > len(used):
            inds = torch.where(inds >= len(used), 0, inds)
        return used.gather(0, inds.flatten()).view(inds.shape)

    def get_codebook_entry(self, indices: Tensor, shape: tuple[int, int, int, int] | None) -> Tensor:
        """The codes at ``indices``, or with ``shape``, ``(batch, height, width, channels)``, the contiguous images that they make.

        Raises:
            ValueError: where ``remap`` needs a ``shape`` and there is none.
        """
        if self.remap is not None:
            if shape is None:
                raise ValueError("shape: got None, takes (batch, height, width, channels) where there is a remap")
            indices = self.unmap_to_all(indices.reshape(shape[0], -1)).flatten()
        codes = self.embedding(indices)
        return codes if shape is None else codes.view(shape).movedim(-1, 1).contiguous()


def _check_batched(inds: Tensor) -> None:
    if inds.ndim < 2:
        raise ValueError(f"inds: got shape {tuple(inds.shape)}, takes (batch, ...)")


def _quantize(module: Any, z: Tensor, temp: float | None, rescale_logits: bool, return_logits: bool) -> Quantized:
    """The ``forward`` of a quantizer, this file's or the original."""
    for name, value, off in (
        ("temp", temp, (None, 1.0)),
        ("rescale_logits", rescale_logits, (False,)),
        ("return_logits", return_logits, (False,)),
    ):
        if value not in off:
            raise ValueError(f"{name}: got {value!r}, takes {' or '.join(map(str, off))}: it is an option of Gumbel quantizers")
    if z.ndim != 4 or z.shape[1] % module.e_dim:
        raise ValueError(
            f"z: got shape {tuple(z.shape)}, takes (batch, channels, height, width) with a multiple of {module.e_dim} channels"
        )
    weight = module.embedding.weight
    z = z.movedim(1, -1).contiguous().to(torch.promote_types(z.dtype, weight.dtype))
    commitment, codebook = (1.0, module.beta) if module.legacy else (module.beta, 1.0)
    codes, indices, loss = FV.vector_quantize(z.view(-1, module.e_dim), weight, commitment_cost=commitment, codebook_cost=codebook)
    # The code itself differs from this sum, which the original returns, by its rounding.
    z_q = (z + (codes.view(z.shape) - z).detach()).movedim(-1, 1).contiguous()
    if module.remap is not None:
        indices = module.remap_to_used(indices.view(len(z), -1)).view(-1, 1)
    if module.sane_index_shape:
        indices = indices.view(z.shape[:-1])
    return z_q, loss.to(z.dtype), (None, None, indices)


# Copies of the class in other repositories have the second name.
_NAMES = ("VectorQuantizer2", "VectorQuantizer")
_ATTRIBUTES = {"n_e", "e_dim", "beta", "legacy", "remap", "re_embed", "sane_index_shape"}
_OF_REMAP = {"unknown_index"}

# The code of a patched quantizer.
_FORWARD = """
def forward(self, z, temp=None, rescale_logits=False, return_logits=False):
    return quantize(self, original, z, temp, rescale_logits, return_logits)
"""


def patch_taming(module: nn.Module, *, report: Callable[[str], None] | None = None) -> nn.Module:
    """Lets each ``VectorQuantizer2`` of taming-transformers or latent-diffusion in a model compute what :class:`VectorQuantizer2` does.

    It is changed in place: the module stays the same object with the same parameters, buffers, hooks and methods but for ``forward``, and
    its class becomes a subclass of the same name. A quantizer is known by the name of its class and by its attributes; one that has others
    besides may compute something else and is left alone.

    Args:
        module: a quantizer, or a model that holds one; it is changed. Patching it again changes nothing.
        report: called with one line for each quantizer; silent by default.

    Returns:
        ``module``.

    Raises:
        ValueError: where ``module`` holds no such quantizer.
    """
    found = [(name, each) for name, each in module.named_modules() if isinstance(each, VectorQuantizer2) or _is_original(each)]
    if not found:
        name = type(module).__name__
        raise ValueError(f"module: got a {name} without a VectorQuantizer2, takes a model of taming-transformers or latent-diffusion")
    for name, quantizer in found:
        if not isinstance(quantizer, VectorQuantizer2) and not _is_patched(quantizer):
            reason = _obstacle(quantizer)
            if reason is None:
                functions = ("quantize", _quantize_unless_changed), ("original", type(quantizer).forward)
                quantizer.__class__ = rewritten(type(quantizer), _FORWARD, functions)
            if report is not None:
                report(_line(name or type(quantizer).__name__, reason))
    return module


def _line(name: str, reason: str | None) -> str:
    return f"{name} runs on vector_quantize" if reason is None else f"left {name}: it {reason}"


def _is_original(module: nn.Module) -> bool:
    return type(module).__name__ in _NAMES and vars(module).keys() >= _ATTRIBUTES and "embedding" in module._modules


def _is_patched(quantizer: nn.Module) -> bool:
    return type(quantizer).forward.__globals__.get("quantize") is _quantize_unless_changed


def _obstacle(quantizer: nn.Module) -> str | None:
    """Why a quantizer may compute something else than the class that its name says."""
    known = vars(nn.Module()).keys() | _ATTRIBUTES | _OF_REMAP
    others = [*(vars(quantizer).keys() - known), *(quantizer._modules.keys() - {"embedding"}), *quantizer._parameters]
    others += quantizer._buffers.keys() - {"used"}
    if others:
        return f"has {', '.join(sorted(others))}, which VectorQuantizer2 has not"
    return _embedding_obstacle(quantizer)


def _embedding_obstacle(quantizer: nn.Module) -> str | None:
    embedding = quantizer.get_submodule("embedding")
    if type(embedding) is not nn.Embedding:
        return f"has a {type(embedding).__name__} for its embedding"
    reason = read_obstacle(embedding)
    return None if reason is None else f"has an embedding that {reason}"


def _quantize_unless_changed(quantizer: nn.Module, original: Callable[..., Quantized], z: Tensor, *options: Any) -> Quantized:
    """Quantizes by the original code where its call of the embedding does more than to read the weight."""
    if _embedding_obstacle(quantizer):
        return original(quantizer, z, *options)
    return _quantize(quantizer, z, *options)
