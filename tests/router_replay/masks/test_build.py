"""What the build does where nvcc is missing, or of another CUDA: it says so, and goes on unless CUDA was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def setup(cuda_home: Path, kernels: str) -> subprocess.CompletedProcess:
    """Runs setup.py as far as the choice of what to build, with a PATH that has no nvcc."""
    environment = {key: value for key, value in os.environ.items() if key not in ("CUDA_PATH", "TORCH_CUDA_ARCH_LIST")}
    environment |= {"PATH": "/nonexistent", "CUDA_HOME": str(cuda_home), "ROUTING_MASKS_KERNELS": kernels}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(params=["no nvcc", "nvcc of another CUDA"])
def cuda_home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "nvcc of another CUDA":
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 9.2, V9.2.148'\n")
        nvcc.chmod(0o755)
    return tmp_path


def test_the_build_goes_on_for_the_cpu_and_says_why(cuda_home: Path) -> None:
    done = setup(cuda_home, "auto")
    assert done.returncode == 0, done.stderr
    assert "rollout-routing-replay" in done.stdout
    why = "there is no nvcc in" if not (cuda_home / "bin").exists() else "nvcc is of CUDA 9, and torch"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    assert f"building the kernels for the CPU only, because {why}" in done.stderr


def test_a_build_that_was_asked_for_cuda_stops(cuda_home: Path) -> None:
    done = setup(cuda_home, "cuda")
    assert done.returncode != 0
    assert "ROUTING_MASKS_KERNELS=cuda, but" in done.stderr


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    done = setup(tmp_path, "gpu")
    assert done.returncode != 0
    assert "ROUTING_MASKS_KERNELS is 'gpu': use cuda, cpu or none" in done.stderr
