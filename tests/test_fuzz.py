"""A short form of ``make fuzz``: cases of every family of public functions against the reference in float64. See ``tests/_fuzz.py``."""

import inspect
import math
import sys

import pytest
import torch
from _fuzz import Draw, Size, Trial, compare, excused, outside, run
from _fuzz_families import FAMILIES

from fastvae import functional as FV

CASES = 200  # of each family and share; some seconds a family
CASES_OF_A_PROOF = 5_000


@pytest.fixture(autouse=True)
def unchanged_instruction_set():
    extension = sys.modules.get("fastvae._C")
    previous = extension.instruction_set() if extension else None
    yield
    if extension:
        extension.set_instruction_set(previous)


def failures(family: str, first: int, cases: int) -> list[str]:
    verdicts = [run(family, FAMILIES[family][0], number) for number in range(first, first + cases)]
    tried = [verdict for verdict in verdicts if verdict is not None]
    assert len(tried) > cases / 2
    return [verdict.failure for verdict in tried if verdict.failure]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_cases_of_a_family(family):
    assert failures(family, 0, CASES) == []


@pytest.mark.prove
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("family", FAMILIES)
def test_many_cases_of_a_family(family):
    assert failures(family, CASES, CASES_OF_A_PROOF) == []


def test_every_public_function_has_a_family():
    functions = {name for name in FV.__all__ if inspect.isfunction(getattr(FV, name))}
    assert {name for _, _, names in FAMILIES.values() for name in names} == functions


@pytest.mark.parametrize("family", FAMILIES)
def test_a_case_is_decided_by_its_number(family):
    first, again, other = (FAMILIES[family][0](Draw(family, number)) for number in (3, 3, 4))
    for a, b in zip(first.tensors.values(), again.tensors.values(), strict=True):
        assert a.stride() == b.stride()
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
    shapes = [[(t.shape, t.dtype) for t in trial.tensors.values()] for trial in (first, other) if trial is not None]
    values = [[t.nan_to_num() for t in trial.tensors.values()] for trial in (first, other) if trial is not None]
    assert shapes[0] != shapes[-1] or not all(map(torch.equal, *values))


# A fuzzer that misses faults says nothing: these are what it has to find.


def of(*numbers: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype)


@pytest.mark.parametrize(
    ("actual", "oracle", "wrong"),
    [
        (1.0, 1.0, False),
        (1.0 + 1e-6, 1.0, False),
        (1.0 + 1e-5, 1.0, True),
        (math.nan, math.nan, False),
        (math.nan, 0.0, True),
        (0.0, math.nan, True),
        (math.inf, 1e39, False),
        (-math.inf, 1e39, True),
        (math.inf, 3.4028234e38, False),
        (math.inf, 1e38, True),
        (1e38, math.inf, True),
        (math.nan, 1e39, True),
        (0.0, 1e-45, False),
        (0.0, 1e-39, True),
    ],
)
def test_what_is_outside_a_bound(actual, oracle, wrong):
    assert (outside(of(actual), of(oracle, dtype=torch.float64), Size(abs(oracle))) is not None) == wrong


@pytest.mark.parametrize(
    ("actual", "narrow", "passes"),
    [
        (2.0, 2.0, True),
        (2.0, 1.5, True),
        (2.0, 1.01, False),
        (math.inf, math.inf, True),
        (math.nan, 1.0, False),
        (0.0, math.nan, True),
        (0.0, 1.0, False),
    ],
)
def test_what_the_definition_in_the_same_arithmetic_excuses(actual, narrow, passes):
    assert excused(of(actual), of(1.0, dtype=torch.float64), of(narrow), torch.tensor([True]), overflown=False) == passes


FAULTS = {
    "a value": lambda results: results | {"output 0": results["output 0"] * (1 + 1e-4)},
    "an element": lambda results: results | {"output 0": results["output 0"].index_fill(0, torch.tensor([3]), 0.0)},
    "NaN": lambda results: results | {"output 0": results["output 0"].index_fill(0, torch.tensor([3]), math.nan)},
    "a gradient": lambda results: results | {"gradient of input": -results["gradient of input"]},
    "no gradient": lambda results: {"output 0": results["output 0"]},
    "a shape": lambda results: results | {"output 0": results["output 0"][None]},
    "a dtype": lambda results: results | {"gradient of input": results["gradient of input"].double()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault):
    x = torch.linspace(-1, 1, 10)
    results = {"output 0": x.square(), "gradient of input": 2 * x}
    oracle = {name: tensor.double() for name, tensor in results.items()}
    trial = Trial(lambda module, t: (), {"input": x}, ("input",), lambda wide, oracle, incoming: {}, extreme=False)
    assert compare(trial, results, oracle, {}, {}).failure is None
    assert compare(trial, FAULTS[fault](results), oracle, {}, {}).failure is not None
