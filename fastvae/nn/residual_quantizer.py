"""Residual vector quantization as a layer: each step quantizes the error of the steps before."""

import functools
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.functional.codebook import residual_steps
from fastvae.nn import _processes
from fastvae.nn._recompute import PendingPasses, fingerprint, is_recomputing, may_be_recomputed, stacked_copy
from fastvae.nn.vector_quantizer import VectorQuantizer, VQOutput


class DepthDropout:
    """Draws how many steps of a residual quantizer a training pass takes. All processes and a recomputation get the same number."""

    def __init__(self, fewest: int, most: int):
        self.fewest, self.most = fewest, most
        self._passes = PendingPasses()

    def draw(self, x: Tensor) -> int:
        if self.fewest == self.most:
            return self.most
        recomputes = is_recomputing()
        source = fingerprint(x) if recomputes or may_be_recomputed() else None
        drawn = _processes.draw_depth(self.fewest, self.most, x.device, shared=not recomputes)
        if source is None:
            return drawn
        if recomputes:
            seen = self._passes.recall(source)
            return drawn if seen is None else seen
        self._passes.remember(source, drawn)
        return drawn


class _Result(NamedTuple):
    """The results of the steps that were made; perplexity and usage have one element a step."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor
    usage: Tensor


class ResidualVectorQuantizer(nn.Module):
    """Quantizes a vector in steps, each the error of the steps before (Zeghidour et al., *SoundStream*, 2021, algorithm 1).

    The gradient of ``quantized`` reaches ``x`` once and unchanged, whatever the number of steps.

    One operator makes all steps (:func:`fastvae.functional.residual_quantize`). The steps are calls of the layers, one by one, with
    ``cosine``, under activation checkpointing, in the pass in which k-means starts a codebook, and where a layer has hooks or was replaced.

    Args:
        num_quantizers: steps.
        num_codes, dim: of each step's :class:`VectorQuantizer`.
        quantizer_dropout: in training each call uses a random number of steps, so that few of them give a coarse version.
        min_quantizers: the fewest that it uses.
        channels_first: takes ``(batch, dim, ...)`` in place of ``(..., dim)``.
        options: of :class:`VectorQuantizer`; ``gradient`` and ``heads`` are not offered.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        dim: int,
        *,
        quantizer_dropout: bool = False,
        min_quantizers: int = 1,
        channels_first: bool = False,
        **options,
    ):
        super().__init__()
        for name in ("gradient", "heads", "share_codebook"):
            if name in options:
                raise TypeError(f"{name}: not an option of a residual quantizer")
        if not 1 <= min_quantizers <= num_quantizers:
            raise ValueError(f"min_quantizers: got {min_quantizers}, takes 1 to num_quantizers, {num_quantizers}")
        self.layers = nn.ModuleList(VectorQuantizer(num_codes, dim, **options) for _ in range(num_quantizers))
        self.quantizer_dropout, self.min_quantizers, self.channels_first = quantizer_dropout, min_quantizers, channels_first
        self._depth = DepthDropout(min_quantizers if quantizer_dropout else num_quantizers, num_quantizers)

    def _steps(self) -> list[VectorQuantizer]:
        return cast("list[VectorQuantizer]", list(self.layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VQOutput:
        """:class:`VQOutput`: the sum of the steps' codes and losses, indices with a last dimension for the steps (-1 for one left out),
        perplexity and usage of each step, shape ``(num_quantizers,)`` (0 for one left out)."""
        if self.channels_first:
            x = x.movedim(1, -1)
        active = self._depth.draw(x) if self.training else len(self.layers)
        steps = self._steps()[:active]
        found = _step_by_step(x, mask, steps) if _need_calls(steps) else _at_once(x, mask, steps)
        losses = [found.loss]
        for layer in self._steps()[active:]:
            if layer.update == "gradient":
                # DistributedDataParallel raises where a parameter gets no gradient.
                losses.append(layer.unused_loss(x))
        missing = len(self.layers) - active
        indices = F.pad(found.indices, (0, missing), value=-1)
        perplexity, usage = (F.pad(statistic, (0, missing)) for statistic in (found.perplexity, found.usage))
        quantized = found.quantized.movedim(-1, 1) if self.channels_first else found.quantized
        return VQOutput(quantized, indices, functools.reduce(torch.add, losses), perplexity, usage)

    def extra_repr(self) -> str:
        names = ("quantizer_dropout", "min_quantizers", "channels_first")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def decode(self, indices: Tensor) -> Tensor:
        """The sum of the codes at ``indices``, the last dimension of which holds the first steps, or all."""
        parts = [layer.decode(index) for layer, index in zip(self._steps(), indices.unbind(-1), strict=False)]
        codes = functools.reduce(torch.add, parts)
        return codes.movedim(-1, 1) if self.channels_first else codes


def _need_calls(steps: list[VectorQuantizer]) -> bool:
    """Whether each layer has to be called: one searches alone, or is not like the others."""
    if any(type(layer) is not VectorQuantizer for layer in steps):
        return True
    return any(not _are_alike(layer, steps[0]) or layer.searches_alone() for layer in steps)


def _are_alike(a: VectorQuantizer, b: VectorQuantizer) -> bool:
    """Whether codebooks and losses of two layers are of one kind."""
    costs = (a.commitment_cost, a.codebook_cost) == (b.commitment_cost, b.codebook_cost)
    return costs and a.codebook.shape == b.codebook.shape and a.codebook.dtype == b.codebook.dtype


def _at_once(x: Tensor, mask: Tensor | None, steps: list[VectorQuantizer]) -> _Result:
    """All searches in one operator; then each layer learns from its own."""
    first = steps[0]
    first.check_input(x, mask)
    learns = any(layer.learns for layer in steps)
    codebooks = stacked_copy([layer.codebook for layer in steps], change=learns)
    costs = {"codebook_cost": first.codebook_cost, "commitment_cost": first.commitment_cost}
    (quantized, indices, losses), residuals = residual_steps(x, codebooks, mask, **costs, with_residuals=learns)
    # The residual of a vector is finite where the vector is.
    searched = [x.detach()] * len(steps) if residuals is None else residuals.unbind()
    arguments = zip(steps, searched, indices.unbind(-1), losses.detach().unbind(), strict=True)
    statistics = [layer.observe(rows, index, loss, mask) for layer, rows, index, loss in arguments]
    return _Result(quantized, indices, losses.sum(), *map(torch.stack, zip(*statistics, strict=True)))


def _step_by_step(x: Tensor, mask: Tensor | None, steps: list[VectorQuantizer]) -> _Result:
    """A call of each layer."""
    residual, total, outputs = x, torch.zeros_like(x), []
    for layer in steps:
        output = layer(residual, mask)
        codes = output.quantized.detach()
        residual, total = residual - codes, total + codes
        outputs.append(output)
    # The gradient of x, and a 0 that rounds nothing.
    quantized = total + (x - x.detach())
    if mask is not None:
        quantized = torch.where(mask[..., None], quantized, 0.0)
    indices = torch.stack([o.indices for o in outputs], dim=-1)
    loss = torch.stack([o.loss for o in outputs]).sum()
    return _Result(quantized, indices, loss, *(torch.stack([getattr(o, name) for o in outputs]) for name in ("perplexity", "usage")))
