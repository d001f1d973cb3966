"""The phases of the demo one after the other: server, conversations, the trainer's passes, and the files of it all."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import time
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoTokenizer

from cpu_engines.sglang.server import ServerDiedError, serve
from examples.calculator.game import problems
from examples.multi_turn_replay.rollout import Conversation, RolloutError, play
from examples.qwen3_moe import SGLANG_MODELS
from router_replay.errors import RouterReplayError

SERVER_FLAGS = ("--enable-router-capture", "--skip-tokenizer-init", "--max-total-tokens=65536")

_TRAINERS = {"megatron": "trainer_scores", "hf": "hf_scores"}

console = Console()


@contextlib.contextmanager
def rollout_server(model: Path, server: str | None, seed: int, store: str) -> Iterator[str]:
    """URL of `server`, or of one with router capture that runs for the length of the block."""
    if server is not None:
        yield server
        return
    on_cpu = not torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        with console.status(f"starting SGLang on the {'CPU' if on_cpu else 'GPU'} (a minute or two)"):
            flags = (*SERVER_FLAGS, f"--random-seed={seed}", f"--router-capture-store={store}")
            # The small model's matrices are too small to share: threads would only wait for each other.
            environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")} if on_cpu else {}
            server_here = serve(
                model, *flags, model_package=SGLANG_MODELS, environment=environment, cpu=on_cpu, timeout_s=600
            )
            started = stack.enter_context(server_here)
        yield started.url


def roll_out(
    url: str, model: Path, count: int, seed: int, concurrency: int, *, group_size: int = 1
) -> list[Conversation]:
    """Play `count` conversations, `group_size` one after the other about each problem, with a progress bar."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with _progress() as progress:
        bar = progress.add_task("rollout: conversations", total=count)
        return play(
            url,
            list(islice((each for each in problems("held_out", seed) for _ in range(group_size)), count)),
            tokenizer,
            concurrency=concurrency,
            on_finished=lambda conversation: progress.advance(bar),
        )


def train_side(model: Path, conversations: list[Conversation], dtype: torch.dtype, trainer: str = "megatron") -> Any:
    """`examples.multi_turn_replay.scores.Scores` of the conversations, with a progress bar per pass."""
    with (
        console.status("loading the trainer and the checkpoint"),
        # Advice about speed on GPUs, and about classes that go in later versions.
        warnings.catch_warnings(action="ignore", category=UserWarning),
        contextlib.ExitStack() as stack,
    ):
        # Here and not above: it takes tens of seconds, which neither --help nor the rollout needs to wait for.
        scores = importlib.import_module(f"examples.multi_turn_replay.{_TRAINERS[trainer]}")
        live_model = stack.enter_context(scores.trainer(model, dtype))
        loaded = stack.pop_all()
    with loaded, _progress() as progress:
        names = {"native": "trainer, own routes", "replay": "trainer, routes replayed"}
        bars = {which: progress.add_task(names[which], total=len(conversations)) for which in names}
        return scores.score(live_model, conversations, on_batch=lambda which, done: progress.advance(bars[which], done))


def run(
    *,
    server: str | None,
    model: Path,
    store: str,
    conversations: int,
    group_size: int,
    concurrency: int,
    seed: int,
    trainer: str,
    trainer_dtype: str,
    out: Path,
) -> None:
    """The whole job; arguments are those of `python -m examples.multi_turn_replay`.

    Raises:
        typer.Exit: with status 1, after a line that says what the server or the trainer refused.
    """
    seconds: dict[str, float] = {}
    try:
        begin = time.perf_counter()
        with rollout_server(model, server, seed, store) as url:
            seconds["server_start"] = _lap(begin)
            begin = time.perf_counter()
            played = roll_out(url, model, conversations, seed, concurrency, group_size=group_size)
            seconds["rollout"] = _lap(begin)
        begin = time.perf_counter()
        scores = train_side(model, played, getattr(torch, trainer_dtype), trainer)
        seconds["trainer"] = _lap(begin)
    except (RolloutError, RouterReplayError, ServerDiedError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error

    from benchmarks.machine import hardware, versions, write_json
    from examples.multi_turn_replay.mismatch_plot import plot_mismatch
    from examples.multi_turn_replay.replay_report import REPORTED_TAUS, compare, summarize, table
    from examples.multi_turn_replay.run_steps import report_steps, write_steps
    from router_replay.run.step_tally import CURVE_TAUS

    found = (scores.native_logprobs, scores.replay_logprobs, scores.native_routes)
    comparison = compare(played, *found, taus=sorted({*REPORTED_TAUS, *CURVE_TAUS}))
    report = {
        **summarize(played, comparison),
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "trainer": trainer,
        "trainer_dtype": trainer_dtype,
        "seconds": seconds,
        "hardware": hardware(),
        "versions": versions(),
    }
    plot_mismatch(comparison, out / "mismatch.png")
    write_json(report, out / "demo.json")
    files = write_steps(played, *found, out / "mismatch", group_size=group_size)
    report_steps(files, out / "report.html")
    console.print(table(report))
    console.print("seconds: " + ", ".join(f"{phase.replace('_', ' ')} {took:.0f}" for phase, took in seconds.items()))
    for path, what in (
        ("report.html", "page of all plots, for a browser"),
        ("mismatch.png", "the picture"),
        ("demo.json", "the figures"),
        ("mismatch", f"the run's {len(files)} files, from which `r3 report` makes the page"),
    ):
        console.print(f"written: {out / path} ({what})", highlight=False, soft_wrap=True)


def _lap(begin: float) -> float:
    return round(time.perf_counter() - begin, 1)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
