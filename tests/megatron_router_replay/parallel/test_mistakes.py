"""Ranks that bind something else than they should: seen by the ranks that can see it, raised on all of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
from megatron.core import parallel_state
from torch import nn

from megatron_router_replay import attach
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import Microbatch, geometry, microbatches
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.training import parallel_layout, train_step

ORDER = "chunks or ranks of one model replayed different microbatches"


def said(case: Case, mistake: str) -> str:
    """What a step's check says on this rank; "" where nothing is wrong."""
    with parallel_layout(case):
        chunks = build_chunks(case)
        batches = microbatches(case)
        swapped = {0: 1, 1: 0}
        last_stage = parallel_state.get_pipeline_model_parallel_rank() == case.pp - 1
        second_tensor_rank = parallel_state.get_tensor_model_parallel_rank() == 1
        with attach(chunks, geometry(case), context_order=case.context_order, overlap_every=None) as replay:

            def around(microbatch: Microbatch, chunk: nn.Module) -> AbstractContextManager[Any]:
                other = batches[swapped.get(microbatch.index, microbatch.index)]
                here = {
                    "masks and layout on every rank": True,
                    "masks and layout on the last stage": last_stage,
                    "masks and layout on one tensor-parallel rank": second_tensor_rank,
                    "masks and layout of the second chunk": any(part is chunks[-1] for part in chunk.modules()),
                }
                bound = other if here.get(mistake, False) else microbatch
                return replay.microbatch(bound.masks, bound.layout)

            # From the first check on nothing is raised on one rank alone, where others would wait for it.
            replay.check()
            train_step(case, chunks, around)
            try:
                replay.check()
            except Exception as error:
                return str(error)
    return ""


@pytest.mark.parametrize(
    ("case", "mistake", "message"),
    [
        (Case(pp=2), "", ""),
        (Case(pp=2), "masks and layout on every rank", "called with other token ids than those of the layout"),
        (Case(pp=2), "masks and layout on the last stage", ORDER),
        (Case(pp=2, vpp=2), "masks and layout of the second chunk", ORDER),
        (Case(tp=2), "masks and layout on one tensor-parallel rank", "called with other token ids"),
        (Case(pp=2, dense=(0, 1)), "masks and layout on every rank", "called with other token ids"),
    ],
    ids=lambda value: str(value) if isinstance(value, Case) else value[:40],
)
def test_microbatches_that_were_swapped(case, mistake, message, pools):
    for found in pools[case.world_size].run(said, case, mistake):
        assert message in found and bool(found) == bool(message)
