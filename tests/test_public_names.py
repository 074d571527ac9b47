"""The names that a user imports: each is there, lazily where it is heavy, and nothing else of a checkout is."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).resolve().parents[1]
MODULES = (
    "fastvae",
    "fastvae.functional",
    "fastvae.nn",
    "fastvae.distributions",
    "fastvae.models",
    "fastvae.compat",
    "fastvae.reference",
    "fastvae.models.networks",
)


# torch, which the package imports first, is imported once for all.
FORKS = """
import os, sys, torch
for code in sys.argv[1:]:
    if os.fork() == 0:
        exec(code, {})
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def in_new_processes(codes: list[str]) -> list[str]:
    """Runs each program in a process of its own, and gives the line that it prints."""
    return subprocess.run([sys.executable, "-c", FORKS, *codes], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_there_is(module):
    namespace = importlib.import_module(module)
    assert len(set(namespace.__all__)) == len(namespace.__all__)
    for name in namespace.__all__:
        assert getattr(namespace, name) is not None
    assert set(namespace.__all__) <= set(dir(namespace))


def test_a_star_import_brings_every_public_name():
    codes = [f"from {module} import *; import {module} as m; print(all(name in globals() for name in m.__all__))" for module in MODULES]
    assert in_new_processes(codes) == ["True"] * len(MODULES)


def test_no_import_brings_all_of_torch_compile():
    """It takes longer than all of the package."""
    codes = [f"import sys, {module}; print('{module}', 'torch._dynamo' in sys.modules)" for module in MODULES]
    assert in_new_processes(codes) == [f"{module} False" for module in MODULES]


def test_each_public_name_needs_no_import_but_that_of_the_package():
    codes = [f"import fastvae; print('{name}', fastvae.{name} is not None)" for name in fastvae.__all__]
    assert in_new_processes(codes) == [f"{name} True" for name in fastvae.__all__]


def test_a_public_class_or_function_of_a_module_is_in_its_all():
    """What is imported into a module's namespace to be used by others is listed there."""
    for module in map(importlib.import_module, MODULES[1:6]):
        public = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "").startswith("fastvae.") and callable(value)
        }
        assert public <= set(module.__all__), module.__name__


def test_an_unknown_name_raises():
    with pytest.raises(AttributeError, match="'fastvae' has no attribute 'optimise'"):
        fastvae.optimise  # noqa: B018


@pytest.mark.parametrize("name", ["setup", "tests", "benchmarks", "csrc", "tools"])
def test_nothing_else_of_a_checkout_is_a_part_of_the_package(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"fastvae.{name}")
