"""A training step in which every microbatch replays its masks, as a trainer's forward_step binds them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from megatron_router_replay import attach
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.comparison import Step
from tests.megatron_router_replay.parallel.data import Microbatch, microbatches
from tests.megatron_router_replay.parallel.data import geometry as masks_geometry
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.training import RankStep, parallel_layout, train_step


def replayed_step(case: Case) -> RankStep:
    """Build this rank's model in an existing world, attach a replay, and train one step with masks.

    Masks are random, so how far they are the model's own choice is not looked at; all other checks are on.
    """
    with parallel_layout(case):
        chunks = build_chunks(case)
        with attach(chunks, masks_geometry(case), context_order=case.context_order, overlap_every=None) as replay:

            def around(microbatch: Microbatch, chunk: nn.Module) -> AbstractContextManager[Any]:
                return replay.microbatch(microbatch.masks, microbatch.layout)

            step = train_step(case, chunks, around)
            replay.check()
            return step


def assert_recorded_experts(case: Case, step: Step) -> None:
    """Every token with a valid row went to the experts that its masks were made from."""
    for ordinal, layer in enumerate(case.moe_layers):
        for microbatch in microbatches(case):
            found = step.maps[layer, microbatch.index]
            recorded = list(microbatch.recorded(ordinal))
            assert recorded
            wrong = {
                place: (found[place].nonzero().flatten().tolist(), experts)
                for place, experts in recorded
                if found[place].nonzero().flatten().tolist() != experts
            }
            assert not wrong, f"decoder layer {layer}, microbatch {microbatch.index}: (dispatched, recorded) {wrong}"
