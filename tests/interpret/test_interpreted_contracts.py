"""The Triton kernels, interpreted, under the contracts of tests/test_contracts.py whose outcome depends on a backend's operators."""

import pytest
from _calls import CALLS_OF_KERNELS, first_of_each_function
from _helpers import Place, brief
from test_contracts import CONTRACTS, QUICK_CHECKS, check_the_other_operators, runs_operators_that_pass_opcheck

INTERPRETED = Place("cpu", "triton")
# The interpreter takes seconds for a large feature map; test_interpreted_group_norm.py has its pieces.
CALLS = {call.name: call for call in CALLS_OF_KERNELS if not call.name.startswith("GroupNorm and SiLU")}
each_call = pytest.mark.parametrize("call", brief(CALLS, [call.name for call in first_of_each_function(CALLS.values())]))
# One of each family.
FAMILIES = ("KL by sample", "MSE elementwise", "contractive penalty", "gram", "vector quantization", "GroupNorm alone")


@pytest.mark.parametrize("call", [call for call in CALLS_OF_KERNELS if call.name in FAMILIES], ids=str)
def test_a_kernel_is_part_of_one_graph(call):
    CONTRACTS["compiles_in_one_graph"](call, INTERPRETED)


@each_call
def test_operators_fit_their_schema_and_fake(call):
    runs_operators_that_pass_opcheck(call, INTERPRETED, QUICK_CHECKS)


def test_operators_that_no_call_runs():
    check_the_other_operators(INTERPRETED, QUICK_CHECKS)
