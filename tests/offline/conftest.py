"""The kernels, compiled for GPUs that are not here. Triton decides at import whether it interprets, so the suite has its own process."""

import os
import sys
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    raise pytest.UsageError("tests/offline: TRITON_INTERPRET=1 compiles nothing; run it without (make test-offline)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
