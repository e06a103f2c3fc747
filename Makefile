# Each target is one line into a tool; the logic is in tools/.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN = .venv/bin
# Processes that share the test files; 0 runs all tests in one.
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile --durations=25
SERVER_TESTS = tests/bundle tests/conformance tests/engine tests/index tests/rpc tests/unit
# Tests start some 200 processes; each would compile its modules again.
test test-all test-client test-server test-matrix: export PYTHONDONTWRITEBYTECODE =

.PHONY: help venv client-venv server-venv optimum-venv demo demo-keep test test-client test-server test-matrix test-all coverage bench lint protos protos-check

help:  ## Say what there is
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  ##' Makefile | sed 's/:.*##/\t/' | expand -t 16

venv:  ## Make .venv, or bring it up to date
	@$(PYTHON) tools/make_venv.py

client-venv:  ## Make .venv-client, or bring it up to date
	@$(PYTHON) tools/make_venv.py client

optimum-venv:  ## Make .venv-optimum, for the slow tests with optimum-onnx, or bring it up to date
	@$(PYTHON) tools/make_venv.py optimum

server-venv:  ## Make .venv-server, or bring it up to date
	@$(PYTHON) tools/make_venv.py server

demo: venv  ## The main job on real input: export, serve, index, search, fine-tune, classify
	@$(BIN)/python -m examples.stdlib_demo

demo-keep: venv  ## The same, and the server stays up at localhost:50051 until Ctrl-C
	@$(BIN)/python -m examples.stdlib_demo --keep

test: venv  ## The fast tests
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

test-client: client-venv  ## The tests of client and command line; under a minute, and without the server's packages
	.venv-client/bin/python -m pytest tests/client tests/cli -m "not slow and not server and not export" $(PARALLEL)

test-server: server-venv  ## The tests of server and bundles, without PyTorch
	.venv-server/bin/python -m pytest $(SERVER_TESTS) -m "not slow and not export" $(PARALLEL)

test-matrix:  ## The same with the oldest and the newest dependencies, as a wheel, with every Python here
	@$(PYTHON) tools/make_venv.py matrix
	.venv-matrix/bin/nox --non-interactive --reuse-existing-virtualenvs $(ARGS)

test-all: venv optimum-venv  ## All tests, those that take minutes too
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile=thorough

coverage: venv  ## The fast tests, with the coverage of server and client
	$(BIN)/python tools/coverage.py

bench: venv  ## The short form of the server's benchmarks; rewrites docs/benchmarks.md
	@$(BIN)/python -m benchmarks.server.bench

lint: venv  ## Style, types and import arrows
	$(BIN)/python tools/lint.py

protos:  ## Regenerate protos/emberpc/v1/*_pb2*
	$(PYTHON) tools/generate_protos.py

protos-check: venv  ## Is the generated code current, and are the protos in style and compatible?
	$(BIN)/python tools/check_protos.py
