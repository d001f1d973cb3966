"""Megatron's process groups in one process, over gloo."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """Initialise ``parallel_state`` for a world of one rank, and tear it down again.

    The rendezvous is a file in a temporary folder: no port is opened.

    Raises:
        RuntimeError: a process group exists already; end it, or build the model inside it without this function.
    """
    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed is already initialised with {dist.get_world_size()} rank(s); single_process() starts "
            "its own group of one rank: leave the other one first"
        )
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'rendezvous'}", rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
