# Everything runs in .venv, which `make` builds from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests: one more than cores, for one of them often waits for a server.
WORKERS ?= 3

.PHONY: quickstart server server-stop deploy pools test lint unit quickstart-bars gpu clean

quickstart: $(STAMP)  ## train everything on the generated world, and show what came out
	$(BIN)/rlhf run configs/quickstart.yaml

server: $(STAMP)  ## start Prefect's server on a Postgres of its own, in the background; both are installed if need be
	@$(BIN)/rlhf server start --install

server-stop: $(STAMP)
	@$(BIN)/rlhf server stop

deploy: pools  ## register flows, schedules and automations with the server of PREFECT_API_URL
	$(BIN)/prefect --no-prompt deploy --all --prefect-file deployments/prefect.yaml
	$(BIN)/prefect automation inspect rlhf-zombies >/dev/null 2>&1 || \
	  $(BIN)/prefect automation create --from-file deployments/automations/zombies.yaml
	$(BIN)/rlhf preflight

pools: $(STAMP)
	@$(BIN)/prefect config view | grep -q PREFECT_API_URL || \
	  { echo "no Prefect server: start one, and export PREFECT_API_URL" >&2; exit 2; }
	existing=$$($(BIN)/prefect work-pool ls --output json) || exit; for pool in cpu reward gpu; do \
	  case "$$existing" in *"\"name\": \"$$pool\""*) ;; \
	  *) $(BIN)/prefect work-pool create $$pool --type process ;; esac; done

test: $(STAMP)  ## lint, and all tests but the quickstart's quality bars
	+$(MAKE) --no-print-directory --jobs=2 lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# Exported, not written before the command: without a shell in between, make's SIGTERM reaches pytest.
unit: export OMP_NUM_THREADS = 1
# Two threads of a training wait for each other beside another test.
unit: export RLHF_THREADS = 1
unit: $(STAMP)
	$(BIN)/pytest -m "not slow" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --cov

# Alone and with all threads: torch's suffer badly from company on 2 cores.
quickstart-bars: export RLHF_CHECK_SHAPES = 0
quickstart-bars: $(STAMP)  ## train the whole quickstart on a real S3 server; it must reach its quality bars
	$(BIN)/pytest -m slow

gpu: $(STAMP)  ## fill .gpu with what benchmarks/gpu.sh needs on a GPU machine
	bash benchmarks/gpu_wheels.sh
	$(BIN)/python -m benchmarks.gpu.pack

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .rlhf
