"""A run whose steps stand for millions of tokens each, written, and a report made of it."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import safetensors.torch
import torch
from rich.console import Console
from safetensors import safe_open

from benchmarks.interleaved import Seconds, median_of
from benchmarks.machine import hardware, versions, write_json
from benchmarks.shown import aims_table, table
from router_replay.mismatch import LogRatios, Responses, truncated_importance_weights
from router_replay.run import Dynamics, RunStep, write_step

SEQUENCE, GROUP = 1000, 8
LIMIT = 60.0
"""Seconds that the report may take."""

_COMMAND = "import sys; from router_replay_cli.main import main; sys.exit(main())"


def measure(steps: int, tokens: int, different: int, rounds: int, json_file: Path | None) -> None:
    """Print medians of the times and the sizes of the files, and write them to `json_file`."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        written = _write_run(Path(folder) / "run", steps, tokens, different)
        reports = [_report(Path(folder) / "run", Path(folder) / "page.html") for _ in range(rounds)]
    taken = median_of(reports)
    figures = {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "steps": steps,
        "tokens": tokens,
        "rounds": rounds,
        "write_step": written,
        "report": taken._asdict(),
        "aims": {"seconds of r3 report": {"at_most": LIMIT, "measured": taken.wall, "holds": taken.wall <= LIMIT}},
    }
    console = Console(width=120)
    shown = table(f"{steps:,} steps of {tokens:,} response tokens, one thread", "median s", "CPU s", "MB a step")
    for name, each in written.items():
        shown.add_row(name, f"{each['wall']:.2f}", f"{each['cpu']:.2f}", f"{each['bytes'] / 1e6:.2f}")
    shown.add_row("r3 report of the run", f"{taken.wall:.2f}", f"{taken.cpu:.2f}", "")
    console.print(shown)
    console.print(aims_table(figures["aims"], places=1))
    console.print(f"{figures['hardware']}\n{figures['versions']}")
    if json_file is not None:
        write_json(figures, json_file)


def _write_run(folder: Path, steps: int, tokens: int, different: int) -> dict[str, dict[str, float]]:
    """Median seconds and bytes of a step that is written with and without its tokens."""
    made: list[Path] = []
    taken: dict[str, list[tuple[Seconds, int]]] = {"a step, with its tokens": [], "a step, its tallies alone": []}
    for number in range(min(different, steps)):
        step = _step(number, tokens)
        for (_, of_kind), with_tokens in zip(taken.items(), (True, False), strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            path = write_step(folder, step, tokens=with_tokens)
            seconds = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
            of_kind.append((seconds, path.stat().st_size))
        made.append(path)
    for number in range(len(made), steps):
        _copy(made[number % len(made)], number)
    return {
        name: {
            **median_of(seconds for seconds, _ in of_kind)._asdict(),
            "bytes": statistics.median(size for _, size in of_kind),
        }
        for name, of_kind in taken.items()
    }


def _step(number: int, tokens: int) -> RunStep:
    """Noise on log-probabilities, more of it in later steps, as if the two sides drifted apart."""
    generator = torch.Generator().manual_seed(number)
    count = tokens // SEQUENCE
    rollout = -3 * torch.rand(count * SEQUENCE, generator=generator)
    trainer = rollout + 0.03 * (1 + number) * torch.randn(len(rollout), generator=generator)
    bounds = range(0, len(rollout) + 1, SEQUENCE)
    mask = torch.ones(len(rollout), dtype=torch.bool)
    responses = Responses.packed(mask, bounds, [each // GROUP for each in range(count)])
    weights = truncated_importance_weights(LogRatios.of(trainer=trainer, rollout=rollout, responses=responses))
    return RunStep.of(
        number,
        rollout_logprobs=rollout,
        trainer_logprobs={"old": trainer},
        responses=responses,
        weights={"TIS": weights},
        dynamics=Dynamics(
            num_responses=count, reward=0.5, num_tokens=len(rollout), entropy=1.0, gradient_norm=1.0, seconds=60.0
        ),
    )


def _copy(path: Path, number: int) -> None:
    """The same step under another number."""
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "step": str(number)}
    copied = path.with_name(f"step-{number:08d}.safetensors")
    safetensors.torch.save_file(safetensors.torch.load_file(path), copied, metadata)


def _report(folder: Path, page: Path) -> Seconds:
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", _COMMAND, "report", str(folder), "--out", str(page)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
