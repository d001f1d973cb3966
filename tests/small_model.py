"""The examples' small model as tests use it: its checkpoint, and servers that know how to build it."""

from __future__ import annotations

import functools
from pathlib import Path

from cpu_engines.sglang import server
from examples.qwen3_moe import SGLANG_MODELS

SMALL_MODEL = Path(__file__).parents[1] / "examples" / "small_model" / "checkpoint"

serve = functools.partial(server.serve, model_package=SGLANG_MODELS)
"""`cpu_engines.sglang.server.serve` with the package that builds the small model's dense layer."""

cpu_environment = functools.partial(server.cpu_environment, model_package=SGLANG_MODELS)
"""The same for a process that starts an engine by itself."""
