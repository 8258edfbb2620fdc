# Two commands: `make demo` sets everything up and runs the main job; `make test` sets everything up and passes
# the tests. Both make .venv once and reuse it until the dependencies change.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow check mlflow clean

setup: $(STAMP)

$(STAMP): pyproject.toml packaging/install.sh packaging/fbgemm-gpu-stub/pyproject.toml
	PYTHON="$(PYTHON)" VENV="$(VENV)" bash packaging/install.sh
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python jobs/demo.py --config configs/demo.yaml

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

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
