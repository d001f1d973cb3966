"""Training steps that verl's own utilities replay, on ranks of their own, as its Megatron engine drives them.

Runs in the rank processes of tests/megatron_router_replay/parallel, whose model, schedules and spies these are. Packs
are verl's: alignment padding behind each sequence, and no more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from megatron_router_replay import BatchLayout, attach
from tests.megatron_router_replay.batches import random_batch
from tests.megatron_router_replay.parallel import training
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import Microbatch, columns, geometry
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.training import RankStep, parallel_layout, train_step

# Of one total with any alignment: a pipeline on gloo has messages of one shape.
LENGTHS = ((9, 7, 3), (3, 9, 7), (7, 3, 9), (9, 3, 7))


@dataclass
class VerlStep:
    """What one rank saw of a step.

    Attributes:
        step: as of the harness.
        chosen: experts that the replay answered with, `int64 [rows, K]`, by (decoder layer, microbatch).
        native: those that the router would have chosen.
    """

    step: RankStep
    chosen: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    native: dict[tuple[int, int], Tensor] = field(default_factory=dict)


def microbatches(case: Case) -> list[Microbatch]:
    """Packs of random sequences, a third of whose rows are not valid."""
    return [_microbatch(case, index) for index in range(case.num_microbatches)]


def _microbatch(case: Case, index: int) -> Microbatch:
    lengths = LENGTHS[index % len(LENGTHS)]
    batch = random_batch(geometry(case), lengths, seed=index)
    alignment = case.tp * case.cp * (2 if case.cp > 1 else 1)
    rooms = [-(-length // alignment) * alignment for length in lengths]
    bounds = (0, *itertools.accumulate(rooms))
    generator = torch.Generator().manual_seed(1000 + index)
    ids, labels, positions = (torch.zeros(1, bounds[-1], dtype=torch.int64) for _ in range(3))
    weights = torch.zeros(1, bounds[-1], dtype=torch.float64)
    for row, (start, length) in enumerate(zip(bounds, lengths, strict=False)):
        ids[0, start : start + length] = batch.token_ids[row, :length]
        labels[0, start : start + length - 1] = batch.token_ids[row, 1:length]
        positions[0, start : start + rooms[row]] = torch.arange(rooms[row])
        weights[0, start : start + length - 1] = torch.randn(length - 1, generator=generator, dtype=torch.float64)
    layout = BatchLayout.packed(ids, bounds, lengths)
    mtp_mask = torch.zeros_like(weights)
    return Microbatch(index, ids, labels, positions, weights, mtp_mask, bounds, batch.masks, batch.indices, layout)


def routed_experts(case: Case, microbatch: Microbatch, missing: int = -1) -> Tensor:
    """What verl's batch has, jagged `int16 [sequences, tokens, decoder layers, K]`.

    Zeros in dense layers, and `missing` in MoE layers of rows that are not valid or not there.
    """
    parts = []
    for masks, indices, length in zip(microbatch.masks, microbatch.indices, _lengths(microbatch), strict=True):
        routes = torch.zeros(length, case.num_layers, case.top_k, dtype=torch.int16)
        known = torch.full((length, len(case.moe_layers), case.top_k), missing, dtype=torch.int16)
        known[: len(indices)][masks.valid] = indices[masks.valid].to(torch.int16)
        routes[:, list(case.moe_layers)] = known
        parts.append(routes)
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def input_ids(microbatch: Microbatch) -> Tensor:
    """What verl's batch has, jagged `int64 [sequences, tokens]`."""
    assert microbatch.bounds is not None
    starts = zip(microbatch.bounds, _lengths(microbatch), strict=False)
    parts = [microbatch.token_ids[0, start : start + length] for start, length in starts]
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


def _lengths(microbatch: Microbatch) -> list[int]:
    # A rollout has no row of the last token.
    return [masks.num_tokens + 1 for masks in microbatch.masks]


def verl_step(case: Case, adapted: bool = True, missing: int = -1) -> VerlStep:
    """Build this rank's model in an existing world, and train one step that verl replays.

    Args:
        adapted: with the adapter; its wrappers are taken out again for a step without it.
        missing: as of `routed_experts`.
    """
    import router_replay_adapters.verl  # noqa: F401 (wraps what is imported next)

    # isort: split
    from verl.utils.megatron import router_replay_utils as utils
    from verl.utils.megatron.router_replay_patch import RouterReplay, RouterReplayAction, apply_router_replay_patch

    apply_router_replay_patch()
    case = dataclasses.replace(case, config=(*case.config, ("moe_enable_routing_replay", True)))
    with contextlib.ExitStack() as stack:
        if not adapted:
            for name in ("set_target_indices", "get_replay_topk"):
                stock = getattr(RouterReplay, name).__wrapped__
                stack.enter_context(mock.patch.object(RouterReplay, name, stock))
        stack.enter_context(parallel_layout(case))
        stack.enter_context(mock.patch.object(training, "microbatches", microbatches))
        chunks = build_chunks(case)
        layer_of = {id(router): number - 1 for number, router in utils.iter_model_routers(chunks)}
        seen = VerlStep(RankStep(0, 0))
        now: list[int] = []
        stack.enter_context(
            mock.patch.object(RouterReplay, "get_replay_topk", _spied(RouterReplay, layer_of, now, seen))
        )

        @contextlib.contextmanager
        def around(microbatch: Microbatch, wrapped: nn.Module) -> Iterator[None]:
            chunk, ids = wrapped.module, input_ids(microbatch)
            _require_same_pack(case, microbatch, ids)
            utils.set_model_router_replay_action(chunk, RouterReplayAction.REPLAY_FORWARD)
            routes = utils.align_r3_router_replay_data(routed_experts(case, microbatch, missing), ids)
            mask = utils.build_r3_replay_mask(ids, torch.ones(len(microbatch.masks), 1))
            utils.set_router_replay_data(routes, None, chunk.config, replay_mask=mask, model=chunk)
            now.append(microbatch.index)
            yield
            now.pop()
            utils.set_model_router_replay_action(chunk, RouterReplayAction.REPLAY_BACKWARD)

        seen.step = train_step(case, chunks, around)
        assert all(not router.replay_backward_list for router in RouterReplay.router_instances) or not case.recompute
        RouterReplay.router_instances.clear()
    return seen


def our_step(case: Case) -> RankStep:
    """The same step replayed by `megatron_router_replay`, in a process that verl did not patch."""
    with parallel_layout(case), mock.patch.object(training, "microbatches", microbatches):
        chunks = build_chunks(case)
        with attach(chunks, geometry(case), overlap_every=None) as replay:

            def around(microbatch: Microbatch, chunk: nn.Module) -> AbstractContextManager[Any]:
                return replay.microbatch(microbatch.masks, microbatch.layout)

            step = train_step(case, chunks, around)
            replay.check()
            return step


def _spied(owner: type, layer_of: dict[int, int], now: list[int], seen: VerlStep) -> Any:
    inner = owner.get_replay_topk

    def get_replay_topk(router: Any, scores: Tensor, topk: int, **others: Any) -> tuple[Tensor, Tensor]:
        gates, indices = inner(router, scores, topk, **others)
        if now:
            choose = others.pop("default_compute_topk")
            key = layer_of[id(router)], now[0]
            seen.chosen[key] = indices.sort(-1).values
            seen.native[key] = choose(scores, topk, **others)[1].sort(-1).values
        return gates, indices

    return get_replay_topk


def _require_same_pack(case: Case, microbatch: Microbatch, ids: Tensor) -> None:
    from megatron.core import parallel_state
    from verl.models.mcore.util import preprocess_thd_engine

    packed, parameters, _ = preprocess_thd_engine(ids)
    own = columns(case, microbatch, parallel_state.get_context_parallel_rank())
    assert torch.equal(packed, microbatch.token_ids[:, own])
    assert parameters.cu_seqlens_q_padded.tolist() == list(microbatch.bounds or ())
