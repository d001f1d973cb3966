"""Sequences as a server has them, and what the routers of slime and miles have to take of their packs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.masks.stores.inline import InlineStore
from router_replay_adapters.native_rows import FORWARD, RECOMPUTE
from router_replay_adapters.packed_queues import PackedLayer
from tests.router_replay_adapters.routers import HIDDEN, NUM_EXPERTS, TOP_K, experts_of, own_experts, router
from tests.router_replay_adapters.stacks_here import StackHere

NUM_LAYERS = 4
MOE_LAYERS = (1, 2, 3)
GEOMETRY = RoutingGeometry(NUM_LAYERS, MOE_LAYERS, NUM_EXPERTS, TOP_K)
MULTIPLE = 8
"""Of which a pack's places are a multiple on each tensor-parallel rank."""


@dataclass
class Recorded:
    """A sequence as the server has it.

    Attributes:
        tokens: `[n]`, of which no id is twice in a test.
        experts: `int64 [n - 1, MoE layers, K]`.
        valid: `bool [n - 1]`.
    """

    tokens: list[int]
    experts: Tensor
    valid: Tensor

    def masks(self, start: int = 0, end: int | None = None, **changes: Any) -> RoutingMasks:
        rows = slice(start, len(self.tokens) - 1 if end is None else end)
        fields = {"geometry": GEOMETRY, "token_ids": self.tokens, "codec": "rank", **changes}
        return RoutingMasks.from_indices(self.experts[rows], self.valid[rows], start=start, **fields)

    def meta_info(self, start: int = 0, end: int | None = None) -> dict[str, Any]:
        return meta_info(self.masks(start, end))


def meta_info(masks: RoutingMasks, finish: str = "stop") -> dict[str, Any]:
    """What an answer of a server in format `masks` says, as far as stacks read it."""
    return {"finish_reason": {"type": finish}, "routing_masks": [InlineStore().put(masks)]}


def recorded(length: int, first_token: int = 0, *, all_valid: bool = False) -> Recorded:
    generator = torch.Generator().manual_seed(1000 * first_token + length)
    experts = torch.rand(length - 1, len(MOE_LAYERS), NUM_EXPERTS, generator=generator).argsort(-1)[..., :TOP_K]
    valid = (torch.arange(length - 1) % 3 != 1) | all_valid
    return Recorded(list(range(first_token, first_token + length)), experts, valid)


BATCH = [recorded(9, 100), recorded(6, 200), recorded(13, 300), recorded(2, 400, all_valid=True)]


_LAYERS = {
    "num_layers": NUM_LAYERS,
    "moe_layer_freq": [0, 1, 1, 1],
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
}
MODEL = [SimpleNamespace(module=SimpleNamespace(config=SimpleNamespace(**_LAYERS)))]
"""A rank's model, as far as Megatron's own functions read which layers it has."""


def states_of(num_places: int) -> Tensor:
    return torch.randn(num_places, 1, HIDDEN, generator=torch.Generator().manual_seed(5))


def places_of(batch: Sequence[Recorded], args: dict[str, Any], context: int, rank: int, tensor: int = 1) -> list[int]:
    """Token ids of this rank's places in the packs of both stacks, -1 for padding and the last token of a sequence."""
    multiple = args.get("data_pad_size_multiplier", MULTIPLE) * tensor
    ids = [[*one.tokens[:-1], -1] for one in batch]
    if args.get("allgather_cp"):
        whole = list(itertools.chain.from_iterable(ids))
        whole += [-1] * (-len(whole) % (multiple * context))
        share = len(whole) // context
        return whole[rank * share : (rank + 1) * share]
    mine = []
    for one in ids:
        part = -(-len(one) // (2 * context)) if context > 1 else len(one)
        padded = one + [-1] * (2 * context * part - len(one)) if context > 1 else one
        if context > 1:
            last = 2 * context - 1 - rank
            mine += padded[rank * part : (rank + 1) * part] + padded[last * part : (last + 1) * part]
        else:
            mine += padded
    return mine + [-1] * (-len(mine) % multiple)


def expected_experts(
    batch: Sequence[Recorded], ids: list[int], layer: int, own: list[set[int]]
) -> list[set[int] | None]:
    """Of each place; None where nothing reads what comes out of it."""
    by_token = {
        token: set(one.experts[row, layer].tolist()) if one.valid[row] else None
        for one in batch
        for row, token in enumerate(one.tokens[:-1])
    }
    return [None if token < 0 else by_token[token] or own[place] for place, token in enumerate(ids)]


def require_experts(found: list[set[int]], expected: list[set[int] | None]) -> None:
    assert len(found) == len(expected)
    assert all(len(each) == TOP_K for each in found)
    for place, (there, wanted) in enumerate(zip(found, expected, strict=True)):
        assert wanted is None or there == wanted, f"place {place}"


LAYOUTS = {
    "one rank": (1, 1, {}),
    "padding": (1, 1, {"data_pad_size_multiplier": 16}),
    "context parallel": (2, 1, {}),
    "context parallel, contiguous": (2, 1, {"allgather_cp": True}),
    "sequence parallel": (1, 2, {"sequence_parallel": True}),
    "both": (2, 2, {"sequence_parallel": True}),
}


def routers_of(stack: StackHere) -> list[TopKRouter]:
    """A router for each MoE layer, with a queue of the stack."""
    made = []
    for seed in MOE_LAYERS:
        one = router(stack.topk)
        stack.register(one)
        with torch.no_grad():
            one.weight.copy_(torch.randn(one.weight.shape, generator=torch.Generator().manual_seed(seed)))
        made.append(one)
    return made


def require_a_step(
    stack: StackHere, routers: list[TopKRouter], fill: Callable[[list[list[int]]], None], queues: Iterable[Any]
) -> None:
    """Two microbatches of `BATCH`: a pass by older weights, then forward passes that overlap, and their recomputes.

    Args:
        fill: puts the routes of `BATCH` into the queues, by microbatches of sequences.
        queues: of the routers.
    """
    microbatches = [[2, 0], [1, 3]]
    fill(microbatches)
    batches = [[BATCH[index] for index in picked] for picked in microbatches]
    ids = [places_of(batch, {}, 1, 0) for batch in batches]
    inputs = [states_of(len(each)) for each in ids]
    own = [[own_experts(one, states) for one in routers] for states in inputs]

    def run() -> list[list[list[set[int]]]]:
        return [[experts_of(one(states)[1]) for one in routers] for states in inputs]

    def other_weights() -> None:
        with torch.no_grad():
            for one in routers:
                one.weight.neg_()

    stack.set_stage(FORWARD)
    other_weights()
    run()
    other_weights()
    for queue in queues:
        queue.forward_index = 0
    forward = run()
    for batch, of_places, native, of_layers in zip(batches, ids, own, forward, strict=True):
        for layer, found in enumerate(of_layers):
            wanted = expected_experts(batch, of_places, layer, native[layer])
            require_experts(found, wanted)
            assert any(each == native[layer][place] for place, each in enumerate(wanted)), "no row is native here"
    stack.set_stage(RECOMPUTE)
    other_weights()
    assert run() == forward
    assert [(each.forward_index, each.backward_index) for each in queues] == [(2, 2)] * len(MOE_LAYERS)


def require_rows(layers: Sequence[PackedLayer], ids: list[int]) -> None:
    """What the queues hold of a microbatch of all of `BATCH`, on a rank with the tokens `ids` in its places."""
    for layer, recorded_layer in enumerate(layers):
        assert recorded_layer.shape == (len(ids), TOP_K)
        wanted = expected_experts(BATCH, ids, layer, [set()] * len(ids))
        native = [place for place, each in enumerate(wanted) if each == set()]
        assert recorded_layer.native_places.tolist() == native
        found = [set(row) for row in recorded_layer.experts().tolist()]
        require_experts(found, [None if place in native else each for place, each in enumerate(wanted)])
