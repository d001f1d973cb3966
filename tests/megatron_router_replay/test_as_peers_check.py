"""What Megatron-LM, slime, miles and verl check of their own replays, asked of this one.

Megatron-LM: tests/unit_tests/transformer/moe/test_router_replay.py. slime: `RoutingReplay.assert_all_consumed`. miles:
`check_replay_result` and its tests. verl: the tests of router_replay_utils. Each is said anew in this package's terms.
"""

from __future__ import annotations

import re

import pytest
import torch

from cpu_engines.megatron.logprobs import forward_logits, token_logprobs
from megatron_router_replay import attach
from router_replay.errors import CallOrderError, PairingError
from router_replay.masks import RoutingGeometry, RoutingMasks
from router_replay.replay.record import join_parts
from tests.megatron_router_replay.batches import dispatched_maps, experts_of, gradients, random_batch

FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SCORES = {
    "softmax of the chosen": ({}, lambda logits, chosen: logits.gather(1, chosen).softmax(-1)),
    "chosen of the softmax": (
        {"moe_router_pre_softmax": True},
        lambda logits, chosen: logits.softmax(-1).gather(1, chosen),
    ),
}


def _routers(model):
    return {i: layer.mlp.router for i, layer in enumerate(model.decoder.layers) if hasattr(layer.mlp, "router")}


def _hidden(batch, seed=0):
    width, count = batch.token_ids.shape[1], len(batch.lengths)
    return torch.randn(width, count, 48, generator=torch.Generator().manual_seed(seed))


def _own_masks(model, batch):
    """Masks of the choice that the model makes itself."""
    with attach(model, overlap_every=None) as replay, replay.record(batch.layout) as recorder:
        forward_logits(model, batch.token_ids)
    return join_parts([recorder.part()])


# --- Megatron-LM ----------------------------------------------------------------------------------------------------


def test_recorded_are_the_largest_scores_and_replayed_again_they_are_dispatched(build_model, batch):
    model, hidden = build_model(), _hidden(batch)
    logits = {layer: router.gating(hidden).flatten(0, 1) for layer, router in _routers(model).items()}
    with attach(model, overlap_every=None) as replay:
        with replay.record(batch.layout) as recorder:
            native = {layer: router(hidden)[1] for layer, router in _routers(model).items()}
        part = recorder.part()
        with replay.microbatch(recorder.routes):
            again = {layer: router(-hidden)[1] for layer, router in _routers(model).items()}
    masks = join_parts([part])
    for ordinal, layer in enumerate(native):
        largest = logits[layer].topk(4).indices.sort(-1).values
        assert torch.equal(native[layer].nonzero()[:, 1].view(-1, 4), largest)
        assert torch.equal(again[layer], native[layer])
        for sequence, one in enumerate(masks):
            experts = one.indices()[:, ordinal].sort(-1).values
            places = [batch.place(sequence, position) for position in range(len(experts))]
            assert torch.equal(experts.long(), largest[places])


@pytest.mark.parametrize("scores", SCORES)
def test_gates_of_replayed_experts(build_model, batch, scores):
    settings, gates_of = SCORES[scores]
    model, hidden = build_model(**settings), _hidden(batch)
    with attach(model, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        found = {layer: router(hidden) for layer, router in _routers(model).items()}
    for layer, router in _routers(model).items():
        logits, (gates, routing_map) = router.gating(hidden).flatten(0, 1), found[layer]
        assert (routing_map.sum(-1) == 4).all()
        recorded = dict(batch.recorded(layer))
        chosen = torch.tensor([sorted(experts) for experts in recorded.values()])
        of_places = list(recorded)
        assert torch.equal(gates[of_places].gather(1, chosen), gates_of(logits[of_places], chosen))
        assert torch.equal(gates != 0, routing_map)


def test_routes_are_those_of_their_block_and_nothing_is_kept_behind_it(build_model, batch):
    """Setting and clearing what is replayed, and how: a binding begins and ends with its block."""
    model, other = build_model(), random_batch(batch.geometry, batch.lengths, seed=9)
    other.token_ids.copy_(batch.token_ids)
    others = [
        RoutingMasks.from_indices(
            indices, one.valid, start=0, geometry=one.geometry, codec="bitset", token_ids=batch.token_ids[i, :n]
        )
        for i, (indices, one, n) in enumerate(zip(other.indices, other.masks, batch.lengths, strict=True))
    ]
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        for masks in (batch.masks, None, others, batch.masks):
            with replay.off() if masks is None else replay.microbatch(masks, batch.layout):
                forward_logits(model, batch.token_ids)
        with pytest.raises(CallOrderError, match="this forward pass has no masks"):
            forward_logits(model, batch.token_ids)
    with dispatched_maps(model) as stock:
        forward_logits(model, batch.token_ids)
    for layer, (first, native, second, third) in maps.items():
        assert torch.equal(native, stock[layer][0])
        assert torch.equal(first, third)
        assert {place: experts_of(first, place) for place, _ in batch.recorded(layer)} == dict(batch.recorded(layer))
        assert {place: experts_of(second, place) for place, _ in other.recorded(layer)} == dict(other.recorded(layer))


@pytest.mark.parametrize("moe_layers", [(1, 2), (0, 1, 2, 3)], ids=["a layer short", "a layer more"])
def test_another_number_of_layers(build_model, batch, moe_layers):
    geometry = RoutingGeometry(num_layers=4, moe_layers=moe_layers, num_experts=16, top_k=4)
    wrong = random_batch(geometry, batch.lengths, seed=1)
    with attach(build_model()) as replay, pytest.raises(PairingError, match="layers"):
        replay.place(wrong.masks, wrong.layout)


# --- slime ----------------------------------------------------------------------------------------------------------


def test_all_of_a_binding_is_used_exactly_once(build_model, batch):
    """Of a queue it is counted at the end of a step what is left; of a binding at the end of its block."""
    model = build_model()
    layers, hidden = _routers(model), _hidden(batch)
    with attach(model, overlap_every=None) as replay:
        routes = replay.place(batch.masks, batch.layout)

        def run(block, asked):
            with block:
                for layer in asked:
                    layers[layer](hidden)

        with pytest.raises(CallOrderError, match="no router asked for its experts inside this block"):
            run(replay.microbatch(routes), ())
        with pytest.raises(CallOrderError, match=re.escape("decoder layers [2] did not ask for their experts")):
            run(replay.microbatch(routes), (1, 3))
        with pytest.raises(CallOrderError, match="decoder layer 1 routes a second forward pass"):
            run(replay.microbatch(routes), (1, 2, 3, 1))
        with pytest.raises(CallOrderError, match=re.escape("decoder layers [2, 3] did not ask")):
            run(replay.record(batch.layout), (1,))
        run(replay.microbatch(routes), (1, 2, 3))


def test_a_backward_pass_that_never_runs_shifts_no_other(build_model, geometry):
    """Forward 3, backward 2: recomputes fed from a queue would each take the experts of the pass before."""
    batches = [random_batch(geometry, (7, 5), seed=seed, invalid=0) for seed in range(3)]
    model, alone = build_model(**FULL_RECOMPUTE), build_model()
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        losses = []
        for each in batches:
            with replay.microbatch(each.masks, each.layout):
                losses.append(token_logprobs(model, each.token_ids).sum())
        del losses[0]
        sum(losses).backward()
    with attach(alone, overlap_every=None) as replay:
        for each in batches[1:]:
            with replay.microbatch(each.masks, each.layout):
                loss = token_logprobs(alone, each.token_ids).sum()
            loss.backward()
    for layer, found in maps.items():
        assert len(found) == 5
        for number in (1, 2):
            recomputed = [each for each in found[3:] if torch.equal(each, found[number])]
            assert len(recomputed) == 1, f"layer {layer} recomputed microbatch {number} with other experts"
    found, expected = gradients(model), gradients(alone)
    assert found.keys() == expected.keys()
    # The sum of two numbers, in either order.
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


# --- miles ----------------------------------------------------------------------------------------------------------


def test_the_models_own_routes_pass_the_overlap_check(build_model, batch):
    model = build_model()
    masks = _own_masks(model, batch)
    with attach(model, overlap_every=1) as replay:
        with replay.microbatch(masks, batch.layout):
            forward_logits(model, batch.token_ids)
        replay.check()
        first, second = replay.metrics(), replay.metrics()
    assert first["overlap/rollout"] == 1 and {f"overlap/rollout/layer {layer}" for layer in (1, 2, 3)} <= first.keys()
    assert second == {}


def test_routes_that_hardly_overlap_are_an_error_and_a_few_are_not(build_model, geometry):
    """Padding and tokens without a row do not count; a part of the places may differ, as with another engine."""
    model, batch = build_model(), random_batch(geometry, (12, 9, 5), seed=1, codec="ordered", invalid=0)
    own = _own_masks(model, batch)
    with attach(model, overlap_every=1) as replay:
        # One sequence of three, 4 of 23 places, has nothing to do with the model's choice.
        with replay.microbatch([*own[:2], batch.masks[2]], batch.layout):
            forward_logits(model, batch.token_ids)
        replay.check()
        assert 0.5 < replay.metrics()["overlap/rollout"] < 1
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)
        assert replay.metrics()["overlap/rollout"] < 0.4
        with pytest.raises(PairingError, match="of their 4 experts with the trainer's own choice"):
            replay.check()


def test_places_without_a_row_are_neither_the_first_experts_nor_compared(build_model, geometry):
    """Where miles fills in experts 0 to K-1, a token takes its own choice here, and padding takes turns."""
    model, batch = build_model(), random_batch(geometry, (12, 9, 5), seed=1)
    with attach(model, overlap_every=1) as replay, dispatched_maps(model) as maps:
        with replay.off():
            forward_logits(model, batch.token_ids)
        with replay.microbatch([None, None, batch.masks[2]], batch.layout):
            forward_logits(model, batch.token_ids)
        found = replay.metrics()
    own, replayed = maps[1]
    native = [batch.place(sequence, position) for sequence, n in ((0, 12), (1, 9)) for position in range(n - 1)]
    assert torch.equal(own[native], replayed[native])
    padding = [batch.place(sequence, position) for sequence, n in ((1, 9), (2, 5)) for position in range(n, 12)]
    assert len({frozenset(experts_of(replayed, place)) for place in padding}) > 2
    # Nobody said that a sequence without masks ends in a token that was not fed back: its last one is native, too.
    counts = {cause: found[f"places/{cause}"] for cause in ("replayed", "padding", "native (no routes)")}
    assert counts == {"replayed": 3, "padding": len(padding) + 1, "native (no routes)": len(native) + 2}, found


# --- verl -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [0, 1, 2, 5])
def test_rows_of_a_sequence_are_as_many_as_its_tokens_or_one_less(build_model, geometry, missing):
    token_ids = torch.arange(9)[None] * 7 % 96
    batch = random_batch(geometry, (10,), seed=3, invalid=0)
    indices = batch.indices[0][: 9 - missing]
    masks = RoutingMasks.from_indices(
        indices,
        torch.ones(len(indices), dtype=torch.bool),
        start=0,
        geometry=geometry,
        codec="bitset",
        token_ids=token_ids[0],
    )
    layout = type(batch.layout).padded(token_ids, (9,))
    with attach(build_model(), overlap_every=None) as replay:
        if missing > 1:
            with pytest.raises(PairingError):
                replay.place([masks], layout)
        routes = replay.place([masks], layout, partial=missing > 1)
    assert routes.num_replayed == min(9 - missing, 9)


def test_what_the_last_token_takes_changes_nothing_that_is_read(build_model, geometry):
    """The trainer's own top-k, which verl leaves it to, would do as well: nothing reads what it computes."""
    batch = random_batch(geometry, (9, 9), seed=4, invalid=0)
    model = build_model(dtype=torch.float64)
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        with replay.microbatch(batch.masks, batch.layout):
            found = token_logprobs(model, batch.token_ids)
        with replay.observe() as observed, replay.off():
            forward_logits(model, batch.token_ids)
        last = [one[-1:] for one in observed.indices(batch.layout)]
        whole = [
            RoutingMasks.from_indices(
                torch.cat([indices, own]),
                torch.ones(9, dtype=torch.bool),
                start=0,
                geometry=geometry,
                codec="bitset",
                token_ids=token_ids,
            )
            for indices, own, token_ids in zip(batch.indices, last, batch.token_ids, strict=True)
        ]
        with replay.microbatch(whole, batch.layout):
            with_own = token_logprobs(model, batch.token_ids)
    ends = [batch.place(sequence, 8) for sequence in (0, 1)]
    assert any(not torch.equal(of_layer[0][ends], of_layer[2][ends]) for of_layer in maps.values())
    # Experts get other numbers of places, which reorders sums of at most 80 terms in each of the 8 products on the
    # longest path of each of the 4 layers; log-probabilities are below 8 nats.
    assert torch.allclose(found, with_own, rtol=0, atol=80 * 8 * 4 * torch.finfo(torch.float64).eps)


def test_the_attached_model_alone_is_reached(build_model, batch):
    """Models that are built and thrown away, or kept as a reference, are in no list that routes could be lost in."""
    thrown_away = build_model(moe_enable_routing_replay=True)
    model, reference = (build_model(moe_enable_routing_replay=True) for _ in range(2))
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps, dispatched_maps(reference) as own:
        with replay.microbatch(batch.masks, batch.layout):
            forward_logits(model, batch.token_ids)
            forward_logits(reference, batch.token_ids)
        with replay.off():
            forward_logits(model, batch.token_ids)
        assert all(type(router.router_replay).__name__ == "RouterReplay" for router in _routers(thrown_away).values())
    for layer, (replayed, native) in maps.items():
        assert {place: experts_of(replayed, place) for place, _ in batch.recorded(layer)} == dict(batch.recorded(layer))
        assert torch.equal(own[layer][0], native)


def test_layers_are_found_by_their_number_past_dense_ones(build_model, geometry):
    """Every layer has experts of its own, so that a shift by one, or an ordinal for a number, is seen."""
    token_ids = torch.arange(8)[None] % 96
    experts = torch.stack([torch.arange(4) + 4 * ordinal for ordinal in range(3)])
    masks = RoutingMasks.from_indices(
        experts.expand(7, 3, 4),
        torch.ones(7, dtype=torch.bool),
        start=0,
        geometry=geometry,
        codec="bitset",
        token_ids=token_ids[0],
    )
    model = build_model()
    layout = random_batch(geometry, (8,), seed=0).layout.padded(token_ids, (8,))
    with (
        attach(model, overlap_every=None) as replay,
        dispatched_maps(model) as maps,
        replay.microbatch([masks], layout),
    ):
        forward_logits(model, token_ids)
    assert {layer: experts_of(found[0], 3) for layer, found in maps.items()} == {
        1: {0, 1, 2, 3},
        2: {4, 5, 6, 7},
        3: {8, 9, 10, 11},
    }


def test_an_error_in_a_pass_leaves_no_routes_for_the_next(build_model, batch):
    model = build_model()
    with attach(model, overlap_every=None) as replay, dispatched_maps(model) as maps:
        with pytest.raises(RuntimeError, match="forward failed"), replay.microbatch(batch.masks, batch.layout):
            raise RuntimeError("forward failed")
        with replay.off():
            forward_logits(model, batch.token_ids)
    with dispatched_maps(model) as stock:
        forward_logits(model, batch.token_ids)
    assert all(torch.equal(maps[layer][0], stock[layer][0]) for layer in stock)
