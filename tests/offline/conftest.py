"""The kernels, compiled for GPUs that are not here. Triton decides at import whether it interprets, so the suite has its own process."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/offline: TRITON_INTERPRET=1 compiles nothing; run it without (make test-offline)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))


class Binaries:
    """Compiles jobs and keeps the result: for each a list of ``offline_table.Code``, one for each launch."""

    def __init__(self):
        self._of_targets: dict[str, dict] = {}

    def __getitem__(self, job) -> list:
        return self.of_target(job.target)[job]

    def of_target(self, target: str) -> dict:
        """All jobs of a target, which are compiled when the first of them is asked for."""
        import offline_table
        from _jobs import Job

        if target not in self._of_targets:
            jobs = [Job(*job) for job in offline_table.jobs([target])]
            self._of_targets[target] = dict(zip(jobs, offline_table.compile_all([target]), strict=True))
        return self._of_targets[target]


@pytest.fixture(scope="session")
def binaries() -> Binaries:
    return Binaries()
