# Each target makes what it needs from nothing and is quick the second time. People and CI use the same commands.
#
#   make demo     classify a handful of photographs, offline
#   make test     the tests
#   make test-hf  transformers' own common tests on our models; needs the package index
#   make check    lint, format, types, import contracts, C++ format
#   make native   the C++ core alone, with its tests (make sanitize: the same under sanitizers; make native-arm: for Arm,
#                 under an emulator; make native-windows: for Windows, under Wine)
#   make wheel    the wheel and the source distribution, in dist/ (make cross-wheels: wheels for other platforms)
#   make bench    time the operator against its peers
#   make gpu-check  on a GPU: are its kernels right, and how fast; one JSON in under ten minutes
#   make gpu-tune   on a GPU: time the kernels' configurations and keep the fastest
#
# PYTHON names the interpreter (3.11 or newer), TORCH what to install as PyTorch, such as TORCH=torch==2.14.1.

PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
NATIVE := CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test test-floor test-hf check native native-arm native-windows sanitize wheel cross-wheels bench gpu-check gpu-tune gpu-code format clean

demo: $(VENV)/.base
	$(BIN)/nbhd classify examples/photos

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The oldest libraries that are supported, in an environment of its own. TORCH=torch==2.6.0 takes the oldest PyTorch too.
test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=constraints-floor.txt ARGS="$(ARGS)"

# The common tests of the installed transformers, fetched from the package index; ARGS are pytest's.
test-hf: $(VENV)/.dev
	$(PIP) -c $(CONSTRAINTS) parameterized
	OMP_NUM_THREADS=1 $(BIN)/python tests/hf/run.py $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

# The core alone, and its own tests: every option against loops, 10,000 random geometries, hostile arguments, threads.
native: $(VENV)/.dev
	$(BIN)/cmake -S . -B build/cpu -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release
	$(BIN)/cmake --build build/cpu
	$(BIN)/ctest --test-dir build/cpu --output-on-failure

# The same tests for NEON under an emulator, with fewer geometries: it is slow.
native-arm: $(VENV)/.dev
	$(BIN)/cmake -S . -B build/arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/cmake/aarch64.cmake -DNBHD_FUZZ_CASES=400
	$(BIN)/cmake --build build/arm
	$(BIN)/ctest --test-dir build/arm --output-on-failure

# The same tests for Windows under Wine (the Debian package wine64), compiled by Zig's Clang (csrc/cmake/zig.cmake).
native-windows: $(VENV)/.zig
	$(BIN)/cmake -S . -B build/windows -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/csrc/cmake/zig.cmake -DNBHD_TARGET=x86_64-windows-gnu \
		-DNBHD_PYTHON=$(abspath $(BIN))/python -DNBHD_FUZZ_CASES=400
	$(BIN)/cmake --build build/windows
	WINEDEBUG=-all $(BIN)/ctest --test-dir build/windows --output-on-failure

# The same tests under the address, undefined-behaviour and thread sanitizers. More than half an hour on two cores; eight minutes with
# ARGS="--sets avx2 --cases 200", as CI has it.
sanitize: $(VENV)/.dev
	$(BIN)/python csrc/tests/check.py $(ARGS)

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --installer pip
	ls -l dist

# Wheels for Windows, macOS (Arm) and Linux (Arm), from here.
cross-wheels: $(VENV)/.zig
	$(BIN)/python csrc/cross_wheels.py $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

# These run with the PyTorch that the machine's GPU needs, so in an environment that is already there: GPU_PYTHON.
GPU_PYTHON ?= $(PYTHON)
gpu-check:
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.gpu_check $(ARGS)

gpu-tune:
	PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.gpu_tune --write $(ARGS)

# The machine code of the GPU kernels, for real targets without a GPU, and what it allows: docs/gpu.md has the tables.
gpu-code: $(VENV)/.dev
	$(BIN)/python -m benchmarks.gpu_compile --write
	$(BIN)/python -m benchmarks.gpu_bounds --write

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

# PyTorch goes in first and alone: asked for together with others, pip may prefer a larger build of it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'nbhd needs Python 3.11 or newer: make PYTHON=...')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.base: $(VENV)/.torch pyproject.toml $(CONSTRAINTS) $(NATIVE)
	$(PIP) -c $(CONSTRAINTS) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -c $(CONSTRAINTS) --editable ".[dev]"
	touch $@

$(VENV)/.zig: $(VENV)/.dev
	$(PIP) -c $(CONSTRAINTS) ziglang wheel
	touch $@

clean:
	rm -rf .venv .venv-floor build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
