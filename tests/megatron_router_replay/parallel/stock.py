"""Megatron's own RouterReplay in the same step as ours, driven as its guide says, and the same mistakes made with both.

The guide is docs/api-guide/router_replay.md of Megatron-LM: build with `moe_enable_routing_replay`, hand out one tensor
of experts per router by `RouterReplay.set_replay_data`, set REPLAY_FORWARD around the forward pass and REPLAY_BACKWARD
for recomputes, clear everything at the end. It says nothing of rows that are missing, nor of which rows a rank needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor, nn

from megatron_router_replay import attach
from router_replay.masks.masks import RoutingMasks
from tests.megatron_router_replay.parallel.cases import Case
from tests.megatron_router_replay.parallel.data import Microbatch, geometry, microbatches, places
from tests.megatron_router_replay.parallel.model import build_chunks
from tests.megatron_router_replay.parallel.training import Around, RankStep, parallel_layout, train_step

Mistake = Literal[
    "",
    "around the schedule",
    "next microbatch",
    "[B, S] order",
    "end to end",
    "without REPLAY_BACKWARD",
    "another model",
]


@dataclass(frozen=True)
class Use:
    """How a step is replayed.

    Attributes:
        by: "guide": Megatron's, by its global functions, each router of the rank in the order in which they were built,
            with the rows of the whole microbatch. "hand": Megatron's, router by router of the chunk that runs, with
            this rank's rows cut out by whoever knows how, which the guide does not say. "ours".
        missing: what stands in Megatron's tensors where the rollout has no row. None: it has one for every token but
            the last of each sequence.
        mistake: what the user does wrong, or does as comes naturally.
    """

    by: Literal["guide", "hand", "ours"]
    missing: Literal["0..K-1", "-1"] | None = None
    mistake: Mistake = ""


def step(case: Case, use: Use) -> RankStep:
    """Build this rank's model in an existing world, and train one step with replay."""
    with parallel_layout(case), _fused_kernel():
        return _ours(case, use) if use.by == "ours" else _stock(case, use)


def attempt(case: Case, use: Use) -> RankStep | str:
    """The step, or the exception with which it ends on this rank."""
    try:
        return step(case, use)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def given(microbatch: Microbatch, use: Use) -> Microbatch:
    """The microbatch with masks as the rollout has them."""
    if use.missing is not None:
        return microbatch
    tokens = microbatch.layout.by_sequence(microbatch.layout.token_ids)
    masks = [
        RoutingMasks.from_indices(
            indices,
            torch.ones(len(indices), dtype=torch.bool),
            start=0,
            geometry=one.geometry,
            codec=one.codec,
            token_ids=token_ids,
        )
        for indices, one, token_ids in zip(microbatch.indices, microbatch.masks, tokens, strict=True)
    ]
    return dataclasses.replace(microbatch, masks=masks)


def _ours(case: Case, use: Use) -> RankStep:
    batches = [given(microbatch, use) for microbatch in microbatches(case)]
    chunks = build_chunks(case)
    with attach(chunks, geometry(case), context_order=case.context_order, overlap_every=None) as replay:

        def around(microbatch: Microbatch, chunk: nn.Module) -> AbstractContextManager[Any]:
            bound = batches[_bound(microbatch.index, case, use)]
            return replay.microbatch(bound.masks, bound.layout)

        if use.mistake == "around the schedule":
            with replay.microbatch(batches[0].masks, batches[0].layout):
                return train_step(case, chunks)
        seen = train_step(case, chunks, around)
        replay.check()
        return seen


def _stock(case: Case, use: Use) -> RankStep:
    config = (*case.config, ("moe_enable_routing_replay", True))
    case = dataclasses.replace(case, config=config)
    batches = [given(microbatch, use) for microbatch in microbatches(case)]
    try:
        if use.mistake == "another model":
            build_chunks(case)
        chunks = build_chunks(case)
        around: Around | None = _around(case, use, batches, chunks)
        if use.mistake == "around the schedule":
            # The same in every pass, for whoever sets it once.
            _set_all(case, use, batches[0], chunks)
            around = None
        return train_step(case, chunks, around)
    finally:
        RouterReplay.clear_global_indices()
        RouterReplay.clear_global_router_replay_action()
        RouterReplay.clear_global_router_replay_instances()


def _around(case: Case, use: Use, batches: list[Microbatch], chunks: list[nn.Module]) -> Around:
    @contextlib.contextmanager
    def around(microbatch: Microbatch, chunk: nn.Module) -> Iterator[None]:
        bound = batches[_bound(microbatch.index, case, use)]
        backward = "FORWARD" if use.mistake == "without REPLAY_BACKWARD" else "BACKWARD"
        after = RouterReplayAction[f"REPLAY_{backward}"]
        if use.by == "guide":
            _set_all(case, use, bound, chunks)
            yield
            RouterReplay.set_global_router_replay_action(after)
            return
        own = places(
            case, bound, parallel_state.get_context_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        )
        mine = _routers(chunk)
        for layer, router in mine.items():
            router.set_target_indices(stock_table(case, use, bound, layer)[own])
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for router in mine.values():
            router.set_router_replay_action(after)

    return around


def _set_all(case: Case, use: Use, microbatch: Microbatch, chunks: list[nn.Module]) -> None:
    layers = [layer for chunk in chunks for layer in _routers(chunk)]
    RouterReplay.set_replay_data([stock_table(case, use, microbatch, layer) for layer in layers])
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)


def _routers(chunk: nn.Module) -> dict[int, RouterReplay]:
    """What a rollout has routes for: the decoder's routers by 0-based layer, in the order in which they were built."""
    routers = [module.router for module in chunk.modules() if isinstance(module, MoELayer)]
    return {router.layer_number - 1: router.router_replay for router in routers if not router.is_mtp_layer}


def stock_table(case: Case, use: Use, microbatch: Microbatch, layer: int) -> Tensor:
    """Experts of one router, `int64 [S * B, K]`, for all places of the microbatch."""
    recorded = list(microbatch.recorded(case.moe_layers.index(layer)))
    if use.mistake == "end to end":
        return torch.tensor([experts for _, experts in recorded])
    length, batch = microbatch.token_ids.shape[1], microbatch.token_ids.shape[0]
    # Distinct, since the all-to-all dispatcher counts K experts for each place; so slime and miles fill, too.
    filler = torch.full((case.top_k,), -1) if use.missing == "-1" else torch.arange(case.top_k)
    table = filler.repeat(length * batch, 1)
    if recorded:
        table[[place for place, _ in recorded]] = torch.tensor([experts for _, experts in recorded])
    if use.mistake == "[B, S] order":
        table = table.view(length, batch, case.top_k).transpose(0, 1).reshape(-1, case.top_k)
    return table


def _bound(index: int, case: Case, use: Use) -> int:
    return (index + (use.mistake == "next microbatch")) % case.num_microbatches


@contextlib.contextmanager
def _fused_kernel() -> Iterator[None]:
    """What stands in for Transformer Engine's fused router: the same formula, and like it no place for a replay."""

    def fused(logits: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        return moe_utils.topk_routing_with_score_function(logits, fused=False, **settings)

    with (
        mock.patch.object(moe_utils, "HAVE_TE", True),
        mock.patch.object(moe_utils, "fused_topk_with_score_function", fused),
    ):
        yield
