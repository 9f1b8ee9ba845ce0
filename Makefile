# The two commands of the README are `make demo` and `make test`; both set up what they need.
PYTHON ?= python3.11
BIN := .venv/bin
export PYTHONWARNINGS ?=
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := 1
export ORT_DISABLE_TELEMETRY := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test check bench trials dashboard clean help

help:
	@echo "make demo       record an incident, replay it bit for bit, name the pin that differs"
	@echo "make test       the whole test suite"
	@echo "make check      style, types, floors, and the tests of our names"
	@echo "make bench      paired benchmarks, and this engine beside others, as ratios"
	@echo "make trials     the long crash and replay trials"
	@echo "make dashboard  the trace-analysis pages over ./ledger (LEDGER=folder for another)"

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv (once)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: .venv/ready
	@$(BIN)/replaylab demo

test: .venv/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/architecture

bench: .venv/ready
	$(BIN)/python -m pytest -q tests/bench -m "" --benchmark-enable -s
	$(BIN)/python -m tests.bench.peers --json .cache/bench/peers.json
	$(BIN)/python -m tests.bench.peers --size medium --only onnxruntime --only transformers --only llama \
		--json .cache/bench/peers-medium.json

trials: .venv/ready
	$(BIN)/python -m pytest -q -m slow --timeout 7200

LEDGER ?= ledger
dashboard: .venv/ready
	$(BIN)/replaylab dashboard --ledger $(LEDGER)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
