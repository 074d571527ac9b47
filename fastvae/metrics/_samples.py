"""A metric that keeps a bounded sample of what it is given, the same one for any batch size, order and number of processes."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastvae._extras import extra
from fastvae.distributions.prior import check_count
from fastvae.metrics._row_hash import hash_rows

with extra("metrics"):
    from torchmetrics import Metric

# Counting the rows of more parts at each update takes longer than joining them.
MAX_PARTS = 1000


def _common_widths(widths: Tensor) -> Tensor:
    """The widths ``(fields,)`` of ``(processes, fields)``, where 0 is that of a process without data."""
    common = widths.amax(0)
    if ((widths != common) & (widths > 0)).any():
        raise ValueError(f"add_samples: got tensors of dim {widths.tolist()} in the processes, takes the same in all")
    return common


class SampledMetric(Metric):
    r"""The base of metrics that need their samples at ``compute()``: at most ``max_samples`` are kept, drawn at random.

    The sketch is a bottom-k sample. The key of a sample is a hash of its bytes; the ``max_samples`` distinct samples with the smallest keys
    are kept, each with the number of times it came. A sample among these has been among them from its first arrival, so its count is exact,
    and the sketch depends on the multiset of all samples alone. Up to ``max_samples`` distinct samples it is complete.

    A subclass names its tensors in ``fields``, passes batches to :meth:`add_samples` and reads :meth:`samples` in ``compute()``.

    Args:
        max_samples: distinct samples that are kept; up to twice as many are in memory, with ``8 * (2 + width)`` bytes each.
        kwargs: of ``torchmetrics.Metric``.
    """

    is_differentiable = False
    # forward() of the other kind joins lists without end.
    full_state_update = True

    # The tensors of a sample and their dtype in the sketch: float64 or int64.
    fields: ClassVar[dict[str, torch.dtype]]
    # Flat rows of key, count and the sample's words. Flat, because a process without data does not know their width.
    rows: list[Tensor]
    widths: Tensor

    def __init__(self, max_samples: int = 100_000, **kwargs: Any):
        super().__init__(**kwargs)
        self.max_samples = check_count("max_samples", max_samples)
        # Joined first, so that an error leaves the rows of this process as they were.
        self.add_state("widths", torch.zeros(len(self.fields), dtype=torch.int64), dist_reduce_fx=_common_widths)
        self.add_state("rows", [], dist_reduce_fx="cat")

    def add_samples(self, **tensors: Tensor) -> None:
        """Adds a batch.

        Args:
            tensors: ``(batch, width)`` under each name of ``fields``; any floating dtype where that is float64, else any integers.

        Raises:
            ValueError: for other shapes, for lengths or widths that differ, for values that are not finite.
            TypeError: for another dtype.
        """
        for name, tensor in tensors.items():
            self._check(name, tensor)
        lengths = {name: len(tensor) for name, tensor in tensors.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{', '.join(lengths)}: got batches of {', '.join(map(str, lengths.values()))}, takes one size for all")
        self._set_widths([tensors[name].shape[1] for name in self.fields])
        words = torch.cat([self._words(tensors[name], dtype) for name, dtype in self.fields.items()], 1)
        self.rows.append(torch.cat([hash_rows(words)[:, None], torch.ones_like(words[:, :1]), words], 1).flatten())
        if len(self.rows) > MAX_PARTS or sum(map(len, self.rows)) > 2 * self.max_samples * self._row_width():
            self._compact()

    def samples(self, min_samples: int = 1) -> dict[str, Tensor]:
        """Gives what is kept, ``(n, width)`` under each name, n at most ``max_samples``, in the order of keys, float64 or int64.

        Samples that came several times stand there as often, or in proportion where there are more than ``max_samples`` in all.

        Args:
            min_samples: how many the metric needs.

        Raises:
            ValueError: for fewer.
        """
        rows = self._distinct()
        ends = rows[:, 1].cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        if total < min_samples:
            raise ValueError(f"{type(self).__name__}: got {total} samples, takes at least {min_samples}")
        kept = min(total, self.max_samples)
        # Every (total / kept)-th of all samples in the order of keys.
        positions = (2 * torch.arange(kept, device=rows.device) + 1) * total // (2 * kept)
        words = rows[torch.searchsorted(ends, positions, right=True), 2:]
        parts = words.split(self.widths.tolist(), 1)
        return {name: part.contiguous().view(dtype) for part, (name, dtype) in zip(parts, self.fields.items(), strict=True)}

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Joins the samples of all processes, see ``torchmetrics.Metric``."""
        # All processes then have one tensor of the same dtype, those without data too.
        self._compact()
        super().sync(*args, **kwargs)

    def _check(self, name: str, tensor: Tensor) -> None:
        if tensor.ndim != 2 or tensor.shape[1] == 0:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, takes (batch, dim) with dim > 0")
        wants_floating = self.fields[name].is_floating_point
        if tensor.is_complex() or tensor.is_floating_point() != wants_floating:
            raise TypeError(f"{name}: got {tensor.dtype}, takes {'a floating dtype' if wants_floating else 'integers'}")
        if not tensor.isfinite().all():
            raise ValueError(f"{name}: got values that are not finite")

    def _set_widths(self, widths: list[int]) -> None:
        for index, (name, width) in enumerate(zip(self.fields, widths, strict=True)):
            earlier = int(self.widths[index])
            if earlier not in (0, width):
                raise ValueError(f"{name}: got dim {width}, takes {earlier} as in earlier batches")
        self.widths = torch.tensor(widths, device=self.device)

    def _row_width(self) -> int:
        return 2 + int(self.widths.sum())

    def _words(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        # Adding zero makes -0.0 the 0.0 that it is equal to.
        return (tensor.detach().to(self.device, dtype) + 0).view(torch.int64)

    def _distinct(self) -> Tensor:
        """Distinct samples with the smallest keys in their order, ``(n, 2 + width)``, each with its count in column 1."""
        parts = [self.rows] if isinstance(self.rows, Tensor) else [part.to(self.device) for part in self.rows]
        rows = torch.cat([torch.empty(0, dtype=torch.int64, device=self.device), *parts]).view(-1, self._row_width())
        keys, order = rows[:, 0].sort(stable=True)
        keys, lengths = keys.unique_consecutive(return_counts=True)
        ends = lengths.cumsum(0)
        totals = torch.cat([lengths.new_zeros(1), rows[order, 1].cumsum(0)])
        smallest = slice(self.max_samples)
        distinct = rows[order[(ends - lengths)[smallest]]]
        distinct[:, 1] = (totals[ends] - totals[ends - lengths])[smallest]
        return distinct

    def _compact(self) -> None:
        self.rows = [self._distinct().flatten()]
