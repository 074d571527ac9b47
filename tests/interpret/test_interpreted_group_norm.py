"""The GroupNorm kernels in the interpreter against float64, in both memory layouts."""

import pytest
import torch
from _helpers import Place
from test_group_norm import Case, check

CASES = [
    Case((2, 6, 5, 3), 3, layout="contiguous"),
    Case((2, 6, 5, 3), 3, layout="last", grad_layout="last"),
    Case((1, 4, 7), 4, affine=False, activation="none"),
    Case((3, 8, 1, 1), 2, layout="last"),
    Case((2, 36, 9, 11), 6, layout="last", grad_layout="contiguous"),
    Case((2, 4, 6, 6), 1, mean=1e4),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    check(Place("cpu", "triton"), dtype, case)
