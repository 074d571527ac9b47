"""The mutual information of each code with each factor, by a histogram of the codes."""

import torch
from torch import Tensor


def discretize(codes: Tensor, num_bins: int) -> Tensor:
    """Bins of equal width from each code's minimum to its maximum: their numbers, ``(n, d)``; a constant code is in one bin."""
    columns = codes.T.contiguous()
    low, high = columns.aminmax(dim=1, keepdim=True)
    edges = low + torch.arange(num_bins, device=codes.device) * ((high - low) / num_bins)
    return (torch.searchsorted(edges, columns, right=True) - 1).T


def entropy(counts: Tensor) -> Tensor:
    """The entropy in nats of the distributions along the last dimension."""
    shares = counts.double() / counts.sum(-1, keepdim=True)
    return -torch.xlogy(shares, shares).sum(-1)


def histogram_information(codes: Tensor, factors: Tensor, num_bins: int) -> Tensor:
    """I(code; factor) in nats, ``(d, k)``, at least 0.

    Args:
        codes: ``(n, d)`` float64.
        factors: ``(n, k)`` int64, numbered from 0.
        num_bins: bins for each code.
    """
    bins = discretize(codes, num_bins)
    return torch.stack([_information(bins, values, num_bins) for values in factors.unbind(1)], 1)


def _information(bins: Tensor, values: Tensor, num_bins: int) -> Tensor:
    dimensions, num_values = bins.shape[1], int(values.max()) + 1
    cells = (torch.arange(dimensions, device=bins.device) * num_bins + bins) * num_values + values[:, None]
    counts = torch.bincount(cells.flatten(), minlength=dimensions * num_bins * num_values).view(dimensions, num_bins, num_values)
    # H(code) + H(factor) - H(code, factor); rounding may leave less than 0.
    return (entropy(counts.sum(2)) + entropy(counts.sum(1)) - entropy(counts.flatten(1))).clamp(min=0)
