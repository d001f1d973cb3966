"""Megatron's process groups over gloo, on machines without a GPU."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state


@contextlib.contextmanager
def process_group(rank: int, world_size: int, rendezvous: Path, *, tensor_parallel: int = 1) -> Iterator[None]:
    """Initialise `parallel_state` in one process of several, and tear it down again.

    Args:
        rank, world_size: of this process; the processes are the caller's.
        rendezvous: a file that does not exist yet, the same for all of them: no port is opened.
        tensor_parallel: ranks that share a layer; the rest of the world is data parallel.

    Raises:
        RuntimeError: a process group exists already; end it, or build the model inside it without this function.
    """
    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed is already initialised with {dist.get_world_size()} rank(s), and a group of "
            f"{world_size} was to be started: leave the other one first"
        )
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tensor_parallel)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """`process_group` for a world of one rank, which needs no rendezvous from the caller."""
    with tempfile.TemporaryDirectory() as folder, process_group(0, 1, Path(folder) / "rendezvous"):
        yield
