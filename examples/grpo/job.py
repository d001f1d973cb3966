"""A run from its server to its last step, with progress on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cpu_engines.sglang.server import ServerDiedError
from examples.grpo.settings import Settings, SettingsError, same_settings
from examples.multi_turn_replay.job import rollout_server
from examples.multi_turn_replay.rollout import RolloutError
from router_replay.errors import RouterReplayError

console = Console()


def run(settings: Settings, *, steps: int, out: Path, model: Path, server: str | None, concurrency: int) -> None:
    """Arguments are those of `python -m examples.grpo`.

    Raises:
        typer.Exit: with status 1, after a line that says what was refused, and by whom.
    """
    try:
        same_settings(out, settings, model)
        with rollout_server(model, server, settings.seed, "inline:") as url:
            _train(settings, steps, out, model, url, concurrency)
    except (RolloutError, RouterReplayError, ServerDiedError, SettingsError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from error
    console.print(f"written: {out} (figures.jsonl; r3 report {out / 'mismatch'} makes a page)", soft_wrap=True)


def _train(settings: Settings, steps: int, out: Path, model: Path, url: str, concurrency: int) -> None:
    # One thread: two that spin beside the server's would wait for each other.
    torch.set_num_threads(1)
    # Here and not above: it takes tens of seconds, in which a server that does not start has been told of.
    from examples.grpo.loop import train
    from examples.multi_turn_replay.trainer_scores import trainer
    from megatron_router_replay import attach

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with contextlib.ExitStack() as stack:
        gpt_model = stack.enter_context(trainer(model, torch.float32)).train()
        replay = stack.enter_context(attach(gpt_model))
        progress = stack.enter_context(Progress(*columns, console=console, transient=True))
        bar = progress.add_task("", total=None)
        conversations = settings.problems * settings.group_size
        pieces = {"rollout": conversations, "update": 2 * conversations // settings.microbatch}

        def show(step: int, what: str) -> Callable[..., Any]:
            progress.reset(bar, description=f"step {step} of {steps}: {what}", total=pieces[what])
            return lambda *_: progress.advance(bar)

        train(
            gpt_model, replay, model, url, out, settings, steps=steps, concurrency=concurrency, log=_say, show=show
        )  # fmt: skip


def _say(figures: dict[str, Any]) -> None:
    said = [f"step {figures['step']:>4}"]
    for name, form in (("reward", ".3f"), ("evaluation", ".3f"), ("k3", ".1e"), ("gradient_norm", ".2f")):
        found = next((figures[key] for key in figures if key == name or key.endswith(f"/{name}")), None)
        if found is not None:
            said.append(f"{name.replace('_', ' ')} {found:{form}}")
    if "seconds" in figures:
        said.append(", ".join(f"{what} {took:.1f} s" for what, took in figures["seconds"].items()))
    console.print("  ".join(said), highlight=False, soft_wrap=True)
