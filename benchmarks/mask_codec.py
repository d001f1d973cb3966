"""How many bytes a token's routes take in each codec, and what packing costs on this CPU.

    python -m benchmarks.mask_codec [--json FILE]

Sizes are for the geometries of released models. Times are for one of them, beside what a server without this project
does with the same routes: gather int32, base64, JSON, and back.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.interleaved import median_seconds
from benchmarks.machine import hardware, versions, write_json
from routing_masks import CODEC_NAMES, RoutingGeometry, RoutingMasks, from_bytes, get_codec, to_bytes

# name: (MoE layers, top-k, experts), the dense layers of the released models left out.
MODELS = {
    "Qwen3-30B-A3B": (48, 8, 128),
    "Qwen3-235B-A22B": (94, 8, 128),
    "DeepSeek-V3": (58, 8, 256),
    "Kimi-K2": (60, 8, 384),
    "gpt-oss-120b": (36, 4, 128),
    "Mixtral-8x7B": (32, 2, 8),
    "Qwen3-Next-80B": (48, 10, 512),
    "OLMoE-1B-7B": (16, 8, 64),
}


def geometry_of(name: str) -> RoutingGeometry:
    """Geometry with the model's routed layers only."""
    layers, top_k, num_experts = MODELS[name]
    return RoutingGeometry(layers, tuple(range(layers)), num_experts, top_k)


def sizes(name: str) -> dict[str, float]:
    """Bytes per token of each way to write the routes.

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
    }


def random_indices(geometry: RoutingGeometry, num_tokens: int) -> Tensor:
    """Uniform expert sets, `int32 [num_tokens, L, K]`."""
    scores = torch.rand((num_tokens, geometry.num_moe_layers, geometry.num_experts))
    return scores.topk(geometry.top_k).indices.to(torch.int32)


def times(name: str, num_tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of packing, carrying and unpacking the routes of `num_tokens` tokens."""
    geometry = geometry_of(name)
    torch.manual_seed(0)
    indices = random_indices(geometry, num_tokens)
    table, token_ids = indices.clone(), list(range(num_tokens + 1))
    everything = torch.ones(num_tokens, dtype=torch.bool)
    slots = torch.randperm(num_tokens)

    def int32_base64_json() -> Tensor:
        text = json.dumps({"routed_experts": base64.b64encode(table[slots].numpy().tobytes()).decode("ascii")})
        data = base64.b64decode(json.loads(text)["routed_experts"])
        return torch.from_numpy(np.frombuffer(data, np.int32).reshape(indices.shape).copy())

    def masks(codec: str) -> Tensor:
        packed = RoutingMasks.from_indices(
            indices, everything, start=0, geometry=geometry, codec=codec, token_ids=token_ids
        )
        return from_bytes(to_bytes(packed)).indices()

    variants: dict[str, Any] = {"int32, base64, JSON, and back": int32_base64_json}
    for codec in CODEC_NAMES:
        variants[f"{codec}: pack, container, check, unpack"] = lambda codec=codec: masks(codec)
        rows = get_codec(codec).pack_unchecked(indices, geometry)
        variants[f"{codec}: pack only"] = lambda codec=codec: get_codec(codec).pack_unchecked(indices, geometry)
        variants[f"{codec}: unpack only"] = lambda codec=codec, rows=rows: get_codec(codec).unpack_indices(
            rows, geometry
        )
    return median_seconds(variants, rounds)


def main(
    model: Annotated[str, typer.Option(help=f"Geometry to time: {', '.join(MODELS)}.")] = "Qwen3-30B-A3B",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to time.")] = 4096,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are reported.")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here, too.")] = None,
) -> None:
    """Sizes and times of the mask codecs."""
    if model not in MODELS:
        raise typer.BadParameter(f"{model!r} is not one of {', '.join(MODELS)}")
    console = Console()
    by_model = {name: sizes(name) for name in MODELS}
    size_table = Table("model", *by_model[model], title="Bytes per token", title_justify="left")
    size_table.columns[0].no_wrap = True
    for name, row in by_model.items():
        size_table.add_row(name, *(f"{size:,.1f}" for size in row.values()))
    console.print(size_table)
    seconds = times(model, tokens, rounds)
    baseline = next(iter(seconds.values()))
    time_table = Table(
        "", "ms", "Mtokens/s", "of the first", title=f"{tokens:,} tokens of {model}, median of {rounds}",
        title_justify="left",
    )  # fmt: skip
    for name, taken in seconds.items():
        time_table.add_row(name, f"{taken * 1e3:.1f}", f"{tokens / taken / 1e6:.3f}", f"{taken / baseline:.2f}")
    console.print(time_table)
    figures = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(),
        "versions": versions(),
        "bytes_per_token": by_model,
        "timed": {"model": model, "tokens": tokens, "rounds": rounds, "median_seconds": seconds},
    }
    console.print({key: figures[key] for key in ("date", "hardware", "versions")})
    if json_file is not None:
        write_json(figures, json_file)


if __name__ == "__main__":
    typer.run(main)
