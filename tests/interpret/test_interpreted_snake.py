"""The Snake kernels in the interpreter against float64, in both memory layouts."""

import pytest
import torch
from _helpers import Place
from test_snake import Case, check

CASES = [
    Case((2, 6, 35)),
    Case((2, 6, 5, 3), layout="last", grad_layout="last"),
    Case((1, 4, 7), with_beta=False),
    Case((3, 8, 1), layout="last"),
    # More channels than a tile, and several splits.
    Case((1, 150, 9), layout="last", grad_layout="contiguous"),
    Case((2, 3, 5000)),
    Case((19, 40, 3), size=100.0),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case, dtype):
    check(Place("cpu", "triton"), dtype, case)
