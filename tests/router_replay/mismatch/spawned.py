"""Functions on several gloo ranks, and what each of them returned or raised."""

from __future__ import annotations

import datetime
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60
"""After which a rank that waits for another in vain gives up: more than starting takes, and it fails."""


def on_ranks(world_size: int, function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)`, of a module's level, returns on each rank."""
    # Torch is imported once, by a server that has run nothing yet, and not by every rank of every module.
    multiprocessing.set_forkserver_preload(["torch.multiprocessing", "router_replay.mismatch"])
    mp.start_processes(
        _run, (world_size, function, str(folder), arguments), nprocs=world_size, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run(rank: int, world_size: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    try:
        torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
