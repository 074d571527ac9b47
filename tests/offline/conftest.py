"""The kernels, compiled for GPUs that are not here. Triton decides at import whether it interprets, so the suite has its own process."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/offline: TRITON_INTERPRET=1 compiles nothing; run it without (make test-offline)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


@pytest.fixture(scope="session")
def binaries() -> dict:
    """Each job of ``_jobs.JOBS`` is compiled now, to a list of offline_table.Code with one for each launch."""
    import offline_table
    from _jobs import JOBS

    results = iter(offline_table.compile_all())
    return {job: [next(results) for _ in job.case.kernels] for job in JOBS}
