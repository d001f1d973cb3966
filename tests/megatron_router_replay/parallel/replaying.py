"""A training step in which every microbatch replays its masks, as a trainer's forward_step binds them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_router_replay import RecordedPart, RouteRecorder, attach
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


@dataclass
class RecordedStep:
    """A step whose routes were recorded in a native one before it, which another model with the same weights took.

    Attributes:
        step: of the model that replays.
        parts: what was recorded, by microbatch.
    """

    step: RankStep
    parts: dict[int, list[RecordedPart]]


def recorded_step(case: Case) -> RecordedStep:
    """Train one step natively and record it, then the same step of a model of its own, which replays the recording."""
    with parallel_layout(case):
        chunks = build_chunks(case)
        recorders: dict[tuple[int, int], RouteRecorder] = {}
        with attach(chunks, masks_geometry(case), context_order=case.context_order) as replay:

            @contextlib.contextmanager
            def recording(microbatch: Microbatch, chunk: nn.Module) -> Iterator[None]:
                with replay.record(microbatch.layout) as recorder:
                    yield
                recorders[microbatch.index, _number(chunks, chunk)] = recorder

            train_step(case, chunks, recording)
            replay.check()
        again = build_chunks(case)
        with attach(again, masks_geometry(case), context_order=case.context_order) as replay:

            def around(microbatch: Microbatch, chunk: nn.Module) -> AbstractContextManager[Any]:
                return replay.microbatch(recorders[microbatch.index, _number(again, chunk)].routes)

            step = train_step(case, again, around)
            replay.check()
            # The model's own routes are the model's own choice.
            assert {value for name, value in replay.metrics().items() if name.startswith("overlap")} <= {1.0}
    parts: dict[int, list[RecordedPart]] = {}
    for (index, _), recorder in recorders.items():
        parts.setdefault(index, []).append(recorder.part())
    return RecordedStep(step, parts)


def _number(chunks: list[nn.Module], chunk: nn.Module) -> int:
    return next(number for number, each in enumerate(chunks) if any(part is each for part in chunk.modules()))


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
