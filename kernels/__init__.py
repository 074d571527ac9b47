"""Triton kernels and their launchers; importing a family registers it with the operators."""

import triton  # noqa: F401
