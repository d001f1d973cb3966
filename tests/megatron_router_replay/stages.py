"""Models as one rank of a pipeline would build them, without the other ranks: only who this rank is is made up."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

BuildChunk = Callable[..., torch.nn.Module]


class _Group:
    """What a pipeline's process group says while models are built."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@contextlib.contextmanager
def pipeline_rank(rank: int, size: int, chunks: int = 1) -> Iterator[ProcessGroupCollection]:
    """Groups of one rank of a pipeline, for the models built inside the block; `chunks` on every rank."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.pp = _Group(rank, size)
    distributed = torch.distributed
    get_rank, get_world_size = distributed.get_rank, distributed.get_world_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "get_rank", lambda group=None: _ask(group, "rank", get_rank))
        patch.setattr(distributed, "get_world_size", lambda group=None: _ask(group, "size", get_world_size))
        patch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_RANK", rank)
        patch.setattr(parallel_state, "_MPU_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", size)
        patch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", chunks if chunks > 1 else None)
        yield groups


def _ask(group: object, what: str, otherwise: Callable[[object], int]) -> int:
    return getattr(group, what)() if isinstance(group, _Group) else otherwise(group)
