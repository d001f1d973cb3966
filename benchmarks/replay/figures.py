"""Times of the trainer's routers, layers and steps, and the tables of them."""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

# Before anything of Megatron: see cpu_engines.megatron.
from cpu_engines.megatron import CpuDevice, single_process  # isort: skip

import torch
from megatron.core.models.gpt import GPTModel
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.interleaved import Seconds, all_seconds, median_of
from benchmarks.machine import hardware, versions, write_json
from benchmarks.replay import binding, hugging_face
from benchmarks.replay.learning import learn
from benchmarks.replay.models import VOCABULARY, build
from benchmarks.replay.variants import AGAIN, NATIVE, ORDER, OURS, WITH_NATIVE, Work, num_operators, variants
from benchmarks.shown import aims_table, median_and_error, table
from cpu_engines.megatron.logprobs import forward_logits
from megatron_router_replay import BatchLayout

NUM_SEQUENCES = 4
# A block is entered once for all routers of a model, so that one router alone must not bear all of its cost.
NUM_LAYERS = {"routers": 8, "MoE layer": 1, "step": 2}
Block = Callable[[], AbstractContextManager[Any]]


def works(hidden: int, token_ids: Tensor) -> dict[str, Work]:
    """Forward pass of routers, forward and backward pass of a MoE layer, and a training step."""
    batch, steps = token_ids.shape
    inputs = torch.randn(steps, batch, hidden, generator=torch.Generator().manual_seed(2))

    def routers(model: GPTModel, block: Block) -> None:
        with block():
            for layer in model.decoder.layers:
                layer.mlp.router(inputs)

    def moe_layer(model: GPTModel, block: Block) -> None:
        with block():
            output, _ = model.decoder.layers[0].mlp(inputs)
        output.square().mean().backward()
        model.zero_grad()

    def step(model: GPTModel, block: Block) -> None:
        with block():
            logits = forward_logits(model, token_ids)
        learn(model, logits, token_ids)

    return {"routers": routers, "MoE layer": moe_layer, "step": step}


def times_of(shape: str, kind: str, tokens: int, hidden: int, rounds: int) -> dict[str, dict[str, float]]:
    """By variant: median seconds by the clock and of the CPU, the latter over native's, and the number of operators."""
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(0, VOCABULARY, (NUM_SEQUENCES, tokens // NUM_SEQUENCES), generator=generator)
    layout = BatchLayout.padded(token_ids, [token_ids.shape[1]] * NUM_SEQUENCES)
    made = functools.partial(build, shape, NUM_LAYERS[kind], hidden, experts=kind != "routers")
    with variants(made, works(hidden, token_ids)[kind], layout) as runs:
        times = all_seconds(runs, rounds)
        operators = {name: num_operators(run) for name, run in runs.items()}
    return _summaries(times, operators)


def hugging_face_times(tokens: int, hidden: int, rounds: int) -> dict[str, dict[str, float]]:
    """The same of a training step of a model of Hugging Face, which has no replay of its own to compare with."""
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(0, VOCABULARY, (NUM_SEQUENCES, tokens // NUM_SEQUENCES), generator=generator)
    with hugging_face.variants(hidden, token_ids) as runs:
        times = all_seconds(runs, rounds)
        operators = {name: num_operators(run) for name, run in runs.items()}
    return _summaries(times, operators)


def _summaries(times: dict[str, list[Seconds]], operators: dict[str, int]) -> dict[str, dict[str, float]]:
    return {
        name: _summary(times[name], times[NATIVE]) | {"operators": operators[name]} for name in ORDER if name in times
    }


def _summary(times: list[Seconds], native: list[Seconds]) -> dict[str, float]:
    """Medians, and the median over rounds of the time over native's in the same round, with its error."""
    ratios = [ours.cpu / theirs.cpu for ours, theirs in zip(times, native, strict=True)]
    ratio, error = median_and_error(ratios)
    taken = median_of(times)
    return {"wall_seconds": taken.wall, "cpu_seconds": taken.cpu, "cpu_of_native": ratio, "error": error}


def targets(times: dict[str, dict[str, dict[str, float]]], binds: dict[str, Seconds]) -> dict[str, dict[str, Any]]:
    """What is aimed at, what was measured, and whether it holds.

    All in CPU time, since others share the machine. A step may take what native takes, and as much more as native
    differs from itself.
    """
    found = {}
    for title, by_variant in times.items():
        noise = abs(by_variant[AGAIN]["cpu_of_native"] - 1) + by_variant[AGAIN]["error"]
        bounds = {"routers": 0.7, "step": 1 + noise}
        kind = title.rpartition(", ")[2]
        for variant in (OURS, WITH_NATIVE) if kind in bounds else ():
            found[f"{title}: {variant}, of native"] = (bounds[kind], by_variant[variant]["cpu_of_native"])
    for use, milliseconds in ((binding.FIRST, 15.0), (binding.SECOND, 5.0)):
        found[f"{use}, ms"] = (milliseconds, binds[use].cpu * 1e3)
    return {
        name: {"at_most": bound, "measured": value, "holds": value <= bound} for name, (bound, value) in found.items()
    }


def measure(
    shapes: list[str],
    tokens: int,
    layer_tokens: int,
    hidden: int,
    rounds: int,
    bind_tokens: int,
    threads: int,
    json_file: Path | None,
) -> None:
    """Print the tables, and write their figures to `json_file`; arguments as of `python -m benchmarks.replay`."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    times = {}
    with CpuDevice(), single_process():
        for shape in shapes:
            for kind, layers in NUM_LAYERS.items():
                places, number = (tokens, rounds) if kind == "routers" else (layer_tokens, max(rounds // 2, 1))
                title = f"{shape}, {kind}"
                times[title] = times_of(shape, kind, places, hidden, number)
                sizes = f"{layers} layer(s), {places:,} places, hidden size {hidden}, {number} rounds"
                console.print(_times_table(f"{title}: {sizes}", times[title]))
        binds, held = binding.host_times(bind_tokens, rounds)
    title = "Qwen3-MoE of Hugging Face, step"
    times[title] = hugging_face_times(layer_tokens, hidden, max(rounds // 2, 1))
    sizes = f"{hugging_face.NUM_LAYERS} layer(s), {layer_tokens:,} places, hidden size {hidden}"
    console.print(_times_table(f"{title}: {sizes}, {max(rounds // 2, 1)} rounds", times[title]))
    console.print(_bind_table(f"Host time of a bind, {bind_tokens:,} tokens of {binding.MODEL}", binds))
    console.print({"bytes per token on the device": {name: round(size, 1) for name, size in held.items()}})
    aims = targets(times, binds)
    console.print(aims_table(aims, "Targets, by CPU time"))
    figures = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "settings": {
            "tokens": tokens, "layer_tokens": layer_tokens, "hidden": hidden, "rounds": rounds, "threads": threads,
        },
        "times": times,
        "bind": {
            "model": binding.MODEL, "tokens": bind_tokens,
            "median_seconds": {name: taken._asdict() for name, taken in binds.items()},
            "bytes_per_token": held,
        },
        "targets": aims,
    }  # fmt: skip
    console.print({key: figures[key] for key in ("date", "hardware", "versions", "settings")})
    if json_file is not None:
        write_json(figures, json_file)


def _times_table(title: str, times: dict[str, dict[str, float]]) -> Table:
    made = table(title, "wall ms", "CPU ms", "CPU of native", "+-", "operators")
    for name, taken in times.items():
        milliseconds = f"{taken['wall_seconds'] * 1e3:.2f}", f"{taken['cpu_seconds'] * 1e3:.2f}"
        ratios = f"{taken['cpu_of_native']:.3f}", f"{taken['error']:.3f}"
        made.add_row(name, *milliseconds, *ratios, f"{taken['operators']}")
    return made


def _bind_table(title: str, binds: dict[str, Seconds]) -> Table:
    made = table(title, "wall ms", "CPU ms")
    for name, taken in binds.items():
        made.add_row(name, f"{taken.wall * 1e3:.2f}", f"{taken.cpu * 1e3:.2f}")
    return made
