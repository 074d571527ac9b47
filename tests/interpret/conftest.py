"""The Triton kernels in Triton's interpreter, which runs them on numpy: ``TRITON_INTERPRET=1 python -m pytest tests/interpret``."""

import numpy
import pytest
import torch
import triton
from _helpers import TOLERANCES, places
from _interpreter import LanguageOfALaunch, watch_memory
from triton.runtime import interpreter

import fastvae

if not any(place.backend == "triton" for place in places("latent_forward")):
    raise pytest.UsageError(
        "tests/interpret: fastvae was imported without TRITON_INTERPRET=1; set it before Python starts (make test-interpret)"
    )

# The interpreter cuts a float32 off where a GPU rounds it to bfloat16 (documented: it has no bfloat16 arithmetic): up to a unit in the last
# place instead of half of one.
TOLERANCES[torch.bfloat16]["rtol"] = 7.9e-3


def pytest_configure(config):
    # A GPU says nothing where numpy warns.
    config.addinivalue_line("filterwarnings", "ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(scope="session", autouse=True)
def working_interpreter():
    """That of Triton 3.6 makes a Python number of an array with one element, which NumPy no longer lets it."""
    versions = [tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, numpy)]
    if versions[0] <= (3, 6) and versions[1] >= (2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} does not work with NumPy {numpy.__version__}: use NumPy < 2.4")


@pytest.fixture(scope="session", autouse=True)
def patched_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", LanguageOfALaunch())
        watch_memory(patch)
        yield


@pytest.fixture(autouse=True)
def triton_backend():
    with fastvae.use_backend("triton"):
        yield
