"""The CUDA kernels of Snake, emulated: what tests/test_snake.py asks of every backend."""

import pytest
import test_snake as contract
import torch
from _helpers import Place
from test_snake import Case, check

EMULATED = Place("cpu", "cuda")

# With this argument the backend is forced.
pytestmark = pytest.mark.parametrize("place", [EMULATED], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
each_layout = pytest.mark.parametrize("layout", ["contiguous", "last"])

SHAPES = [
    (3, 1, 1),  # one element
    (5, 20),  # one position
    (3, 520, 1),
    (1, 4, 7),
    (2, 33, 7, 9),  # odd everything
    (1, 130, 45),  # more channels than one tile
    (2, 4, 2400),  # rows of several pieces
    (40, 8, 64),  # more rows of partial sums than one split
]


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(place, dtype, layout, shape):
    check(place, dtype, Case(shape, layout=layout, grad_layout=layout))


@pytest.mark.parametrize("shape", [(0, 6, 4), (2, 6, 0), (2, 0, 3)], ids=str)
def test_empty(place, shape):
    contract.test_empty(place, shape)


@each_dtype
@each_layout
def test_nan_stays_in_its_element(place, dtype, layout):
    contract.test_nan_stays_in_its_element(place, dtype, layout, float("nan"))


def test_phases_of_many_periods(place):
    contract.test_phases_of_many_periods(place)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_with_16_bit_input(place, dtype):
    contract.test_float32_parameters_with_16_bit_input(place, dtype)
