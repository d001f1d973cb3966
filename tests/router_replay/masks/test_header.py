"""The header that the CUDA kernels call, driven on the CPU the way they call it, under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from router_replay.masks.limits import MAX_EXPERTS, MAX_RANK_BITS, MAX_TOP_K

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(1200)
def test_header_under_sanitizers(tmp_path: Path) -> None:
    program = tmp_path / "header_driver"
    compile_command = [
        "g++", "-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wno-psabi",
        f"-DROUTING_MASKS_MAX_EXPERTS={MAX_EXPERTS}", f"-DROUTING_MASKS_MAX_TOP_K={MAX_TOP_K}",
        f"-DROUTING_MASKS_MAX_RANK_BITS={MAX_RANK_BITS}", f"-I{ROOT / 'csrc'}",
        str(Path(__file__).with_name("header_driver.cpp")), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(compile_command, check=True)
    run = subprocess.run([program], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "all well\n"), run.stdout + run.stderr[-4000:]
