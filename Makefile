PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help demo test gpu-test up down lint proto manifests clean setup tools all-tools

help: ## Show this help
	@echo "moe-operator: serves Mixture-of-Experts language models on Kubernetes"
	@echo
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

demo: setup ## Start a Kubernetes here, serve the example, stream text, show its trace (KEEP=1 keeps it)
	$(BIN)/python -m examples.demo

test: setup-all ## Run all tests (ARGS="-k name" for some)
	$(BIN)/python -m pytest $(ARGS)

up: setup ## Start the local cluster and leave it running
	$(BIN)/python -m localcluster up

down: ## Stop the local cluster; leaves no process, mount or interface behind
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m localcluster down; else echo "nothing was ever started"; fi

lint: $(VENV)/.ready ## Check types, style, import contracts and generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH=$(BIN):$$PATH $(BIN)/lint-imports

proto: $(VENV)/.ready ## Generate the Python code of the .proto files
	PYTHON=$(abspath $(BIN)/python) protos/generate.sh

manifests: setup-all ## Generate the CRD and the plain manifest
	$(BIN)/python -m moe_operator.resources.crd > crds/moedeployments.yaml
	HELM=$$($(PYTHON) -m localcluster.build helm | cut -d' ' -f2) && HELM=$$HELM charts/render.sh > charts/install.yaml

clean: down ## Stop the cluster and delete everything generated here (not the cache of built tools)
	rm -rf $(VENV) .local .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache dist

# The Python environment and the compiled tools are made side by side: one waits for the network, one for
# the compiler.
setup:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.ready tools

setup-all:
	@$(MAKE) --no-print-directory -j2 $(VENV)/.ready all-tools

tools:
	@$(PYTHON) -m localcluster.build etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl cri-descriptor otelcol > /dev/null

all-tools:
	@$(PYTHON) -m localcluster.build > /dev/null

$(VENV)/.ready: pyproject.toml
	@echo "Python environment: installing into $(VENV) (5.5 GB, mostly torch; some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@
	@echo "Python environment: ready"
