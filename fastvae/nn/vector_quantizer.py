"""Vector quantization as a layer, with a codebook that learns by gradient or by moving averages."""

import math
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae import functional as FV
from fastvae._pytree import exportable
from fastvae._types import CodebookUpdate, QuantizerGradient, check_choice
from fastvae.functional._checks import check_nonnegative
from fastvae.functional._documentation import documented
from fastvae.functional._modules import read_obstacle
from fastvae.functional.codebook import codebook_sums
from fastvae.nn import _processes
from fastvae.nn._codebook_state import CodebookState, finite_rows, histogram, perplexity_and_usage, statistics_dtype
from fastvae.nn._recompute import PendingPasses, fingerprint, is_recomputing, keep_out_of_checkpoints, may_be_recomputed, with_value
from fastvae.ops._autograd import transformed

# Buffers that stay in float32 in a 16-bit module: a moving average in 16 bits stops moving.
_STATISTICS = ("ema_count", "ema_sum")


@exportable
class VQOutput(NamedTuple):
    """The results of a quantizer.

    ``perplexity`` is :math:`\\exp(-\\sum_k p_k \\log p_k)` of the batch's code frequencies, from 1 (one code) to the number of codes, and
    ``usage`` the share of codes that occur in the batch. Both are means over heads and carry no gradient; in training mode they are those
    of all processes' batches together.
    """

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    perplexity: Tensor
    usage: Tensor


class _Seen(NamedTuple):
    """The codebook that a training pass saw and the statistics that it found, for its recomputation."""

    codes: Tensor
    starts: bool
    statistics: tuple[Tensor, Tensor]


@documented
class VectorQuantizer(nn.Module):
    r"""Replaces vectors with the nearest of ``num_codes`` learned codes (van den Oord et al., *Neural Discrete Representation
    Learning*, 2017).

    In training mode the codebook learns: with ``update="ema"`` it follows the means of its vectors
    (:func:`fastvae.functional.codebook_ema_update_`), with ``"gradient"`` it is a parameter that the loss moves. A vector with NaN or
    infinite values takes no part in that. Under activation checkpointing the recomputation sees the codebook of the first pass and
    changes nothing.

    Where ``torch.distributed`` runs, counts and sums are added over all processes in training mode, so that their codebooks stay equal: all
    of them have to make each training step. In evaluation mode a process makes no collective call.

    In a 16-bit module (``.bfloat16()``, ``.half()``) the codebook has 16 bits; its moving averages stay in float32.

    Args:
        num_codes: size of the codebook.
        dim: length of the vectors; with several heads, of all heads together.
        update: ``"ema"`` or ``"gradient"``.
        commitment_cost: weight of the loss that pulls vectors to their codes.
        $quantizer_gradient
        decay, eps: of the moving averages.
        revive_below: a code whose moving count of vectors falls below this is replaced with a vector of the batch, and its count and
            sum with it, so that it does not die again at once; 0 for never.
        kmeans_iters: iterations of k-means on the first training batch, from which the codebook starts; 0 for a random start.
        cosine: compares directions: vectors and codes are scaled to length 1.
        heads: splits each vector into so many parts that are quantized separately.
        share_codebook: one codebook for all heads; by default each has its own.
        channels_first: takes ``(batch, dim, ...)`` in place of ``(..., dim)``.
        global_evaluation: in evaluation mode too, perplexity and usage are those of all processes' batches together; all processes then
            have to evaluate equally many batches.
    """

    codebook: Tensor
    ema_count: Tensor
    started: Tensor

    def __init__(
        self,
        num_codes: int,
        dim: int,
        *,
        update: CodebookUpdate = "ema",
        commitment_cost: float = 0.25,
        gradient: QuantizerGradient = "straight_through",
        decay: float = 0.99,
        eps: float = 1e-5,
        revive_below: float = 0.0,
        kmeans_iters: int = 0,
        cosine: bool = False,
        heads: int = 1,
        share_codebook: bool = False,
        channels_first: bool = False,
        global_evaluation: bool = False,
    ):
        super().__init__()
        check_choice("update", update, get_args(CodebookUpdate))
        check_choice("gradient", gradient, get_args(QuantizerGradient))
        if num_codes < 1:
            raise ValueError(f"num_codes: got {num_codes}, takes at least 1")
        if heads < 1 or dim % heads:
            raise ValueError(f"heads: got {heads}, takes a divisor of dim, {dim}")
        self.num_codes, self.dim, self.heads = num_codes, dim, heads
        self.update, self.gradient = update, gradient
        self.commitment_cost = check_nonnegative("commitment_cost", commitment_cost)
        self.decay, self.eps = decay, eps
        self.revive_below = check_nonnegative("revive_below", revive_below)
        self.kmeans_iters = kmeans_iters
        self.cosine, self.share_codebook, self.channels_first = cosine, share_codebook, channels_first
        self.global_evaluation = global_evaluation

        shape = (num_codes, dim // heads) if heads == 1 or share_codebook else (heads, num_codes, dim // heads)
        codebook = torch.empty(shape).uniform_(-1.0 / num_codes, 1.0 / num_codes)
        codebook = F.normalize(codebook, dim=-1) if cosine else codebook
        if update == "gradient":
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("ema_sum", codebook.to(statistics_dtype(codebook.dtype), copy=True))
        # The state_dict holds what the options use: moving counts where codes move or revive by them, and the start where k-means makes it.
        counts = update == "ema" or revive_below > 0
        self.register_buffer("ema_count", torch.ones(shape[:-1], dtype=statistics_dtype(codebook.dtype)), persistent=counts)
        self.register_buffer("started", torch.tensor(kmeans_iters == 0), persistent=kmeans_iters > 0)
        # The tensor `started` that was seen to hold True, and its version then.
        self._seen_started: Tensor | None = None
        self._seen_version = -1
        self._processes_agree = False
        self._passes = PendingPasses()

    def _apply(self, fn, recurse=True):
        statistics = {name: self.get_buffer(name) for name in _STATISTICS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, before in statistics.items():
            after = self.get_buffer(name)
            # The conversion would round the statistics, so they come from the values before it.
            self._buffers[name] = after if _is_wide(after) else before.to(after.device, statistics_dtype(after.dtype))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("ema_count", "started"):
            if name in self._non_persistent_buffers_set:
                # The checkpoint is of a layer with other options; this layer has no use for the buffer.
                state_dict.pop(prefix + name, None)
            elif name == "started" and prefix + "codebook" in state_dict:
                # The checkpoint is of a layer without k-means, whose codebook k-means would destroy.
                state_dict.setdefault(prefix + name, state_dict[prefix + "codebook"].new_ones((), dtype=torch.bool))
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in _STATISTICS:
            if name in self._buffers:
                # assign=True takes the dtypes of the file.
                buffer = self.get_buffer(name)
                self._buffers[name] = buffer.to(statistics_dtype(buffer.dtype))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> VQOutput:
        """Quantizes ``x``.

        Args:
            x: ``(..., dim)``, or ``(batch, dim, ...)`` with ``channels_first``.
            mask: bool, the shape of ``indices`` without heads: ``False`` leaves a vector out of the loss, the codebook and the
                statistics; it is quantized to 0, and its index is -1.

        Returns:
            :class:`VQOutput`; the indices have the shape of ``x`` without ``dim``, and with several heads a last dimension for them.
        """
        if self.channels_first:
            x = x.movedim(1, -1)
        self.check_input(x, mask)
        rows = self._split_heads(x)
        row_mask = None if mask is None else self._split_mask(mask)
        quantized, indices, loss, statistics = (self._train if self.training else self._evaluate)(rows, row_mask)
        quantized = self._join_heads(quantized, x.shape)
        indices = self._join_indices(indices, x.shape[:-1])
        if self.channels_first:
            quantized = quantized.movedim(-1, 1)
        return VQOutput(quantized, indices, loss, *statistics)

    def decode(self, indices: Tensor) -> Tensor:
        """The codes at ``indices`` as :meth:`forward` returns them, in the layout of its input; 0 for index -1."""
        codebook = F.normalize(self.codebook, dim=-1) if self.cosine else self.codebook
        index = indices.clamp(min=0)
        if codebook.ndim == 3:
            codes = torch.stack([codebook[head][index[..., head]] for head in range(self.heads)], dim=-2)
        else:
            codes = codebook[index]
        codes = torch.where(indices[..., None] < 0, 0.0, codes)
        if self.heads > 1:
            codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self.channels_first else codes

    def unused_loss(self, x: Tensor) -> Tensor:
        """The loss of no vectors: 0, with a gradient of 0 for the codebook."""
        return FV.vector_quantize(x.new_empty((0, self.codebook.shape[-1])), self.codebook.flatten(0, -2)).loss

    def check_input(self, x: Tensor, mask: Tensor | None) -> None:
        """Raises where ``x``, which has its channels last, or the mask does not fit."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"x: got {x.shape[-1]} channels, takes dim, {self.dim}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, takes torch.bool of shape {tuple(x.shape[:-1])}")

    @property
    def learns(self) -> bool:
        """Whether a training pass moves the codebook or its moving counts."""
        return self.training and (self.update == "ema" or self.revive_below > 0)

    @property
    def codebook_cost(self) -> float:
        """The weight of the loss that pulls the codes to the vectors."""
        return 1.0 if self.update == "gradient" else 0.0

    def searches_alone(self) -> bool:
        """Whether a call does more than a search that others can make, beside theirs, and :meth:`observe`. It may wait for other processes
        where k-means has to start."""
        if self.cosine or self.heads > 1 or self.gradient != "straight_through" or self.channels_first or read_obstacle(self):
            return True
        return self.training and (is_recomputing() or may_be_recomputed() or self._must_start())

    def observe(self, rows: Tensor, indices: Tensor, loss: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Perplexity and usage of vectors for which somebody else has searched; in training mode the codebook learns from them, as in a
        call. For a layer that does not search alone.

        Args:
            rows: the vectors, ``(..., dim)``.
            indices, loss: those of :meth:`forward`.
            mask: as there.
        """
        if not self.training:
            return self._measure(rows, indices, loss)
        if self.learns or self.kmeans_iters:
            keep_out_of_checkpoints(self._passes)
        return self._learn(self._state(shared=True), rows, _counted(rows, indices, loss), mask)

    def _state(self, *, shared: bool) -> CodebookState:
        return CodebookState(self.codebook, self.ema_count, self._buffers.get("ema_sum"), self.started, self.cosine, shared)

    def _measure(self, rows: Tensor, indices: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Perplexity and usage."""
        counts = histogram(_counted(rows, indices, loss), self.codebook.shape[:-1])
        if self.global_evaluation and not self.training:
            _processes.all_reduce(counts)
        return perplexity_and_usage(counts)

    def _evaluate(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Quantized vectors, indices, loss and statistics, with the codebook as it is."""
        rows = F.normalize(rows, dim=-1) if self.cosine else rows
        quantized, indices, loss = self._quantize(rows, self.codebook, mask)
        return quantized, indices, loss, self._measure(rows.detach(), indices, loss)

    def _train(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        """The same; the codebook learns from the vectors."""
        if self.learns or self.kmeans_iters:
            keep_out_of_checkpoints(self._passes)
        recomputes = is_recomputing()
        checkpointed = recomputes or may_be_recomputed()
        source = fingerprint(rows) if checkpointed else None
        seen = self._passes.recall(source) if recomputes and source is not None else None
        if recomputes and seen is None:
            return self._evaluate(rows, mask)
        starts = self._must_start() if seen is None else seen.starts
        state = self._state(shared=not recomputes)
        if checkpointed:
            # A recomputation runs the same operators, because selective checkpointing counts them, and draws the same random numbers,
            # because later layers draw from the same generator. It runs them on copies, so the first pass copies too.
            copies = state.copy()
            state = copies if recomputes else state
        if starts:
            with torch.no_grad():
                state.start(rows.detach(), mask, iters=self.kmeans_iters)
        rows = F.normalize(rows, dim=-1) if self.cosine else rows
        # The quantizer gets a copy of a codebook that changes before the backward pass.
        codes = self.codebook if seen is None else seen.codes
        codes = with_value(self.codebook, codes) if self.learns or checkpointed else codes
        quantized, indices, loss = self._quantize(rows, codes, mask)
        statistics = self._learn(state, rows.detach(), _counted(rows.detach(), indices, loss), mask)
        if seen is not None:
            statistics = seen.statistics
        elif source is not None:
            self._passes.remember(source, _Seen(codes.detach(), starts, statistics))
        if checkpointed:
            # A reentrant checkpoint turns every tensor that it returns into an output of its graph; detached ones do not keep it alive.
            statistics = statistics[0].detach(), statistics[1].detach()
        return quantized, indices, loss, statistics

    def _quantize(self, rows: Tensor, codes: Tensor, mask: Tensor | None) -> FV.VQ:
        if self.cosine and self.update == "gradient":
            codes = F.normalize(codes, dim=-1)
        costs: dict[str, Any] = {"commitment_cost": self.commitment_cost, "codebook_cost": self.codebook_cost}
        if mask is None:
            return FV.vector_quantize(rows, codes, gradient=self.gradient, **costs)
        # A masked vector may hold NaN, which a product with 0 would keep.
        quantized, indices, errors = FV.vector_quantize(
            torch.where(mask[..., None], rows, 0.0), codes, gradient=self.gradient, reduction="none", **costs
        )
        kept = torch.where(mask[..., None], errors.float(), 0.0).sum()
        loss = kept / (mask.sum().clamp(min=1) * rows.shape[-1])
        return FV.VQ(torch.where(mask[..., None], quantized, 0.0), torch.where(mask, indices, -1), loss)

    @torch.no_grad()
    def _learn(self, state: CodebookState, rows: Tensor, indices: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Perplexity and usage, and from the same counts what the codebook learns."""
        if not self.learns:
            counts = histogram(indices, self.codebook.shape[:-1])
            state.add_processes(counts)
            return perplexity_and_usage(counts)
        counts, sums = codebook_sums(rows, indices, state.codebook)
        state.add_processes(counts, sums)
        state.move(counts, sums, decay=self.decay, eps=self.eps)
        if self.revive_below > 0:
            state.revive(rows, mask, below=self.revive_below)
        return perplexity_and_usage(counts)

    def _must_start(self) -> bool:
        if self.kmeans_iters == 0:
            return False
        if _processes.is_distributed() and not self._processes_agree:
            self._adopt_start()
            self._processes_agree = True
        return not self._has_started()

    def _has_started(self) -> bool:
        """The value of the buffer ``started``. Reading it waits for an accelerator, so True is read once: again where another tensor is in
        its place, or where somebody has written to it, which DistributedDataParallel does at every step."""
        if torch.compiler.is_compiling():
            # A compiled graph can neither compare tensors nor read them, so the graph breaks here until True has been seen.
            if self._seen_started is None and self.started:
                self._seen_started, self._seen_version = self.started, -1
            return self._seen_started is not None
        if self._seen_started is self.started and (self._seen_version == self.started._version or _processes.is_distributed()):
            return True
        started = self.started.is_meta or bool(self.started)
        self._seen_started, self._seen_version = (self.started, self.started._version) if started else (None, -1)
        return started

    @torch.no_grad()
    def _adopt_start(self) -> None:
        """Gives all processes the codebook of one that has started, such as the one that loaded a checkpoint. k-means in the others alone
        would wait for it for ever."""
        ranks = _processes.where_true(self.started)
        if 0 < len(ranks) < _processes.world_size():
            state = (self.codebook, self.ema_count, self._buffers.get("ema_sum"))
            _processes.broadcast(*(t for t in state if t is not None), src=ranks[0])
            self.started.fill_(True)

    def _split_heads(self, x: Tensor) -> Tensor:
        """``x``, or (heads, rows, dim of a head) where each head has a codebook, or (rows, heads, dim of a head) where they share one."""
        if self.heads == 1:
            return x
        split = x.reshape(-1, self.heads, self.dim // self.heads)
        return split if self.share_codebook else split.transpose(0, 1)

    def _split_mask(self, mask: Tensor) -> Tensor:
        if self.heads == 1:
            return mask
        spread = mask.reshape(-1, 1).expand(-1, self.heads)
        return spread if self.share_codebook else spread.transpose(0, 1)

    def _join_heads(self, quantized: Tensor, shape: torch.Size) -> Tensor:
        if self.heads == 1:
            return quantized
        return (quantized if self.share_codebook else quantized.transpose(0, 1)).reshape(shape)

    def _join_indices(self, indices: Tensor, shape: torch.Size) -> Tensor:
        if self.heads == 1:
            return indices
        # Contiguous, so that .view() works on what a user keeps.
        return (indices if self.share_codebook else indices.transpose(0, 1)).reshape(*shape, self.heads).contiguous()

    def extra_repr(self) -> str:
        names = (
            "update", "commitment_cost", "gradient", "decay", "eps", "revive_below", "kmeans_iters", "cosine", "heads", "share_codebook",
            "channels_first", "global_evaluation",
        )  # fmt: skip
        return f"{self.num_codes}, {self.dim}, " + ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype == statistics_dtype(tensor.dtype)


def _counted(rows: Tensor, indices: Tensor, loss: Tensor) -> Tensor:
    """``indices``, with -1 for vectors that are not finite."""
    # Where the loss is finite, every vector is. On the CPU the host reads the loss without waiting.
    if type(loss) is Tensor and loss.device.type == "cpu" and not transformed() and math.isfinite(loss.item()):
        return indices
    return torch.where(finite_rows(rows), indices, -1)
