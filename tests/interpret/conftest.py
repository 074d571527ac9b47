"""The Triton kernels in Triton's interpreter, which runs them on numpy: ``TRITON_INTERPRET=1 python -m pytest tests/interpret``."""

import pytest
import torch
from _helpers import TOLERANCES, places

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


@pytest.fixture(autouse=True)
def triton_backend():
    with fastvae.use_backend("triton"):
        yield
