"""A hash of rows of 64-bit words."""

import torch
from torch import Tensor

# The multipliers and shifts of splitmix64 (Steele et al., *Fast Splittable Pseudorandom Number Generators*, 2014), as signed integers.
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)


def _shift_right(words: Tensor, bits: int) -> Tensor:
    """The logical shift; torch's is arithmetic."""
    return (words >> bits) & (2 ** (64 - bits) - 1)


def _mix(words: Tensor) -> Tensor:
    """A bijection of 64-bit words whose outputs look independent."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        words = (words ^ _shift_right(words, shift)) * multiplier
    return words ^ _shift_right(words, SHIFTS[-1])


def hash_rows(words: Tensor) -> Tensor:
    """A 64-bit key of each row of int64 ``(n, width)``, which depends on the row alone and is the same on every device."""
    columns = _mix(torch.arange(1, words.shape[1] + 1, device=words.device) * GOLDEN)
    return _mix(_mix(words ^ columns).sum(1))
