# Every target prepares .venv first; when it is ready that takes a moment and needs no network.
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-oldest gpu-small test-slow lint types check lock
BIN := .venv/bin

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: ## install what is missing: system packages, .venv, pinned Python packages
	@PYTHON='$(PYTHON)' sh .ci/setup.sh

demo: setup ## train, evaluate and export a small robust net on the CPU
	$(BIN)/arat demo

# Two processes share out the quick ones by files; Ray's own processes fill the machine by themselves.
test: setup ## run all tests but the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile tests --ignore tests/integration --ignore tests/slow
	$(BIN)/python -m pytest tests/integration

# What depends on torch: the method, its engine, data and evaluation.
OLDEST := agreement attacks averaging balls checkpoint cuda_graph device_augment devices diagnostics engine evaluate \
    export fusion guard losses mixing optim picture_ops saving step system train world_size
test-oldest: setup ## the unit tests of the method with the oldest torch, without Ray, FFCV, MLflow and DeepSpeed
	@sh .ci/oldest.sh
	PYTHONPATH=. .venv-oldest/bin/python -m pytest -n 2 --dist loadfile tests/bench tests/data tests/evaluation \
	    tests/fake_cuda tests/models tests/objectives $(OLDEST:%=tests/test_%.py)
	PYTHONPATH=. .venv-oldest/bin/python benchmarks/gpu.py --device cpu --small --out $$(mktemp -d)

gpu-small: setup ## what benchmarks/gpu.py does on a GPU, in small on the CPU
	$(BIN)/python benchmarks/gpu.py --device cpu --small --out $$(mktemp -d)

# Two runs, since each has its own Ray; the lines of both come last.
test-slow: setup ## every failure done for real, one line each at the end; root, a quarter of an hour
	@log=$$(mktemp); status=0; \
	for folder in tests/integration tests/slow; do \
	    FAILURES_LOG=$$log $(BIN)/python -m pytest -m failure $$folder || status=1; \
	done; \
	echo; cat $$log; rm $$log; exit $$status

lint: setup ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without the variable pyright's wrapper asks the network for newer versions.
types: setup ## pyright
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

check: lint types test ## lint, types, test

lock: ## write the versions that .venv holds to constraints.txt
	{ sed '/^[^#]/,$$d' constraints.txt; $(BIN)/python -m pip freeze --all --exclude-editable; } > constraints.tmp
	mv constraints.tmp constraints.txt
