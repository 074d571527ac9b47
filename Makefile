# The two commands of a newcomer are `make demo` and `make test`; each sets up all that it needs in .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --constraint requirements/constraints.txt

# A process for each processor; the tests of one file stay in one process, because some build in one folder. The files go in the order in
# which they are collected, the long ones first.
PARALLEL := --numprocesses auto --dist loadfile --no-loadscope-reorder --quiet

# What `make bench` passes on, e.g. ARGS="latent --quick"; what `make gpu-pass` writes to and runs.
ARGS ?=
OUT ?= out/gpu-pass
STAGES ?=
# The other torch of `make compat`, and which of the tests run with it: all, or tenth, the tenth that today's date chooses.
TORCH ?= 2.10.0
TESTS ?= all
# What `make fuzz` runs: so many cases of all families, or of some; SEED decides them, the date by default.
CASES ?= 1000000
FAMILIES ?=
SEED ?=
# Steps of each model in `make soak`.
STEPS ?= 10000
# The same of `make prove`, and which proofs; all where none is named.
PART ?= all
PROOFS ?=

NATIVE := $(shell find csrc -type f)
CXX_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE)) $(wildcard tests/cpp/*.h tests/cpp/*.cpp)

.PHONY: demo test test-native test-cuda test-emulation test-interpret test-offline test-clang test-clang-kernels sanitize prove fuzz soak bench results docs compat lint format build setup clean gpu-pass
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: build
	$(RUN) -m fastvae demo

test: test-native test-cuda test-emulation test-interpret test-offline

test-native: build
	$(RUN) -m pytest tests $(addprefix --ignore=tests/,cuda emulation interpret offline) $(PARALLEL)

# Fills the memory of a GPU and looks at how much is in use; without one it says so.
test-cuda: build
	$(RUN) -m pytest tests/cuda -rs

# The emulated CUDA kernels register themselves for CPU tensors.
test-emulation: build
	$(RUN) -m pytest tests/emulation --numprocesses auto --quiet

# Triton decides at import whether it interprets, so its two suites have processes of their own.
test-interpret: build
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/interpret --numprocesses auto --quiet

test-offline: build
	$(RUN) -m pytest tests/offline

# The C++ tests: the kernels without Python, by each compiler, and the operators' tests on what it builds.
test-clang: test-clang-kernels
	$(RUN) tests/cpp/operators.py clang++

test-clang-kernels: setup
	$(RUN) tests/cpp/build.py clang++

# The same under sanitizers, each of which ends at its first report. About an hour on two cores.
sanitize: setup
	$(RUN) tests/cpp/build.py g++ clang++ --sanitize address undefined thread
	$(RUN) tests/cpp/operators.py g++ --sanitize address undefined

# The long proofs, with PART=today the part that the date chooses; PROOFS names some of them. About an hour on two cores.
prove: build
	$(RUN) tools/prove.py $(PROOFS) --part $(PART)

# Every public function against the reference in float64, on one core: about an hour for a million cases. A failure prints how to repeat it.
fuzz: build
	$(RUN) tools/fuzz.py $(FAMILIES) --cases $(CASES) $(if $(SEED),--seed $(SEED))

# Ten thousand training steps of each ready-made network with batches that change, and the memory after them. A quarter of an hour.
soak: build
	$(RUN) tools/soak.py --steps $(STEPS)

# Some gigabytes and many minutes, in a .venv-compat-* of its own; PYTHON says for which Python.
compat: build
	$(PYTHON) tools/compat.py $(TORCH) --pinned $(RUN) --tests $(TESTS)

bench: build
	$(RUN) -m benchmarks $(ARGS)

# All that the documentation says of this machine. Only on one that does nothing else.
results: build
	$(RUN) -m benchmarks $(ARGS)
	$(RUN) -m benchmarks.profile_conv_vae
	$(RUN) -m benchmarks.report
	$(RUN) -m benchmarks.report --floors

# docs/ as a site, in site/. Nothing is fetched. The variable switches off the theme's notice about its successor.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

# On a GPU machine the torch that is installed there is used, and nothing is downloaded.
gpu-pass:
	@if $(PYTHON) -c "import torch" 2>/dev/null; then python=$(PYTHON); else $(MAKE) setup && python=$(RUN) || exit 1; fi; \
	$$python tools/gpu_pass.py $(OUT) $(if $(STAGES),--stages $(STAGES))

build: $(VENV)/.built

setup: $(VENV)/.installed

$(VENV)/.python:
	@$(PYTHON) -c "import sys; sys.exit('fastvae needs Python 3.10 or newer' if sys.version_info < (3, 10) else 0)"
	@echo "Setting up $(VENV): some minutes, once."
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by itself: where pip is offered a CPU build of that version, it is taken and nothing later replaces it.
$(VENV)/.torch: $(VENV)/.python requirements/constraints.txt
	$(PIP) torch
	$(PIP) "setuptools>=77" wheel pybind11 ninja numpy
	touch $@

# Only the Python side: pip would compile everything anew each time, and hide what the compiler says.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	FASTVAE_BUILD=0 $(PIP) --no-build-isolation --editable ".[dev]"
	touch $@

$(VENV)/.built: $(VENV)/.installed setup.py $(NATIVE)
	$(RUN) setup.py build_ext --inplace
	touch $@

clean:
	rm -rf build dist out site *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks $(VENV)/.built .venv-compat-*
	find fastvae kernels tests benchmarks tools -name "__pycache__" -prune -exec rm -rf {} +
	rm -f fastvae/*.so
