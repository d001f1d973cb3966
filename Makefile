.DEFAULT_GOAL := help
.PHONY: help setup demo test lock

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
	.venv/bin/pytest

lock: setup  ## Write requirements.lock anew from pyproject.toml and constraints/.
	bash scripts/lock.sh
