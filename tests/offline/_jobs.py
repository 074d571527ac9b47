"""The jobs of tools/offline_table.py as parameters of tests."""

from dataclasses import dataclass

import offline_table
import pytest
from offline_cases import CASES, DTYPES, TARGETS, Case
from offline_table import Launch


@dataclass(frozen=True)
class Job:
    index: int
    dtype: str
    target: str

    @property
    def case(self) -> Case:
        return CASES[self.index]

    def launches(self) -> list[Launch]:
        return offline_table.launches(self.case, DTYPES[self.dtype], TARGETS[self.target][1])

    def __str__(self) -> str:
        return f"{self.target}-{self.dtype}-{self.case.name}"


JOBS = [Job(*job) for job in offline_table.jobs()]
# One of each maker. A compiler takes a minute for a target, and the others are long proofs.
OFTEN = ("sm_90", "gfx942")
each_target = pytest.mark.parametrize("target", [pytest.param(t, marks=() if t in OFTEN else pytest.mark.prove) for t in TARGETS])
each_job = pytest.mark.parametrize(
    "job", [pytest.param(job, id=str(job), marks=() if job.target in OFTEN else pytest.mark.prove) for job in JOBS]
)
