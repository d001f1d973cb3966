.DEFAULT_GOAL := help
# The tests that start SGLang's servers.
SERVER_TESTS := tests/sglang_router_capture tests/cpu_engines/sglang tests/end_to_end tests/soak
# Those for which Megatron-Core, models of transformers, Ray, a browser or a long compilation is needed, or that train
# or measure; every other folder of tests/ is quick.
SLOW_TESTS := tests/megatron_router_replay tests/hf_router_replay tests/cpu_engines/megatron tests/contract \
	tests/docs/test_tables.py tests/router_replay/report/test_report_in_browser.py tests/router_replay/masks/stores \
	tests/router_replay/masks/test_header.py tests/benchmarks tests/examples/grpo tests/examples/small_model \
	tests/router_replay_adapters
# Those in verl's own functions, which import more than `requirements.lock` has: scripts/verl.sh runs them beside it.
VERL_TESTS := tests/router_replay_adapters/verl tests/end_to_end/test_verl.py
# Servers of several processes on two cores: each of them takes minutes to start.
RANKS_TESTS := tests/sglang_router_capture/test_parallel.py
# Those of SERVER_TESTS that begin when one of the other two is done, so that two cores have enough to do until the end.
LATE_TESTS := tests/sglang_router_capture/test_launchers.py tests/sglang_router_capture/test_sglang_format.py \
	tests/sglang_router_capture/test_start.py
QUICK_PYTEST := OMP_NUM_THREADS=1 .venv/bin/pytest -q -p no:cacheprovider

.PHONY: help setup demo train quick quick-checks quick-masks quick-others test test-servers test-slow test-verl test-late ranks contract megatron-0.17 sglang-0.5.20 verl stock soak kernels wheel lock

help:  ## Show the targets.
	@sed -nE 's/^([a-z0-9.-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

setup:  ## Make .venv with the locked dependencies; does nothing where it is up to date.
	@bash scripts/setup.sh

demo: setup  ## A conversation of several turns: captured by SGLang, replayed by Megatron-Core.
	.venv/bin/python -m examples.multi_turn_replay

train: setup  ## Ten steps of reinforcement learning on both engines, in a new folder; some minutes on a CPU.
	rm -rf build/train
	OMP_NUM_THREADS=1 .venv/bin/python -m examples.grpo --steps 10 --evaluate-every 5 --out build/train

quick: setup  ## Lint, types and the tests of those folders that need neither engine nor browser.
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target quick-others quick-masks quick-checks

quick-checks:
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

quick-masks:
	$(QUICK_PYTEST) $(addprefix --ignore=,$(SLOW_TESTS)) tests/router_replay/masks

quick-others:
	$(QUICK_PYTEST) $(addprefix --ignore=,$(SERVER_TESTS) $(SLOW_TESTS) tests/router_replay/masks) tests

test: quick  ## Lint, types and tests: those of `quick`, then those with an engine or a browser; not those of `ranks`.
	@bash scripts/browser.sh
	@$(MAKE) --no-print-directory --jobs=2 --keep-going test-servers test-slow test-verl test-late

# One thread each: two that spin on two cores starve each other, and much of a server's start is one process's imports.
test-servers:
	OMP_NUM_THREADS=1 .venv/bin/pytest --durations=25 $(addprefix --ignore=,$(RANKS_TESTS) $(LATE_TESTS) $(VERL_TESTS)) \
		$(filter-out $(LATE_TESTS),$(SERVER_TESTS))

test-slow:
	OMP_NUM_THREADS=1 .venv/bin/pytest --durations=25 $(addprefix --ignore=,$(VERL_TESTS)) $(SLOW_TESTS)

test-late:
	OMP_NUM_THREADS=1 .venv/bin/pytest --durations=25 $(LATE_TESTS)

test-verl:
	bash scripts/verl.sh --durations=25 $(VERL_TESTS)

ranks: setup  ## SGLang's server with two ranks: tensor, data and pipeline parallelism, attention data parallelism.
	OMP_NUM_THREADS=1 .venv/bin/pytest $(RANKS_TESTS)

contract: setup  ## Hold the ledgers against other releases of engines and stacks (downloads their wheels).
	.venv/bin/python scripts/contract.py

megatron-0.17: setup  ## The trainer's tests with Megatron-Core 0.17.1, in an environment of its own.
	bash scripts/other_megatron.sh 0.17.1

sglang-0.5.20: setup  ## The engine's tests with SGLang 0.5.20, in an environment of its own (some 10 GB).
	bash scripts/other_sglang.sh 0.5.20

verl: setup  ## The adapter to verl in verl's own functions, beside what these import (downloads some packages).
	@$(MAKE) --no-print-directory test-verl

stock: setup  ## Megatron's own RouterReplay beside this package's replay, in the same steps; writes docs/stock-replay.md.
	.venv/bin/python -W ignore scripts/stock_replay.py --write

# SGLang's own has wrong rows, for which its soak fails; the table says how many.
soak: setup  ## Everything at once on a CPU server of SGLang, each row checked, beside SGLang's own capture; half an hour.
	@mkdir -p benchmarks/results
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.soak --json benchmarks/results/soak.json
	-OMP_NUM_THREADS=1 .venv/bin/python -m tests.soak --stock --json benchmarks/results/soak-stock.json >/dev/null
	.venv/bin/python -m tests.soak.table benchmarks/results/soak.json benchmarks/results/soak-stock.json \
		--out benchmarks/results/soak.md

kernels: setup  ## Compile the CUDA kernels anew; print their registers, instructions and spills.
	@mkdir -p build
	ROUTING_MASKS_KERNELS=cuda .venv/bin/python setup.py build_ext --force --build-lib build/kernels \
		--build-temp build/kernels >build/kernels.log 2>&1 || { cat build/kernels.log; exit 1; }
	@.venv/bin/python scripts/kernel_resources.py build/kernels <build/kernels.log

wheel: setup  ## Build a wheel into dist/; test it with other releases of torch by scripts/test_wheel.sh.
	rm -rf build/lib* build/bdist* dist
	.venv/bin/python -c 'from setuptools.build_meta import build_wheel; print(build_wheel("dist"))' | tail -1

lock: setup  ## Write requirements.lock and constraints/verl.lock anew from pyproject.toml and constraints/.
	bash scripts/lock.sh
