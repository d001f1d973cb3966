"""Servers that know how to build the examples' small model."""

from __future__ import annotations

import functools

from cpu_engines.sglang import server
from examples.qwen3_moe import SGLANG_MODELS

serve = functools.partial(server.serve, model_package=SGLANG_MODELS)
"""`cpu_engines.sglang.server.serve` with the package that builds the small model's dense layer."""

cpu_environment = functools.partial(server.cpu_environment, model_package=SGLANG_MODELS)
"""The same for a process that starts an engine by itself."""
