"""Runs the ops of the `router_replay` that is first on PYTHONPATH, and answers how long they took.

It is run by its path, in a process of its own, and imports nothing of `benchmarks`: two builds of the kernels do not
fit into one process, as both define the same ops. A request is a line of JSON: `{"layers": ..., "experts": ...,
"top_k": ..., "tokens": ...}` makes routes and answers digests of their rows and of what is read back; `{"run": NAME}`
answers the seconds of one of the runs. The first line that is written says why kernels are missing, if they are.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from router_replay.masks.codecs.ops import MISSING_KERNELS, OPS

CODEC = "rank"


def random_routes(tokens: int, layers: int, experts: int, top_k: int) -> Tensor:
    """Uniform expert sets in random order, `int16 [tokens, layers, top_k]`, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.rand((count, layers, experts), generator=generator).topk(top_k).indices.to(torch.int16)
        for count in [1024] * (tokens // 1024) + [tokens % 1024]
    ]
    return torch.cat(parts)


def runs_of(tokens: int, layers: int, experts: int, top_k: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    routes = random_routes(tokens, layers, experts, top_k)
    geometry = layers, experts, top_k, CODEC
    rows = OPS.pack(routes, experts, CODEC)

    def unpack_layers() -> None:
        for layer in range(layers):
            OPS.unpack_layer(rows, layer, *geometry)

    return {
        "pack": lambda: OPS.pack(routes, experts, CODEC),
        "unpack": lambda: OPS.unpack_indices(rows, *geometry),
        "unpack, layer by layer": unpack_layers,
        "both": lambda: OPS.unpack_indices(OPS.pack(routes, experts, CODEC), *geometry),
    }


def digest(tensor: Tensor) -> str:
    """Of a tensor's bytes."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def answer(request: dict[str, Any], runs: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """The answer to a request; `runs` are replaced where it brings new routes."""
    if "run" in request:
        wall, cpu = time.perf_counter(), time.process_time()
        runs[request["run"]]()
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    runs.clear()
    runs.update(runs_of(**request))
    return {"rows": digest(runs["pack"]()), "routes": digest(runs["both"]())}


def main(threads: int) -> None:
    """Answer the requests on standard input."""
    torch.set_num_threads(threads)
    print(json.dumps({"missing": MISSING_KERNELS.get("cpu")}), flush=True)
    runs: dict[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), runs)), flush=True)
