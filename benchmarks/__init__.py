"""The benchmark suite: one registry of cases, two ways to run it, one report.

``python -m benchmarks`` and ``pytest benchmarks/`` time the cases; ``python -m benchmarks.report`` draws and tabulates. A family's cases
live in ``bench_<stem>.py``, which declares inputs and providers and is found by its name: see :mod:`benchmarks.registry`.
"""

import os

# The profiler that measures peak memory on the CPU otherwise announces each of its runs on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
