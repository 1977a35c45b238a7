# On a fresh machine: `make run` shows the service at work, `make replicas` several of them that share a Redis,
# `make test` runs the tests, `make proof` the slower ones.
# Needs a POSIX make, Python >= 3.11 and a package index. Stamps in .venv keep later runs from installing again.
# ARGS goes to the command: make run ARGS="--port 8090", make test ARGS="-k settings".

.POSIX:
.PHONY: run replicas test proof lint format format-check types bench e2e-vllm clean help

VENV = .venv
VLLM_VENV = .venv-vllm
PYTHON_IN = $(VENV)/bin/python
PIP = $(PYTHON_IN) -m pip --disable-pip-version-check --quiet
# Only files whose hash is locked (scripts/lock), and none that would have to be compiled here.
INSTALL = $(PIP) install --require-hashes --only-binary :all:
ARGS =

run: $(VENV)/run.stamp
	$(PYTHON_IN) -m kvindexer demo $(ARGS)

# The Redis or Valkey is the one on PATH, or the one that the development dependencies bring.
replicas: $(VENV)/dev.stamp
	$(PYTHON_IN) -m kvindexer demo --replicas 3 $(ARGS)

test: $(VENV)/dev.stamp
	$(PYTHON_IN) -m pytest -m "not proof" $(ARGS)

proof: $(VENV)/dev.stamp
	$(PYTHON_IN) -m pytest -m proof $(ARGS)

lint: $(VENV)/dev.stamp
	$(PYTHON_IN) -m ruff check . $(ARGS)

format: $(VENV)/dev.stamp
	$(PYTHON_IN) -m ruff format . $(ARGS)

format-check: $(VENV)/dev.stamp
	$(PYTHON_IN) -m ruff format --check . $(ARGS)

types: $(VENV)/dev.stamp
	$(PYTHON_IN) -m mypy $(ARGS)

bench: $(VENV)/dev.stamp
	$(PYTHON_IN) -m benchmarks --write docs/benchmarks.md $(ARGS)

# Optional, x86-64 Linux: two real vLLM servers on the CPU; the first time it installs 2.5 GB.
e2e-vllm: $(VENV)/run.stamp $(VLLM_VENV)/vllm.stamp
	PYTHONPATH=tests $(PYTHON_IN) -m e2e_vllm --vllm-python $(VLLM_VENV)/bin/python --write docs/e2e-vllm.md $(ARGS)

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

help:
	@echo "make run | replicas | test | proof | lint | format | format-check | types | bench | e2e-vllm | clean"

$(VENV)/made.stamp: scripts/find-python
	python=$$(PYTHON="$(PYTHON)" sh scripts/find-python) && "$$python" -m venv --clear $(VENV)
	touch $@

$(VENV)/run.stamp: $(VENV)/made.stamp requirements.lock requirements-build.lock pyproject.toml
	$(INSTALL) --requirement requirements-build.lock --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --no-index --editable .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp requirements-dev.lock
	$(INSTALL) --requirement requirements-dev.lock
	touch $@

$(VLLM_VENV)/vllm.stamp: $(VENV)/made.stamp tests/e2e_vllm/install.py
	$(PYTHON_IN) -m venv --clear $(VLLM_VENV)
	$(VLLM_VENV)/bin/python tests/e2e_vllm/install.py
	touch $@
