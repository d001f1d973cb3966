"""The trainer's own routes: bound again on the same rank, or joined from the parts of many."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from router_replay.errors import CallOrderError, InputError, PairingError
from router_replay.masks import RoutingGeometry
from router_replay.replay import BatchLayout, RouteRecorder, join_parts
from router_replay.replay.shards import Shards
from tests.router_replay.replay.batches import padded

GEOMETRY = RoutingGeometry(num_layers=5, moe_layers=(1, 2, 4), num_experts=37, top_k=3)
CPU = torch.device("cpu")
LENGTHS = [7, 4]


def ids(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 1000, (length,), generator=generator) for length in LENGTHS]


def chosen(layout: BatchLayout, layer: int) -> Tensor:
    """Experts `[places, 3]` that say which token and layer they are of."""
    first = layout.sequence * 7 + layout.position + layer
    return (first[:, None] + torch.tensor([5, 0, 11])) % 37


def recorder(layers: tuple[int, ...], shards: Shards, layout: BatchLayout) -> RouteRecorder:
    here = shards.routed(layout)
    one = RouteRecorder(here, shards.called(layout), GEOMETRY, CPU, 17)
    for layer in layers:
        one.record(layer, chosen(here, layer))
    one.finish()
    return one


@pytest.mark.parametrize("order", ["zigzag", "contiguous"])
def test_parts_of_all_ranks_and_stages_join_to_the_masks_of_whole_sequences(order):
    layout = padded(ids(), width=8)
    parts = [
        recorder(layers, Shards(2, context, order, 2, sequence), layout).part()
        for layers in ((4,), (1, 2))
        for context in range(2)
        for sequence in range(2)
    ]
    masks = join_parts(reversed(parts))
    assert [one.num_tokens for one in masks] == LENGTHS
    for sequence, (one, token_ids) in enumerate(zip(masks, ids(), strict=True)):
        one.check_tokens(token_ids)
        assert one.valid.all()
        for position in range(LENGTHS[sequence]):
            for index, layer in enumerate(GEOMETRY.moe_layers):
                first = sequence * 7 + position + layer
                assert one.indices()[position, index].tolist() == [(first + each) % 37 for each in (5, 0, 11)]


def test_tokens_and_layers_that_no_part_has_are_not_valid():
    layout = padded(ids(), width=8)
    halves = [recorder(layers, Shards(2, 0), layout).part() for layers in ((1, 2), (4,))]
    masks = join_parts(halves)
    # Rank 0 of two has the first and the last quarter of the 8 steps.
    assert [one.valid.int().tolist() for one in masks] == [[1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0]]
    assert not any(one.valid.any() for one in join_parts(halves[:1]))


def test_a_recording_is_bound_as_it_is():
    layout = padded(ids())
    routes = recorder((1, 4), Shards(), layout).routes
    assert routes.num_native == 0 and routes.num_places == 14 and routes.source == "recorded"
    for layer in (1, 4):
        assert torch.equal(routes.experts(layer).long(), chosen(layout, layer))
    with pytest.raises(PairingError, match="decoder layer 2 has no routes here"):
        routes.experts(2)


def test_what_cannot_be_joined():
    layout, other = padded(ids()), padded(ids(seed=1))
    for nothing in ([], None, ["a part"]):
        with pytest.raises(InputError, match="no parts to join"):
            join_parts(nothing)
    mine, theirs = (recorder((1,), Shards(), each).part() for each in (layout, other))
    with pytest.raises(PairingError, match="part 1 is of other sequences than part 0"):
        join_parts([mine, theirs])


def test_what_cannot_be_recorded():
    layout = padded(ids())
    one = RouteRecorder(layout, layout, GEOMETRY, CPU, 0)
    with pytest.raises(CallOrderError, match="nothing is recorded yet"):
        one.part()
    with pytest.raises(PairingError, match="got 13 places, the layout that is recorded has 14"):
        one.record(1, chosen(layout, 1)[1:])


def test_a_chunk_without_moe_layers_records_nothing():
    layout = padded(ids())
    empty = recorder((), Shards(), layout)
    assert empty.routes.num_places == 14 and empty.part().layers == ()
    with pytest.raises(PairingError, match="do not fit"):
        empty.routes.experts(1)
    whole = [empty.part(), recorder((1, 2, 4), Shards(), layout).part()]
    assert all(one.valid.all() for one in join_parts(whole))
