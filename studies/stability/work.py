"""The study from its server to its last result, in pieces that may be interrupted anywhere."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.machine import write_json
from cpu_engines.sglang.server import BATCHED_DECODE, serve
from examples.grpo.state import RunFolder
from examples.multi_turn_replay.job import SERVER_FLAGS, SGLANG_MODELS
from examples.small_model import CHECKPOINT
from router_replay.errors import InputError
from studies.stability import results
from studies.stability.protocol import Run
from studies.stability.schedule import claimed, pieces

CONCURRENCY = 64

console = Console()


@contextlib.contextmanager
def server() -> Iterator[str]:
    """URL of an SGLang in float32, so that the same weights have no mismatch and all of it is made by the study."""
    flags = (*SERVER_FLAGS, "--router-capture-store=inline:", "--dtype=float32", "--num-continuous-decode-steps=4")
    environment = {"OMP_NUM_THREADS": "1", **BATCHED_DECODE}
    with contextlib.ExitStack() as stack:
        with console.status("starting SGLang (a minute or two)"):
            started = serve(CHECKPOINT, *flags, model_package=SGLANG_MODELS, environment=environment, timeout_s=600)
            running = stack.enter_context(started)
        yield running.url


def work(
    plan: Sequence[Sequence[Run]],
    *,
    out: Path,
    folder: Path = results.RESULTS,
    minutes: float,
    url: str | None = None,
) -> None:
    """Go on with a plan until it is finished, or no further piece begins in the time.

    Several processes may do so at once, each with a server of its own: they share the runs.

    Args:
        plan: blocks of runs, as of `pieces`.
        out: folder of the runs that are not finished.
        folder: of the results.
        minutes: after which no piece begins.
        url: of a server like that of `server`, into which nobody else loads weights; None to start one.
    """
    end = time.monotonic() + 60 * minutes

    def unfinished() -> Iterator[tuple[Run, int]]:
        return pieces(plan, lambda run: steps_done(run, out, folder))

    if next(unfinished(), None) is None:
        console.print("every run has its result")
        return
    # One thread: two that spin beside the server's would wait for each other.
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        url = url or stack.enter_context(server())
        # Here and not above: Megatron takes tens of seconds, in which a server that does not start has been told of.
        from examples.multi_turn_replay.trainer_scores import trainer
        from megatron_router_replay import attach

        model = stack.enter_context(trainer(CHECKPOINT, torch.float32)).train()
        # No alarm for routes that have little in common: the study makes them so.
        replay = stack.enter_context(attach(model, overlap_every=None))
        initial = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
        while time.monotonic() < end:
            with claimed(unfinished(), out) as found:
                if found is None:
                    break
                run, until = found
                # A run that goes on loads its own weights; these are as the run before left them.
                model.load_state_dict(initial, strict=False)
                failed = _go_on(run, until, model, replay, url, out)
                if until == run.num_steps or failed is not None:
                    results.write(run, RunFolder(out / run.name).figures(), folder, failed=failed)
                    console.print(f"written: {results.path_of(run, folder)}", soft_wrap=True)
    if next(unfinished(), None) is None:
        console.print("every run has its result")
    elif time.monotonic() < end:
        console.print("the runs that have no result yet are other processes'")


def _go_on(run: Run, until: int, model: Any, replay: Any, url: str, out: Path) -> str | None:
    """Train a run up to a step; what ended it before, if that was something of its own."""
    from cpu_engines.megatron.qwen3_moe import hf_tensors
    from examples.grpo.loop import train

    folder = out / run.name
    settings = run.arm.settings(run.seed)
    _same_protocol(run, folder)
    tensors = hf_tensors(model)
    for name, tensor in run.arm.start(tensors).items():
        tensors[name].copy_(tensor)
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        pieces = {
            "rollout": settings.problems * settings.group_size,
            "update": 2 * settings.problems * settings.group_size // settings.microbatch,
        }

        def show(step: int, what: str) -> Any:
            progress.reset(bar, description=f"{run.name}, step {step}: {what}", total=pieces[what])
            return lambda *_: progress.advance(bar)

        def log(figures: dict[str, Any]) -> None:
            said = {name: figures[name] for name in ("reward", "evaluation") if name in figures}
            console.print(f"{run.name:<12} step {figures['step']:>4} ", said, highlight=False, soft_wrap=True)

        try:
            train(
                model,
                replay,
                CHECKPOINT,
                url,
                folder,
                settings,
                steps=until,
                concurrency=CONCURRENCY,
                log=log,
                show=show,
                for_rollout=run.arm.rollout,
                for_evaluation=dict,
            )
        # What a run that falls apart ends with: log-probabilities or gradients that are not finite. The rest is no
        # result of it, and ends the study until it is mended.
        except InputError as error:
            # Before its first step is done nothing of it was seen: the fault is in what it was given.
            lines = RunFolder(folder).figures()
            if not lines or lines[-1]["step"] < 1:
                raise
            return f"{type(error).__name__}: {error}"
    return None


def _same_protocol(run: Run, folder: Path) -> None:
    """Write what a run depends on into its folder, or see that a run that goes on has the same."""
    path = folder / "protocol.json"
    if path.exists():
        results.require_protocol(run, json.loads(path.read_text()), path)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(results.protocol_of(run), path)


def steps_done(run: Run, out: Path, folder: Path = results.RESULTS) -> int:
    """Steps that a run has behind it: all of them if it has its result, else those in its folder.

    One whose last step is done and has no result still lacks that step, so that the result is written.
    """
    if results.read(run, folder) is not None:
        return run.num_steps
    lines = RunFolder(out / run.name).figures()
    return min(lines[-1]["step"], run.num_steps - 1) if lines else 0
