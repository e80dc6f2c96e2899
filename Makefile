# `make demo` and `make test` need Python >= 3.10 and a package index, nothing else: they make their own environment in
# .venv, once, and work offline afterwards.
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

.PHONY: demo test test-oldest lint clean

demo: $(VENV)/.ready
	$(VENV)/bin/captum-dtd explain "$(CLIP)" --model $(MODEL) --weights $(WEIGHTS) -o $(DEMO)

test: $(VENV)/.ready
	$(PYTEST)

test-oldest:
	$(MAKE) test VENV=.venv-oldest TORCH="torch==2.11.* torchvision==0.26.*"

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.ready: pyproject.toml setup.py
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed; name it with make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --editable ".[test,lint,train]" $(TORCH)
	@$(VENV)/bin/python -m pip install --quiet zennit || echo "zennit does not install here: the tests skip its cross-check"
	touch $@

clean:
	rm -rf .venv .venv-oldest build demo *.egg-info
