# `make serve` and `make test` each set up everything they need first; a second call starts at once.
PYTHON ?= python3
VENV ?= .venv
# Environment for the other servers in `make bench-peers`.
PEERS ?= .venv-peers
# Package index for torch; https://download.pytorch.org/whl/cpu saves gigabytes of CUDA.
TORCH_INDEX ?=
ARGS ?=
# One package's tests alone: make test PACKAGE=service
PACKAGE ?=
# Number of test processes; tests marked `alone` wait for the others.
WORKERS ?= 2
SOAK_MINUTES ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CHECKPOINT ?= checkpoints/minilm-l6-squad
SQUAD ?= data/squad

# Triton runs the CPU engine with this Python's shared library; check for it before the downloads.
define CHECK_VERSION
import sys
if not (3, 10) <= sys.version_info < (3, 14):
    sys.exit("bertqa needs Python 3.10 to 3.13: make PYTHON=python3.12 ...")
endef
define CHECK_PYTHON
$(CHECK_VERSION)
import ctypes, sysconfig
name = "libpython%d.%d.so.1.0" % sys.version_info[:2]
try:
    ctypes.CDLL(sysconfig.get_config_var("LIBDIR") + "/" + name)
except OSError:
    try:
        ctypes.CDLL(name)
    except OSError:
        sys.exit("bertqa needs " + name + ": apt-get install libpython%d.%d" % sys.version_info[:2])
endef
export CHECK_VERSION CHECK_PYTHON

# Tests that need only the service's packages: no Triton, builder, Ray or trace collector.
FAST := tests/bertqa $(filter-out %/test_batch.py %/test_doctor.py %/test_rollout.py %/test_tracing.py %/test_workers.py, \
	$(wildcard tests/service/test_*.py)) tests/service/api tests/service/middleware tests/service/triton

.DEFAULT_GOAL := help
.PHONY: help serve test test-fast chaos lint audit bench bench-peers loadtest train-env finetune constraints clean

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: $(VENV)/serve.stamp  ## Build the engine if there is none, start Triton and the service (ARGS="--port 8080")
	$(BIN)/bertqa serve --checkpoint $(CHECKPOINT) $(ARGS)

test: $(VENV)/test.stamp  ## Run all tests: real Triton, Horovod, a browser (PACKAGE=service ARGS="-k page")
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
		$(if $(PACKAGE),tests/$(PACKAGE)) $(ARGS)

test-fast:  ## Run the tests that need neither Triton nor torch, on another Python (PYTHON=python3.13)
	@$(PYTHON) -c "$$CHECK_VERSION"
	venv=.venv-fast-$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])') && \
	{ [ -e $$venv/fast.stamp ] || { $(PYTHON) -m venv $$venv && \
		$$venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade pip && \
		$$venv/bin/python -m pip install --quiet --constraint constraints.txt --group test --editable '.[service]' && \
		touch $$venv/fast.stamp; }; } && \
	$$venv/bin/python -m pytest -m 'not triton and not slow' $(FAST) $(ARGS)

chaos: $(VENV)/test.stamp  ## Inject faults under load and print what happened to the requests (SOAK_MINUTES=60)
	-@$(PIP) --group fuzz
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m tests.chaos --soak-minutes $(SOAK_MINUTES) $(ARGS)

lint: $(VENV)/test.stamp  ## Check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

audit: $(VENV)/test.stamp  ## Look for secrets in tracked files and known vulnerabilities in pinned packages
	$(BIN)/python .ci/audit.py

bench: $(VENV)/test.stamp  ## Compare CPU runtimes and measure the service's own cost; prints tables
	$(BIN)/python -m engine_builder.benchmarks.compare_runtimes --checkpoint $(CHECKPOINT) --data $(CHECKPOINT)/gate.json
	$(BIN)/python -m loadtest.measure_service --long

loadtest: $(VENV)/loadtest.stamp  ## Throughput against clients, replicas and engines: tables, figures, a page (ARGS=--quick)
	$(BIN)/python -m loadtest.sweep --checkpoint $(CHECKPOINT) $(ARGS)

bench-peers: $(PEERS)/peers.stamp  ## Compare with alternative servers, in 7 minutes; prints a table
	$(BIN)/python -m loadtest.compare_servers --checkpoint $(CHECKPOINT) --peers-python $(PEERS)/bin/python $(ARGS)

train-env: $(VENV)/train.stamp  ## Install torch and build Horovod (Gloo, no Docker)

finetune: $(VENV)/train.stamp  ## Train the shipped checkpoint again, from SQuAD files in $(SQUAD)
	$(BIN)/horovodrun -np 2 --gloo $(BIN)/python -m training.finetune_squad \
		--train $(SQUAD)/train-v1.1.json --output runs/minilm-l6-squad $(ARGS)

constraints:  ## Resolve what pyproject.toml names, for every supported Python; pins stay where they fit (needs uv)
	sed '1,/^nvidia-pytriton/d' constraints.txt > constraints.new
	uv pip compile --quiet --universal --python-version 3.10 --all-extras --group dev --group fuzz --group horovod-build \
		--no-annotate --no-header pyproject.toml --output-file constraints.new
	{ sed '/^nvidia-pytriton/q' constraints.txt; cat constraints.new; } > constraints.tmp
	mv constraints.tmp constraints.txt && rm constraints.new

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) $(PEERS) .venv-fast-* logs runs tests/javascript/node_modules
	find model_repository -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +

# A hash of the set-up's inputs: CI can reuse a cached .venv with the same hash, although a fresh checkout has newer files.
serve_INPUTS := pyproject.toml constraints.txt
train_INPUTS := training/install_horovod.sh
loadtest_INPUTS := tests/install_servers.sh
test_INPUTS := tests/javascript/package-lock.json $(wildcard tests/install_*.sh)
.PHONY: FORCE
.PRECIOUS: $(VENV)/%.inputs
$(VENV)/%.inputs: FORCE
	@mkdir -p $(VENV); sha256sum $($*_INPUTS) | cmp --silent - $@ || sha256sum $($*_INPUTS) > $@

$(VENV)/serve.stamp: $(VENV)/serve.inputs
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[service,builder]'
	$(PIP) --no-deps nvidia-pytriton
	@touch $@

$(VENV)/train.stamp: $(VENV)/serve.stamp $(VENV)/train.inputs
	$(PIP) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --group horovod-build --editable '.[training]'
	training/install_horovod.sh $(VENV)
	@touch $@

$(VENV)/loadtest.stamp: $(VENV)/serve.stamp $(VENV)/loadtest.inputs
	$(PIP) --editable '.[loadtest]'
	tests/install_servers.sh
	@touch $@

$(VENV)/test.stamp: $(VENV)/train.stamp $(VENV)/test.inputs
	$(PIP) --group dev --editable '.[batch,loadtest,tensorboard,tensorrt,tracing]'
	tests/install_browser.sh
	tests/install_servers.sh
	tests/install_compose.sh $(VENV)
	tests/install_tensorrt_types.sh $(VENV)
	npm ci --prefix tests/javascript --silent --no-audit --no-fund
	@touch $@

$(PEERS)/peers.stamp: $(VENV)/serve.stamp loadtest/peers/requirements.txt
	$(PIP) --editable '.[loadtest]'
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --requirement loadtest/peers/requirements.txt
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt \
		nvidia-pytriton
	@touch $@
