.DEFAULT_GOAL := help
.PHONY: help setup demo test contract kernels wheel lock

help:  ## Show the targets.
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

setup:  ## Make .venv with the locked dependencies; does nothing where it is up to date.
	@bash scripts/setup.sh

demo: setup  ## A conversation of several turns: captured by SGLang, replayed by Megatron-Core.
	.venv/bin/python -m examples.multi_turn_replay

test: setup  ## Lint, types and all tests.
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	@bash scripts/browser.sh
	.venv/bin/pytest

contract: setup  ## Hold the ledgers against other releases of SGLang and Megatron-Core (downloads their wheels).
	.venv/bin/python -m scripts.contract

kernels: setup  ## Compile the CUDA kernels anew; print their registers and spills.
	@mkdir -p build
	ROUTING_MASKS_KERNELS=cuda .venv/bin/python setup.py build_ext --force --build-lib build/kernels \
		--build-temp build/kernels >build/kernels.log 2>&1 || { cat build/kernels.log; exit 1; }
	@.venv/bin/python scripts/kernel_resources.py <build/kernels.log

wheel: setup  ## Build a wheel into dist/; test it with other releases of torch by scripts/test_wheel.sh.
	rm -rf build/lib* build/bdist* dist
	.venv/bin/python -c 'from setuptools.build_meta import build_wheel; print(build_wheel("dist"))' | tail -1

lock: setup  ## Write requirements.lock anew from pyproject.toml and constraints/.
	bash scripts/lock.sh
