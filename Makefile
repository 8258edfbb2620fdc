# Two commands: `make demo` sets everything up and runs the main job; `make test` sets everything up and passes
# the tests. Both make .venv once and reuse it until the dependencies change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

KERNELS := $(VENV)/.kernels

.PHONY: setup demo test test-slow test-long test-kernels check mlflow clean

setup: $(STAMP)

$(STAMP): pyproject.toml packaging/install.sh packaging/fbgemm-gpu-stub/pyproject.toml
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash packaging/install.sh
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python jobs/demo.py --config configs/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not long"

# What mostly waits, for nodes, time limits and downloads: half an hour, before a release.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

# The Triton kernels against their reference; without a GPU by Triton's interpreter (a download of 200 to 300 MB).
test-kernels: $(KERNELS)
	$(BIN)/python -m pytest tests/models/test_triton_attention.py

$(KERNELS): $(STAMP)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet -e ".[kernels]"
	@touch $(KERNELS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mlflow: $(STAMP)
	mkdir -p "$${ROO_RAY_HOME:-$$HOME/.roo_ray}"
	MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false MLFLOW_DISABLE_TELEMETRY=true \
	  $(BIN)/mlflow ui --host 127.0.0.1 --port $(or $(PORT),5000) --workers 1 \
	  --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$${ROO_RAY_HOME:-$$HOME/.roo_ray}/mlflow.db}"

clean:
	rm -rf $(VENV)
