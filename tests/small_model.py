"""Servers that know how to build the examples' small model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpu_engines.sglang import server
from examples.qwen3_moe import SGLANG_MODELS

# So little conservatism admits more requests than the pool can hold to their end: some are retracted.
CAPTURE_FLAGS = (
    "--enable-router-capture", "--chunked-prefill-size=64", "--max-total-tokens=2048",
    "--schedule-conservativeness=0.1", "--enable-metrics",
)  # fmt: skip
"""Of `capture_server`."""


def serve(
    model_path: str | os.PathLike[str], *flags: str, environment: Mapping[str, str] | None = None, **others: Any
) -> contextlib.AbstractContextManager[server.Server]:
    """`cpu_engines.sglang.server.serve` with the package that builds the small model's dense layer, and no other."""
    environment = {**_no_other_models(), **(environment or {})}
    return server.serve(model_path, *flags, environment=environment, model_package=SGLANG_MODELS, **others)


def cpu_environment(added: Mapping[str, str] | None = None) -> dict[str, str]:
    """The same for a process that starts an engine by itself."""
    return server.cpu_environment({**_no_other_models(), **(added or {})}, model_package=SGLANG_MODELS)


def _no_other_models() -> dict[str, str]:
    """SGLang imports its models' files, every one of them, in each scheduler: three seconds of a server's start."""
    names = _files(_folder("sglang") / "srt" / "models") - _files(_folder(SGLANG_MODELS))
    return {"SGLANG_DISABLED_MODEL_ARCHS": ",".join(sorted(names))}


def _files(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.py")}


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent
