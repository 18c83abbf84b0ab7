# Every verb a person needs; each sets the machine up first, once.
PYTHON ?= python3
VENV ?= .venv
# Processes that the tests run in.
WORKERS ?= 2
bin := $(VENV)/bin
ready := $(VENV)/.ready
export PYTHON VENV
# One thread per process: the tests start several, and threads that wait for each other on 2 cores are slow.
test test-long check same-loss: export OMP_NUM_THREADS = 1
waits := ray or ffcv or ranks or slow or chaos

.PHONY: help setup pretrain test test-long check lint types bench same-loss wheel data clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(ready)  ## install everything into .venv (FORCE=1: again)
$(ready): pyproject.toml constraints.txt cluster/setup_machine.sh $(if $(FORCE),force)
	@bash cluster/setup_machine.sh
	@touch $@
.PHONY: force
force:

pretrain: $(ready)  ## the main job: PCL on scikit-learn's digits with 2 Ray Train workers
	@$(bin)/python -m raycon.pretrain quickstart $(ARGS)

# These start clusters and kill processes, several at a time on as few as two cores. What fails beside another is run once
# more by itself, with both results printed: a wrong program fails twice, a machine that was too busy does not.
test: check  ## all tests: `check`, then those that need Ray, FFCV or more time
	@$(bin)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "($(waits)) and not long" $(ARGS) || { \
	  echo "make test: what failed is run once more, alone"; \
	  $(bin)/python -m pytest -q --last-failed --last-failed-no-failures none -m "($(waits)) and not long"; }

test-long: $(ready)  ## tests that take minutes each: a job from submission to resume, nodes that leave, elastic groups
	@$(bin)/python -m pytest -q -m long $(ARGS)

check: lint types  ## ruff, mypy and the quick tests, in two minutes
	@$(bin)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not ($(waits) or long)" $(ARGS)

lint: $(ready)  ## ruff
	@$(bin)/ruff check . && $(bin)/ruff format --check .

types: $(ready)  ## mypy
	@$(bin)/mypy

bench: $(ready)  ## every benchmark this machine can run, and docs/performance.md (ARGS="--quick": the short forms)
	@$(bin)/python -m benchmarks $(ARGS)

same-loss: $(ready)  ## the identical-loss rule: recorded losses of the reference run, bit for bit
	@$(bin)/python -m pytest -q tests/golden/test_same_loss.py

wheel: $(ready)  ## build dist/*.whl
	@$(bin)/python -m build --wheel

data: $(ready)  ## Fashion-MNIST from Debian's package
	@test -d /usr/share/datasets/fashion-mnist || apt-get install -y dataset-fashion-mnist

clean:  ## remove what was built (not .venv, not runs)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
