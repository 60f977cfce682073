# From a fresh clone, with Python 3.10 to 3.13, make and a network to a package registry: `make demo`, `make test`.
PYTHON ?= python3
GPU_PYTHON ?= python3
VENV := .venv
VENV_NEWEST := .venv-0.5.23
PYTEST_ARGS ?=
# More arguments of requirements/install.py, as --pip.
SETUP_ARGS ?=
# Two cores do not have time for everything twice: what does not depend on the SGLang release runs on the primary one,
# and of the servers that differ in layout, page size, stages or patches each release has a part.
ON_PRIMARY := -k "not (mla-page1 or pipeline or (dsa-chunked and not patched))" \
	$(patsubst %,--ignore=tests/engine/test_%.py,disaggregation disaggregation_drafts)
# Of two servers, what waits for timeouts and a second model are `make test-pairs`, and so is a full host cache, and a
# cache that is split, of a model without an indexer.
ON_NEWEST := -k "not (whole or page64-chunked or mla-pipeline or (dsa-chunked and patched) or preshuffled or layouts_that_differ or \
		(test_disaggregation and (mla or retracts or killed or dsa-1-1-2)) or full_host_cache or \
		(test_dcp_servers and mla))" \
	$(patsubst %,--ignore=tests/engine/test_%.py,ladder accuracy demo gpu_probe)

.PHONY: help setup setup-test setup-primary setup-newest demo serve doctor check test test-ops test-unit test-engine test-engine-newest test-pairs test-patched test-releases test-tritons test-gpu test-memcheck clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## create .venv: SGLang 0.5.17 for CPU and this package
	@$(PYTHON) requirements/install.py $(VENV) 0.5.17 $(SETUP_ARGS)

setup-test:  ## create .venv and .venv-0.5.23 with what the tests need
	@MAKEFLAGS= $(MAKE) --no-print-directory -j2 setup-primary setup-newest

setup-primary:
	@$(PYTHON) requirements/install.py $(VENV) 0.5.17 --dev --lines $(SETUP_ARGS)

setup-newest:
	@$(PYTHON) requirements/install.py $(VENV_NEWEST) 0.5.23 --dev --lines $(SETUP_ARGS)

demo: setup  ## serve the tiny DSA model, ask it questions, check the answers, shut down
	@$(VENV)/bin/nsa-plugin demo

serve: setup  ## as demo, and leave the server up until Ctrl-C
	@$(VENV)/bin/nsa-plugin demo --serve

doctor: setup  ## report versions, device, kernels, settings and hooks
	@$(VENV)/bin/nsa-plugin doctor

check: setup-test  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# One thread each: threads that spin at barriers crawl on a busy machine.
test: setup-test  ## everything that needs no GPU: checks, unit tests, engine tests on both SGLang releases
	@OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j4 --output-sync=target \
		check test-engine test-engine-newest test-ops test-unit

test-ops: setup-test
	$(VENV)/bin/python -m pytest -q -m "not gpu" tests/ops $(PYTEST_ARGS)

test-unit: setup-test
	$(VENV)/bin/python -m pytest -q -m "not gpu" --ignore=tests/engine --ignore=tests/ops $(PYTEST_ARGS)

test-engine: setup-test
	$(VENV)/bin/python -m pytest -q -m "not gpu" tests/engine $(ON_PRIMARY) $(PYTEST_ARGS)

test-engine-newest: setup-test
	$(VENV_NEWEST)/bin/python -m pytest -q -m "not gpu" tests/engine $(ON_NEWEST) $(PYTEST_ARGS)

test-pairs: setup-test  ## prefill and decode in two servers, hierarchical and split caches, on both releases
	@set -e; for venv in $(VENV) $(VENV_NEWEST); do \
		OMP_NUM_THREADS=1 $$venv/bin/python -m pytest -q tests/engine/test_disaggregation*.py \
			tests/engine/test_hicache_drafts.py tests/engine/test_dcp_servers.py $(PYTEST_ARGS); \
	done

test-patched: setup-test  ## all parity and refusal tests on both releases with patches/ in place of the hooks
	rm -rf .build/patched
	@set -e; for venv in $(VENV) $(VENV_NEWEST); do \
		$$venv/bin/python -m tests.sglang_copies $(CURDIR)/.build/patched/$$venv; \
		PYTHONPATH=$(CURDIR)/.build/patched/$$venv $$venv/bin/python -m pytest -q \
			-m "not gpu" -k "not patched" tests/engine/test_parity.py tests/engine/test_refusals.py $(PYTEST_ARGS); \
	done

test-releases: setup-test  ## the wiring on every supported release, or on RELEASES="0.5.20 ..."; writes docs/releases.json
	$(VENV)/bin/python -m tools.try_releases $(RELEASES)

test-tritons: setup-test  ## every kernel compiles with the Tritons of newer releases too; writes docs/tritons.json
	$(VENV)/bin/python -m tools.try_tritons

test-gpu:  ## every kernel on a CUDA or ROCm device, then the engine, with the host's own Python (GPU_PYTHON=...)
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -q tests/ops $(PYTEST_ARGS)
	PYTHONPATH=src $(GPU_PYTHON) -m pytest -q -m gpu tests/benchmarks tests/engine tests/runtime $(PYTEST_ARGS)

# Every tensor its own allocation, with its own bounds.
MEMCHECK = PYTHONPATH=src PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 $(GPU_PYTHON) -m

test-memcheck:  ## no kernel touches what is not its own, whatever the strides and alignment of its arguments; CUDA only
	$(MEMCHECK) tests.ops.sanitize
	$(MEMCHECK) pytest -q tests/ops/test_every_argument.py

clean:  ## remove the virtual environments and caches
	rm -rf $(VENV) $(VENV_NEWEST) .demo .build .pytest_cache .ruff_cache .mypy_cache
