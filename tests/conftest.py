"""What holds for every test: uninitialised memory is NaN, and a test with a ``place`` runs on that place's backend."""

import gc
import os
import sys

# cuBLAS asks for this where deterministic algorithms are on; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Read when torch starts: workers share the processors, and threads that wait for one another take twice as long. Tests of what several
# threads do say how many.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import hypothesis
import pytest
import torch
from _helpers import Place
from _ranks import two_ranks

import fastvae

# No deadline: nothing here depends on speed. Derandomized: a run on CI and one at home try the same cases.
hypothesis.settings.register_profile("fastvae", deadline=None, max_examples=100, derandomize=True)
# For a GPU that is had for minutes: Triton compiles for many an example anew.
hypothesis.settings.register_profile("brief", parent=hypothesis.settings.get_profile("fastvae"), max_examples=10)
hypothesis.settings.load_profile("fastvae")


def pytest_addoption(parser):
    parser.addoption("--tenth", type=int, choices=range(10), help="run every tenth test, beginning with this one")


# Files that start many processes. One of them at the end would leave all other workers idle.
LONG_FILES = {
    *("test_training_cli.py", "test_training_full_disk.py", "test_packaging.py", "test_demo.py"),
    *("test_public_names.py", "test_training_ranks.py", "test_benchmarks.py"),
}


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)
    tenth = config.getoption("--tenth")
    if tenth is not None:
        config.hook.pytest_deselected(items=[item for index, item in enumerate(items) if index % 10 != tenth])
        items[:] = items[tenth::10]


def pytest_collection_finish():
    # Tests and modules live as long as the process. Going through them at each collection, of which compilers cause many, took a third of
    # the time of the tests that compile.
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory():
    """Fills what ``torch.empty`` and the operators in C++ allocate with NaN, so that an element that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if extension := sys.modules.get("fastvae._C"):
        extension.set_poison(True)


def _settings_of_torch():
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "filled memory": torch.utils.deterministic.fill_uninitialized_memory,
        "autocast": torch.is_autocast_enabled("cpu"),
    }


@pytest.fixture(autouse=True, scope="module")
def unchanged_settings(poisoned_memory):
    """Fails a file of tests that leaves torch other than it found it: the next file in its process would run with that."""
    before = _settings_of_torch()
    yield
    assert _settings_of_torch() == before


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    """Forces the backend of the argument ``place``. No fixture: hypothesis refuses one that is set up once a test."""
    place = pyfuncitem.callspec.params.get("place") if hasattr(pyfuncitem, "callspec") else None
    if not isinstance(place, Place):
        return (yield)
    with fastvae.use_backend(place.backend):
        return (yield)


def _instruction_sets() -> tuple[str, ...]:
    extension = sys.modules.get("fastvae._C")
    return extension.instruction_sets() if extension else ()


@pytest.fixture(params=_instruction_sets())
def instruction_set(request):
    """Forces the C++ backend, compiled for one instruction set after the other of those that this processor has."""
    extension = sys.modules["fastvae._C"]
    previous = extension.instruction_set()
    extension.set_instruction_set(request.param)
    with fastvae.use_backend("cpp"):
        yield request.param
    extension.set_instruction_set(previous)


@pytest.fixture
def one_thread():
    """For tests of small networks, which several threads make slower, and whose sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with two_ranks(tmp_path_factory.mktemp("ranks")) as both:
        yield both
