"""What ran a job, with which versions, and how its figures are written down."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from router_replay.files import write_whole

PACKAGES = ("rollout-routing-replay", "sglang", "megatron-core", "torch", "transformers", "numpy", "safetensors")


def hardware() -> dict[str, Any]:
    """CPU model, cores that this process may use, and the first CUDA device's name."""
    names = [line for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0].partition(":")[2].strip() if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Of Python and of those of `PACKAGES` that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report; a reader never sees half of it."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(report, indent=2) + "\n"))


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
