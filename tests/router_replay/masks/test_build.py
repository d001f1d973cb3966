"""What the build does without a C++ compiler, without nvcc, or with nvcc of another CUDA.

It says so and goes on, unless the kernels that need it were asked for.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
NOWHERE = Path("/nonexistent")


def setup(
    kernels: str, *command: str, path: str = "/nonexistent", cuda_home: Path = NOWHERE, cxx: Path | None = None
) -> subprocess.CompletedProcess:
    """Runs setup.py, by default as far as the choice of what to build, with a PATH that has no nvcc and no compiler."""
    set_by_hand = ("CC", "CXX", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST")
    environment = {key: value for key, value in os.environ.items() if key not in set_by_hand}
    environment |= {"PATH": path, "CUDA_HOME": str(cuda_home), "ROUTING_MASKS_KERNELS": kernels}
    if cxx is not None:
        environment["CXX"] = str(cxx)
    arguments = [sys.executable, "setup.py", *(command or ["--name"])]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    """A C++ compiler that tells its version and compiles nothing."""
    version = "case $1 in --version|-dump*) echo 'g++ (GCC) 13.3.0'; exit 0;; esac"
    return executable(tmp_path / "compilers" / "g++", f"{version}; echo 'no such luck' >&2; exit 1")


@pytest.fixture(params=["no nvcc", "nvcc of another CUDA"])
def cuda_home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "nvcc of another CUDA":
        executable(tmp_path / "bin" / "nvcc", "echo 'Cuda compilation tools, release 9.2, V9.2.148'")
    return tmp_path


def test_the_build_goes_on_for_the_cpu_and_says_why(cuda_home: Path, compiler: Path) -> None:
    done = setup("auto", cuda_home=cuda_home, cxx=compiler)
    assert done.returncode == 0, done.stderr
    assert "rollout-routing-replay" in done.stdout
    why = "there is no nvcc in" if not (cuda_home / "bin").exists() else "nvcc is of CUDA 9, and torch"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
    assert f"building the kernels for the CPU only, because {why}" in done.stderr


def test_a_build_that_was_asked_for_cuda_stops(cuda_home: Path, compiler: Path) -> None:
    done = setup("cuda", cuda_home=cuda_home, cxx=compiler)
    assert done.returncode != 0
    assert re.search(
        "ROUTING_MASKS_KERNELS=cuda, but (there is no nvcc in|nvcc is of CUDA 9|torch .* without CUDA)", done.stderr
    )


def test_an_unknown_choice_is_refused() -> None:
    done = setup("gpu")
    assert done.returncode != 0
    assert "ROUTING_MASKS_KERNELS is 'gpu': use cuda, cpu or none" in done.stderr


@pytest.mark.parametrize("cxx", [None, NOWHERE / "clang++"], ids=["an empty PATH", "CXX that is not there"])
def test_without_a_compiler_the_build_goes_on_in_plain_torch_and_says_why(tmp_path: Path, cxx: Path | None) -> None:
    path = "/nonexistent" if cxx is None else os.environ["PATH"]
    command = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = setup("auto", *command, path=path, cxx=cxx)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "rollout-routing-replay" in line]
    start = "rollout-routing-replay: building no kernels: plain torch packs, which takes many times longer, because "
    missing = r"there is no C\+\+ compiler \(\S+ is not there or not on the PATH; CXX may name another\)"
    assert re.fullmatch(re.escape(start) + missing, line)
    assert cxx is None or str(cxx) in line
    assert "Traceback" not in done.stderr
    assert list(tmp_path.rglob("*.so")) == []


@pytest.mark.parametrize("kernels", ["cpu", "cuda"])
def test_kernels_that_were_asked_for_need_a_compiler(kernels: str) -> None:
    done = setup(kernels)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].startswith(f"ROUTING_MASKS_KERNELS={kernels}, but there is no C++ compiler (")
    assert "Traceback" not in done.stderr


def test_without_a_compiler_plain_torch_can_be_asked_for() -> None:
    done = setup("none")
    assert done.returncode == 0, done.stderr
    assert "rollout-routing-replay:" not in done.stderr


def test_a_compiler_that_fails_fails_the_build(tmp_path: Path, compiler: Path) -> None:
    command = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = setup("auto", *command, path=os.environ["PATH"], cuda_home=tmp_path, cxx=compiler)
    assert done.returncode != 0
    assert "no such luck" in done.stderr
    assert "building no kernels" not in done.stderr
