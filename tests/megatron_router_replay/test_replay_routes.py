"""Invariant: with replay, Megatron dispatches every recorded token to exactly its recorded experts."""

from __future__ import annotations

import pytest
import torch

from cpu_engines.megatron.logprobs import forward_logits, token_logprobs
from megatron_router_replay import BatchLayout, attach
from router_replay.masks.batch import RoutingMasksBatch
from router_replay.masks.masks import RoutingMasks
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, random_batch

SCORE_FUNCTIONS = {
    "softmax after top-k": {},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "groups": {"moe_router_pre_softmax": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2},
}


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
@pytest.mark.parametrize("scores", SCORE_FUNCTIONS)
def test_recorded_rows_are_dispatched_to_their_experts_and_others_natively(build_model, batch, dispatcher, scores):
    model = build_model(moe_token_dispatcher_type=dispatcher, **SCORE_FUNCTIONS[scores])
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        with replay.microbatch(batch.masks, batch.layout) as bound:
            forward_logits(model, batch.token_ids)
        native_by_hand = _native_choice_under_replay(model, replay, batch, scores)
    assert set(maps) == {1, 2, 3}
    for layer in maps:
        routing_map = maps[layer][0]
        assert (routing_map.sum(-1) == 4).all()
        recorded = dict(batch.recorded(layer))
        assert len(recorded) == bound.num_replayed > 8
        assert {place: experts_of(routing_map, place) for place in recorded} == recorded
        for place in batch.native():
            assert experts_of(routing_map, place) == native_by_hand[layer][place]
    assert bound.num_native == len(batch.native())
    assert bound.num_padding == len(batch.unread()) == 13


def _native_choice_under_replay(model, replay, batch, scores) -> dict[int, list[set[int]]]:
    """Top-k of the logits that each router computes while the microbatch is replayed, by torch.topk alone."""
    logits = {}
    handles = []
    for index, layer in enumerate(model.decoder.layers):
        if hasattr(layer.mlp, "router"):
            router = layer.mlp.router

            def keep(module, args, output, index=index):
                logits[index] = (args[0] @ module.weight.T).reshape(-1, 16).detach()

            handles.append(router.register_forward_hook(keep))
    with replay.microbatch(batch.masks, batch.layout):
        forward_logits(model, batch.token_ids)
    for handle in handles:
        handle.remove()
    if scores == "groups":
        logits = {layer: _best_groups_only(value) for layer, value in logits.items()}
    return {layer: [set(row) for row in value.topk(4).indices.tolist()] for layer, value in logits.items()}


def _best_groups_only(logits: torch.Tensor) -> torch.Tensor:
    """4 groups of 4 experts; the 2 groups whose best K/group_topk = 2 experts have the largest sum of probabilities."""
    grouped = logits.softmax(-1).view(-1, 4, 4)
    best = grouped.topk(2).values.sum(-1).topk(2).indices
    kept = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter(1, best, True)
    return logits.masked_fill(~kept.repeat_interleave(4, dim=1), float("-inf"))


def test_a_part_of_a_batch_of_masks_is_dispatched_as_a_list_of_them_is(build_model, geometry, batch):
    model, other = build_model(), random_batch(geometry, (6, 9), seed=4)
    whole = RoutingMasksBatch.of([*other.masks, *batch.masks])
    seen = []
    for masks in (batch.masks, whole[2:]):
        with (
            attach(model, overlap_every=None) as replay,
            dispatched_maps(model) as maps,
            replay.microbatch(masks, batch.layout),
        ):
            forward_logits(model, batch.token_ids)
        seen.append(maps)
    assert all(torch.equal(seen[0][layer][0], seen[1][layer][0]) for layer in (1, 2, 3))


@pytest.mark.parametrize("codec", ["bitset", "ordered"])
def test_codecs_carry_the_same_routes(build_model, geometry, codec):
    model, batch = build_model(), random_batch(geometry, (10, 7), seed=3, codec=codec, invalid=0.0)
    with (
        attach(model, overlap_every=None) as replay,
        dispatched_maps(model) as maps,
        replay.microbatch(batch.masks, batch.layout),
    ):
        forward_logits(model, batch.token_ids)
    for layer in maps:
        assert {place: experts_of(maps[layer][0], place) for place, _ in batch.recorded(layer)} == dict(
            batch.recorded(layer)
        )


def test_padding_loads_experts_evenly_and_with_distinct_experts(build_model, geometry):
    model, batch = build_model(), random_batch(geometry, (20, 6, 5, 5), seed=4)
    with (
        attach(model, overlap_every=None) as replay,
        dispatched_maps(model) as maps,
        replay.microbatch(batch.masks, batch.layout),
    ):
        forward_logits(model, batch.token_ids)
    # The last tokens of four sequences, and 44 places behind three of them: three times 16 experts.
    assert len(batch.unread()) == 48
    for layer in maps:
        load = maps[layer][0][batch.unread()].sum(0)
        assert load.tolist() == [12] * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_equals_padded(build_model, batch, dtype):
    model = build_model(dtype=dtype)
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout), replay.observe() as padded:
            from_padded = token_logprobs(model, batch.token_ids)
        with replay.microbatch(batch.masks, batch.packed_layout) as bound, replay.observe() as packed:
            from_packed = token_logprobs(model, batch.packed_ids, batch.cu_seqlens)
    # The last token of each sequence, which was not fed back, takes any experts.
    assert bound.num_padding == 3
    padded_routes, packed_routes = padded.indices(batch.layout), packed.indices(batch.packed_layout)
    for ours, theirs in zip(padded_routes, packed_routes, strict=True):
        assert torch.equal(ours[:-1], theirs[:-1])
    expected = torch.cat([from_padded[i, :n] for i, n in enumerate(batch.lengths)])
    # Same weights, same routes: only the shapes of the matrix products differ, which reorders sums of at most
    # n = 80 terms in each of the 8 products on the longest path of each of the 4 layers; log-probs are below 8 nats.
    tolerance = 80 * 8 * 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(from_packed[0], expected, rtol=0, atol=tolerance)


def test_packed_alignment_padding_gets_no_sequence_row(build_model, batch):
    """Sequences aligned to 8: the places behind each sequence are padding, its tokens route as without alignment."""
    model = build_model()
    aligned = [-(-n // 8) * 8 for n in batch.lengths]
    parts = [torch.zeros(room, dtype=torch.long) for room in aligned]
    for part, row, length in zip(parts, batch.token_ids, batch.lengths, strict=True):
        part[:length] = row[:length]
    ids = torch.cat(parts)
    bounds = torch.tensor([0, *aligned]).cumsum(0).to(torch.int32)
    layout = BatchLayout.packed(ids, bounds, lengths=batch.lengths)
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, layout) as bound, replay.observe() as observed:
            token_logprobs(model, ids[None], bounds)
        with replay.microbatch(batch.masks, batch.packed_layout), replay.observe() as plain:
            token_logprobs(model, batch.packed_ids, batch.cu_seqlens)
    assert bound.num_padding == sum(aligned) - sum(batch.lengths) + 3 == 17
    for ours, theirs in zip(observed.indices(layout), plain.indices(batch.packed_layout), strict=True):
        assert torch.equal(ours[:-1].sort(-1).values, theirs[:-1].sort(-1).values)


def test_off_routes_as_stock_megatron(build_model, batch):
    model = build_model()
    stock = forward_logits(model, batch.token_ids)
    with attach(model, overlap_every=None) as replay:
        with replay.off(), replay.observe() as observed:
            native = forward_logits(model, batch.token_ids)
        with replay.microbatch(batch.masks, batch.layout):
            replayed = forward_logits(model, batch.token_ids)
    assert torch.equal(native, stock)
    assert not torch.equal(replayed, stock)
    assert [tuple(routes.shape) for routes in observed.indices(batch.layout)] == [(12, 3, 4), (9, 3, 4), (5, 3, 4)]


def test_own_routes_replayed_change_nothing(build_model, batch, geometry):
    """R2: the trainer's own routes, observed and replayed, give the stock result bit for bit where order is kept."""
    model = build_model()
    ids, bounds, layout = batch.packed_ids, batch.cu_seqlens, batch.packed_layout
    with attach(model, overlap_every=None) as replay:
        with replay.off(), replay.observe() as observed:
            native = forward_logits(model, ids, bounds)
        masks = [
            RoutingMasks.from_indices(
                routes,
                torch.ones(len(routes), dtype=torch.bool),
                start=0,
                geometry=geometry,
                codec="ordered",
                token_ids=tokens,
            )
            for routes, tokens in zip(observed.indices(layout), layout.by_sequence(layout.token_ids), strict=True)
        ]
        with replay.microbatch(masks, layout) as bound:
            replayed = forward_logits(model, ids, bounds)
    assert bound.num_replayed == bound.num_places == 26
    assert torch.equal(replayed, native)


def test_two_replays_are_bound_apart(build_model, batch):
    policy, reference = build_model(), build_model()
    with (
        attach(policy, overlap_every=None) as first,
        attach(reference, overlap_every=None) as second,
        dispatched_maps(reference) as maps,
        first.microbatch(batch.masks, batch.layout),
        second.off(),
    ):
        forward_logits(policy, batch.token_ids)
        native = forward_logits(reference, batch.token_ids)
    assert torch.equal(native, forward_logits(reference, batch.token_ids))
    assert any(experts_of(maps[1][0], place) != experts for place, experts in batch.recorded(1))
