# Everything runs in .venv, which `make` builds from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Processes that share the tests: one more than cores, for one of them often waits for a server.
WORKERS ?= 3

.PHONY: quickstart server server-stop deploy test lint unit programs site whole campaigns quickstart-bars docs gpu clean

quickstart: $(STAMP)  ## train everything on the generated world, and show what came out
	$(BIN)/rlhf run configs/quickstart.yaml

server: $(STAMP)  ## start Prefect's server on a Postgres of its own, in the background; both are installed if need be
	@$(BIN)/rlhf server start --install

server-stop: $(STAMP)
	@$(BIN)/rlhf server stop

deploy: $(STAMP)  ## make the server of PREFECT_API_URL equal to deployments/; DRY=1 shows the differences, WAIT=60
	@$(BIN)/python -m tasks.deployments $(if $(DRY),--dry) $(if $(WAIT),--wait $(WAIT))
	$(BIN)/rlhf preflight

test: $(STAMP)  ## before each commit: lint, and the tests of single functions with a sample of the others
	+$(MAKE) --no-print-directory --jobs=2 lint unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# Exported, not written before the command: without a shell in between, make's SIGTERM reaches pytest.
unit programs site whole campaigns: export OMP_NUM_THREADS = 1
# Two threads of a training wait for each other beside another test.
unit programs site whole campaigns: export RLHF_THREADS = 1
TESTS := $(BIN)/pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder
unit: $(STAMP)
	$(TESTS) -m "not slow and not program and not site and not campaign"

programs: $(STAMP)  ## whole programs and flows, and training again and again: half an hour
	$(TESTS) -m "program and not slow and not campaign"

site: $(STAMP)  ## tests of a whole site: Prefect's server on Postgres, S3, workers
	$(TESTS) -m "site and not slow and not campaign"

# Together, for a site keeps one worker waiting while the programs fill the others.
whole: $(STAMP)  ## programs and site together
	$(TESTS) -m "(program or site) and not slow and not campaign"

campaigns: export RLHF_CAMPAIGN = 1
campaigns: $(STAMP)  ## all cases and examples of which the tests take a sample
	$(TESTS) -m "(campaign or hypothesis) and not slow"

# Alone and with all threads: torch's suffer badly from company on 2 cores.
quickstart-bars: export RLHF_CHECK_SHAPES = 0
quickstart-bars: $(STAMP)  ## train the whole quickstart on a real S3 server; it must reach its quality bars
	$(BIN)/pytest -m slow

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(STAMP)  ## generate the reference, and the documentation as a site in site/
	$(BIN)/python -m docs.generate_reference
	for page in ppo migrating mistakes; do $(BIN)/python -m docs.generate_$$page > docs/$$page.md; done
	$(BIN)/python -m mkdocs build

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
