"""The CUDA kernels, emulated, under the contracts of tests/test_contracts.py whose outcome depends on a backend's operators."""

import pytest
from _calls import CALLS_OF_KERNELS
from _helpers import Place
from test_contracts import CONTRACTS, QUICK_CHECKS, check_the_other_operators, runs_operators_that_pass_opcheck

EMULATED = Place("cpu", "cuda")
each_call = pytest.mark.parametrize("call", CALLS_OF_KERNELS, ids=str)
# With this argument the backend is forced.
pytestmark = pytest.mark.parametrize("place", [EMULATED], ids=str)


@each_call
def test_autocast(call, place):
    CONTRACTS["serves_autocast"](call, place)


@each_call
def test_operators_fit_their_schema_and_fake(call, place):
    runs_operators_that_pass_opcheck(call, place, QUICK_CHECKS)


def test_operators_that_no_call_runs(place):
    check_the_other_operators(place, QUICK_CHECKS)
