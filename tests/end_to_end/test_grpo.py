"""`python -m examples.grpo`, as a user runs it, on a real server: killed in the middle of a step, and started again."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cpu_engines.megatron import CpuDevice, single_process
from cpu_engines.megatron.qwen3_moe import hf_tensors, load_qwen3_moe
from cpu_engines.sglang.server import Server
from examples.grpo.loop import Updates
from examples.grpo.rollouts import read_rollouts
from examples.grpo.settings import Settings
from examples.grpo.state import RunFolder
from megatron_router_replay import attach
from router_replay.run import find_files, read_run
from tests.house.repository import ROOT
from tests.small_model import cpu_environment

pytestmark = pytest.mark.timeout(900)

SETTINGS = Settings(problems=2, group_size=4, minibatches=2, microbatch=4, evaluate_every=2, evaluation_problems=4)
OPTIONS = (
    "--problems=2", "--group-size=4", "--minibatches=2", "--microbatch=4", "--evaluate-every=2",
    "--evaluation-problems=4", "--concurrency=8",
)  # fmt: skip


def _start(server: Server, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "examples.grpo", f"--server={server.url}", f"--out={folder}"]
    return subprocess.Popen(
        [*command, *OPTIONS, *more], cwd=ROOT, env=cpu_environment({"OMP_NUM_THREADS": "1"}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def _optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)


def test_a_killed_run_goes_on_to_the_same_weights(trained_server: Server, small_model: Path, tmp_path: Path) -> None:
    run, kept = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "kept")
    first = _start(trained_server, run.path, "--steps=2")
    deadline = time.monotonic() + 600
    # Its conversations are there, and the trainer has them.
    while not run.rollouts(2).exists():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    shutil.copytree(run.path, kept.path)
    assert [line["step"] for line in run.figures()] == [0, 1]

    again = _start(trained_server, run.path, "--steps=2")
    output, _ = again.communicate(timeout=600)
    assert again.returncode == 0, output
    lines = run.figures()
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 2]
    steps = list(read_run(find_files([run.steps])))
    assert [step.step for step in steps] == [0, 1, 2]
    assert [step.dynamics and step.dynamics.evaluation for step in steps] == [line.get("evaluation") for line in lines]
    assert [step.dynamics and step.dynamics.reward for step in steps] == [line.get("reward") for line in lines]
    assert not list(run.path.glob("rollouts/*"))

    with CpuDevice(), single_process():
        model = load_qwen3_moe(small_model, torch.float32).train()
        optimizer = _optimizer(model)
        assert kept.restore(model, optimizer) == 1
        conversations = read_rollouts(kept.rollouts(2))
        assert {name for each in conversations for _, name in each.masks.weight_versions} == {"run-1"}
        torch.set_num_threads(1)
        with attach(model) as replay:
            Updates(model, replay, optimizer, SETTINGS).step(2, conversations, lambda: None)
        wanted = {name: tensor.clone() for name, tensor in hf_tensors(model).items()}
        assert run.restore(model, _optimizer(model)) == 2
        found = hf_tensors(model)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
