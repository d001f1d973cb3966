"""Sizes and times of the mask codecs, and the tables of them."""

from __future__ import annotations

import datetime
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.interleaved import Seconds, median_seconds
from benchmarks.machine import hardware, versions, write_json
from benchmarks.mask_codec.before import Figures, compare
from benchmarks.mask_codec.gpu import speeds_on_gpu
from benchmarks.mask_codec.models import MODELS, geometry_of
from benchmarks.mask_codec.pipelines import pipelines
from router_replay.masks import CODEC_NAMES, RoutingGeometry, choose_codec, get_codec
from router_replay.masks.codecs.ops import MISSING_KERNELS


def sizes(name: str) -> dict[str, float | str]:
    """Bytes per token of each way to write the routes, and the codec that 'auto' chooses.

    'base64' is that of int32, 'narrow' is uint8 or uint16, 'bound' the entropy of uniformly chosen expert sets.
    """
    geometry = geometry_of(name)
    choices = geometry.num_moe_layers * geometry.top_k
    return {
        "int32": choices * 4,
        "base64": choices * 4 * 4 / 3,
        "narrow": choices * (1 if geometry.num_experts <= 256 else 2),
        **{codec: get_codec(codec).row_bytes(geometry) for codec in CODEC_NAMES},
        "bound": geometry.num_moe_layers * math.log2(math.comb(geometry.num_experts, geometry.top_k)) / 8,
        "auto": choose_codec("auto", geometry).name,
    }


def random_indices(geometry: RoutingGeometry, num_tokens: int) -> Tensor:
    """Uniform expert sets in random order, `int32 [num_tokens, L, K]`."""
    indices = torch.empty((num_tokens, geometry.num_moe_layers, geometry.top_k), dtype=torch.int32)
    for part in indices.split(1024):
        scores = torch.rand((len(part), geometry.num_moe_layers, geometry.num_experts))
        part.copy_(scores.topk(geometry.top_k).indices)
    return indices


def speeds(name: str, num_tokens: int, rounds: int) -> dict[str, float]:
    """Thousands of tokens per second that each codec packs and unpacks, and that numpy.packbits packs.

    numpy is given the one-hot masks, which somebody has to make first.
    """
    geometry = geometry_of(name)
    # What the server's staging buffer holds.
    indices = random_indices(geometry, num_tokens).to(torch.int16)
    variants: dict[str, Any] = {}
    for codec in map(get_codec, CODEC_NAMES):
        rows = codec.pack(indices, geometry)
        variants[f"{codec.name} pack"] = lambda codec=codec: codec.pack(indices, geometry)
        variants[f"{codec.name} unpack"] = lambda codec=codec, rows=rows: codec.unpack_indices(rows, geometry)
    mask = torch.zeros((num_tokens, geometry.num_moe_layers, geometry.num_experts), dtype=torch.bool)
    one_hot = mask.scatter_(-1, indices.long(), True).flatten(1).numpy()
    variants["numpy.packbits"] = lambda: np.packbits(one_hot, axis=1, bitorder="little")
    return {each: num_tokens / taken.wall / 1e3 for each, taken in median_seconds(variants, rounds).items()}


def _table(title: str, first: str, rows: dict[str, dict[str, Any]], number: str) -> Table:
    columns = list(next(iter(rows.values())))
    table = Table(first, *columns, title=title, title_justify="left")
    table.columns[0].no_wrap = True
    for name, row in rows.items():
        table.add_row(name, *(each if isinstance(each, str) else format(each, number) for each in row.values()))
    return table


def _way_table(ways: dict[str, Seconds], title: str) -> Table:
    table = Table("", "CPU ms", "wall ms", "CPU of 1st", "CPU of 2nd", title=title, title_justify="left")
    first, second = list(ways.values())[:2]
    for name, taken in ways.items():
        milliseconds = f"{taken.cpu * 1e3:.1f}", f"{taken.wall * 1e3:.1f}"
        table.add_row(name, *milliseconds, f"{taken.cpu / first.cpu:.3f}", f"{taken.cpu / second.cpu:.3f}")
    return table


def _before_table(figures: Figures, title: str) -> Table:
    table = Table("model", "", "before", "now", "now / before", title=title, title_justify="left")
    for name, runs in figures.items():
        for run, taken in runs.items():
            before, now = taken["before"].cpu, taken["now"].cpu
            table.add_row(name, run, f"{before * 1e3:.1f}", f"{now * 1e3:.1f}", f"{now / before:.2f}")
        table.add_section()
    return table


def measure(
    model: str, tokens: int, speed_tokens: int, rounds: int, threads: int, before: str | None, json_file: Path | None
) -> None:
    """Print the tables, and write their figures to `json_file`; arguments as of `python -m benchmarks.mask_codec`."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    console = Console(width=None if sys.stdout.isatty() else 120)
    by_model = {name: sizes(name) for name in MODELS}
    console.print(_table("Bytes per token", "model", by_model, ",.1f"))
    by_speed = {name: speeds(name, speed_tokens, rounds) for name in MODELS}
    title = f"Thousand tokens per second, {speed_tokens:,} tokens, {threads} thread(s), median of {rounds}"
    console.print(_table(title, "model", by_speed, ",.0f"))
    indices = random_indices(geometry_of(model), tokens)
    ways = median_seconds(pipelines(geometry_of(model), indices), rounds)
    console.print(
        _way_table(ways, f"{tokens:,} tokens of {model} to the trainer, {threads} thread(s), {rounds} rounds")
    )
    figures: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "missing_kernels": dict(MISSING_KERNELS),
        "bytes_per_token": by_model,
        "thousand_tokens_per_second": {"tokens": speed_tokens, "threads": threads, "models": by_speed},
        "way_to_the_trainer": {
            "model": model, "tokens": tokens, "rounds": rounds, "threads": threads,
            "median_seconds": {name: taken._asdict() for name, taken in ways.items()},
        },
    }  # fmt: skip
    if before is not None:
        compared = compare(before, speed_tokens, rounds, threads)
        title = f"CPU ms, {speed_tokens:,} tokens, {threads} thread(s), before ({before}) and now, median of {rounds}"
        console.print(_before_table(compared, title))
        figures["before"] = {
            "commit": before,
            "models": {
                name: {run: {which: each._asdict() for which, each in taken.items()} for run, taken in runs.items()}
                for name, runs in compared.items()
            },
        }
    if torch.cuda.is_available():
        on_gpu = speeds_on_gpu(geometry_of(model), indices.to(torch.int16), max(rounds, 20))
        figures["on_gpu"] = {name: speed._asdict() for name, speed in on_gpu.items()}
        by_variant = {
            name: {"µs": each.microseconds, "GB/s": each.gigabytes_per_second} for name, each in on_gpu.items()
        }
        console.print(_table("Read and written on the GPU", "", by_variant, ",.1f"))
    console.print({key: figures[key] for key in ("date", "hardware", "versions", "missing_kernels")})
    if json_file is not None:
        write_json(figures, json_file)
