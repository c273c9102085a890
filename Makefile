PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1
# Some machines set it. Without bytecode every process compiles torch and grpc again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test soak up down lint proto manifests lock dist bundle clean setup setup-all tools all-tools environment

help: ## Show this help
	@echo "moe-operator: serves Mixture-of-Experts language models on Kubernetes"
	@echo
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: setup ## Start a local Kubernetes, serve the example, stream text and show its trace (KEEP=1 keeps it, MESH=2x2: several workers per replica)
	$(BIN)/python -m examples.demo

# Four processes share the tests, which wait half of their time; two of the four run those in clusters, with a cluster
# each. The tests that only compute run next to them, at a lower priority: they use the cores that others leave idle.
# A file stays in one process, because its tests may build on each other. 5: no test was chosen.
PYTEST := $(BIN)/python -m pytest
SHORT := not soak and not slow
test: setup-all ## Run all tests except the long ones (ARGS="-k name" for some)
	@log=$$(mktemp); \
	nice -n 2 $(PYTEST) -m "computing and $(SHORT)" --timeout 900 $(ARGS) > $$log 2>&1 & computing=$$!; \
	$(PYTEST) -m "not computing and $(SHORT)" -n 4 --dist loadfile --no-loadscope-reorder $(ARGS); rest=$$?; \
	wait $$computing; computing=$$?; cat $$log; rm $$log; \
	for code in $$rest $$computing; do [ $$code = 0 ] || [ $$code = 5 ] || exit $$code; done

soak: setup-all ## Run the long tests: scalings, rollouts and faults under load, random manifests (1 to 2 hours)
	timeout 1800 $(BIN)/python -m pytest -m slow $(ARGS)
	timeout 7800 $(BIN)/python -m pytest -m soak -s tests/soak $(ARGS)
	timeout 1800 $(BIN)/python -m benchmarks.faults
	timeout 1800 $(BIN)/python -m benchmarks.dashboards
	MOE_FUZZ=10000 timeout 3600 $(BIN)/python -m pytest -s tests/operator/test_fuzz.py

up: setup ## Start the local cluster and leave it running
	$(BIN)/python -m localcluster up

down: ## Stop the local cluster; leaves no process, mount or interface behind
	@if [ -e $(VENV)/.ready ]; then $(BIN)/python -m localcluster down; else echo "nothing was ever started"; fi

lint: $(VENV)/.ready ## Check types, style, import contracts, words and commit subjects
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH=$(BIN):$$PATH $(BIN)/lint-imports
	$(BIN)/python .ci/language.py

proto: $(VENV)/.ready ## Generate the Python code of the .proto files
	PYTHON=$(abspath $(BIN)/python) protos/generate.sh

manifests: setup-all ## Generate the CRD and the plain manifest
	$(BIN)/python -m moe_operator.resources.crd > crds/moedeployments.yaml
	HELM=$$($(BIN)/python -m localcluster.build helm | cut -d' ' -f2) && HELM=$$HELM charts/render.sh > charts/install.yaml

# `make lock ARGS=--upgrade` takes newer versions, `ARGS="--upgrade-package grpcio"` one; without ARGS only what
# pyproject.toml asks for changes. What an image installs is a part of what was tested: --constraints.
COMPILE = $(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-emit-index-url \
	--no-emit-find-links --custom-compile-command "make lock" pyproject.toml
lock: $(VENV)/.ready ## Write the locked dependencies with hashes: requirements/*.txt (ARGS=--upgrade for newer ones)
	$(COMPILE) --extra dev $(ARGS) --output-file requirements/dev.txt
	for extra in dist operator "worker --extra fetch"; do $(COMPILE) --extra $$extra --upgrade --constraints requirements/dev.txt --output-file requirements/$${extra%% *}.txt || exit 1; done
	$(COMPILE) --extra operator --extra worker --extra fetch --resolution lowest-direct $(ARGS) --output-file requirements/lowest.txt

dist: $(VENV)/.ready ## Build the wheel, the sdist and an SBOM of each image (CycloneDX) into dist/
	rm -rf dist
	MOE_CPU_KERNELS=require $(BIN)/python -m build --no-isolation --outdir dist
	PATH=$(BIN):$$PATH requirements/sbom.sh dist

bundle: $(VENV)/.ready ## Write the bundle for the Operator Lifecycle Manager into dist/bundle
	rm -rf dist/bundle
	HELM=$$($(BIN)/python -m localcluster.build helm | cut -d' ' -f2) && HELM=$$HELM $(BIN)/python charts/bundle.py dist/bundle

clean: down ## Stop the cluster and delete everything generated here (not the cache of built tools)
	rm -rf $(VENV) .local .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist

# The Python environment and the compiled tools are made side by side: one waits for the network, one for
# the compiler.
setup:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.ready tools

setup-all:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.ready all-tools

tools: environment
	@$(BIN)/python -m localcluster.build etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl cri-descriptor otelcol > /dev/null

all-tools: environment
	@$(BIN)/python -m localcluster.build > /dev/null

# The tools are built with this environment's Python too: it has the pip that brings a Go compiler, which the
# system's Python often lacks. Made again when it was interrupted: pip is the last thing that venv installs.
environment:
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is Python %d.%d; 3.11 or newer is needed: make PYTHON=python3.12 ..." % sys.version_info[:2])' && \
		$(PYTHON) -m venv $(VENV); }

$(VENV)/.ready: pyproject.toml hatch_build.py requirements/dist.txt requirements/dev.txt $(wildcard worker/moe_worker/kernels/cpu/native/*) | environment
	@echo "Python environment: installing into $(VENV) (5.5 GB, mostly torch; some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements/dist.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes --requirement requirements/dev.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@# What pods import is compiled here: they cannot write, and would compile it at each start, for seconds.
	@$(BIN)/python -c "import moe_operator.main, moe_operator.autoscaling.model.forecast.forecaster, moe_frontend.main, moe_worker.engine.loading, moe_worker.service.command"
	@touch $@
	@echo "Python environment: ready"
