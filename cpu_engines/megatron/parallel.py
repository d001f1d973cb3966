"""Megatron's process groups over gloo, on machines without a GPU."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch.distributed as dist
from megatron.core import parallel_state

ContextOrder = Literal["zigzag", "contiguous"]


class Layout(TypedDict, total=False):
    """How many ranks share what; the rest of the world is data parallel.

    `expert_tensor_parallel` is `tensor_parallel` when left out, as in Megatron: experts that shall be whole on each
    expert-parallel rank of a tensor-parallel group need a 1. `order` is that of the ranks, fastest first.
    `context_order` says how sequences are cut over the context-parallel ranks, zigzag when left out: nothing that
    Megatron keeps, but what stands in for its attention and rotary positions has to know it.
    """

    tensor_parallel: int
    context_parallel: int
    pipeline_parallel: int
    virtual_pipeline: int | None
    expert_parallel: int
    expert_tensor_parallel: int | None
    order: str
    context_order: ContextOrder


_MEGATRON_NAMES = {
    "tensor_parallel": "tensor_model_parallel_size",
    "context_parallel": "context_parallel_size",
    "pipeline_parallel": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "expert_parallel": "expert_model_parallel_size",
    "expert_tensor_parallel": "expert_tensor_parallel_size",
    "order": "order",
}

_context_order: ContextOrder = "zigzag"


def context_order() -> ContextOrder:
    """Of the layout in place."""
    return _context_order


@contextlib.contextmanager
def world(rank: int, size: int, rendezvous: Path) -> Iterator[None]:
    """Join `size` processes by gloo; many `model_parallel` layouts may follow each other inside.

    Args:
        rank: of this process; the processes are the caller's.
        rendezvous: a file that does not exist yet, the same for all of them: no port is opened.

    Raises:
        RuntimeError: a process group exists already; end it, or build the model inside it without this function.
    """
    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed is already initialised with {dist.get_world_size()} rank(s), and a group of "
            f"{size} was to be started: leave the other one first"
        )
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel(**layout: Unpack[Layout]) -> Iterator[None]:
    """Initialise `parallel_state` inside a `world`, and tear it down with the groups it made.

    All ranks enter and leave together: both are collective.

    Raises:
        RuntimeError: another layout is in place, or the world cannot be divided by this one (Megatron's own check).
    """
    if parallel_state.model_parallel_is_initialized():
        raise RuntimeError(f"another parallel layout is in place, and {layout} was to be entered: leave that one first")
    global _context_order
    _context_order = layout.pop("context_order", "zigzag")
    try:
        parallel_state.initialize_model_parallel(**{_MEGATRON_NAMES[name]: size for name, size in layout.items()})
        yield
        # Who closes its sockets early breaks a collective that another rank is still in.
        dist.barrier()
    finally:
        _context_order = "zigzag"
        groups = parallel_state._global_process_group_list or []
        parallel_state.destroy_model_parallel()
        # Megatron forgets its groups and leaves their sockets open.
        for group in groups:
            if group is not None and group in dist.distributed_c10d._world.pg_map:
                dist.destroy_process_group(group)


@contextlib.contextmanager
def process_group(rank: int, world_size: int, rendezvous: Path, **layout: Unpack[Layout]) -> Iterator[None]:
    """One `model_parallel` layout in a `world` of its own; arguments and errors are theirs."""
    with world(rank, world_size, rendezvous), model_parallel(**layout):
        yield


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """`process_group` for a world of one rank, which needs no rendezvous from the caller."""
    with tempfile.TemporaryDirectory() as folder, process_group(0, 1, Path(folder) / "rendezvous"):
        yield
