"""Invariant: with replay, every recorded token is computed by exactly its recorded experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers

from hf_router_replay import BatchLayout, FreshWeights, Shards, attach, join_parts
from router_replay.masks.batch import RoutingMasksBatch
from router_replay.masks.masks import RoutingMasks
from tests.hf_router_replay.small_models import (
    FAMILIES,
    PACKING,
    attention_mask,
    batch_of,
    build,
    computed_experts,
    geometry_of,
    logits_of,
    own_choice,
    router_outputs,
    wrong_rows,
)

families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_experts_are_the_recorded_ones(family):
    """And the trainer's own where nothing is recorded, by another way to choose them."""
    model, batch = build(family), batch_of(family)
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        router_outputs(model) as outputs,
        replay.microbatch(batch.masks, batch.layout) as bound,
    ):
        logits_of(model, batch)
    assert replay.layers == tuple(seen) == geometry_of(family).moe_layers
    assert replay.geometry == geometry_of(family)
    for layer, (experts,) in seen.items():
        recorded = dict(batch.recorded(layer))
        assert len(recorded) == bound.num_replayed > 8
        assert {place: set(experts[place].tolist()) for place in recorded} == recorded
        own = own_choice(family, outputs[layer][0][0])
        assert all(set(experts[place].tolist()) == own[place] for place in [*batch.native(), *batch.unread()])
        assert len(recorded) + len(batch.native()) + len(batch.unread()) == len(experts)
    assert bound.num_native == len(batch.native()) > 3
    assert bound.num_padding == len(batch.unread()) == 13
    metrics = replay.metrics()
    assert metrics["places/replayed"] == bound.num_replayed and metrics["places/padding"] == 13
    assert metrics["places/native (invalid)"] == bound.num_native


def test_rows_of_older_weights_are_the_trainers_own_choice():
    """Of each sequence those of its first three tokens."""
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    versions = [replace(one, weight_versions=((0, "7"), (3, "8"))) for one in batch.masks]
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        router_outputs(model) as outputs,
        replay.microbatch(versions, batch.layout, fresh=FreshWeights(["7", "8"], max_weight_lag=0)) as bound,
    ):
        logits_of(model, batch)
    old = [batch.place(row, place) for row, one in enumerate(batch.masks) for place in range(3) if one.valid[place]]
    for layer, (experts,) in seen.items():
        recorded = dict(batch.recorded(layer))
        own = own_choice(family, outputs[layer][0][0])
        assert all(set(experts[place].tolist()) == own[place] for place in [*old, *batch.native(), *batch.unread()])
        assert all(set(experts[place].tolist()) == recorded[place] for place in recorded.keys() - set(old))
    assert bound.native_causes["stale"] == replay.metrics()["places/native (stale)"] == len(old) > 4


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_every_implementation_of_experts_computes_the_recorded_ones(family, experts):
    """And gives what the plain loop over experts gives, to rounding."""
    model, batch = build(family, experts=experts), batch_of(family)
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        replay.microbatch(batch.masks, batch.layout),
    ):
        replayed = logits_of(model, batch)
    assert wrong_rows(seen, batch) == 0
    eager = build(family)
    with attach(eager, overlap_every=None) as replay, replay.microbatch(batch.masks, batch.layout):
        expected = logits_of(eager, batch)
    native = logits_of(eager, batch)
    # A hundred roundings of float32 on the way, some in another order; other experts are tens of per cent away.
    bound = 100 * 2.0**-24 * expected.abs().max()
    assert (replayed - expected).abs().max() < bound < 1e-3 * (expected - native).abs().max()


def test_left_padding():
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    width = batch.token_ids.shape[1]
    left = torch.zeros_like(batch.token_ids)
    for row, ids, length in zip(left, batch.token_ids, batch.lengths, strict=True):
        row[width - length :] = ids[:length]
    mask = attention_mask(batch).flip(1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(model, overlap_every=None) as replay:
        with replay.microbatch(batch.masks, batch.layout), replay.observe() as observed:
            right = logits_of(model, batch)
        layout = BatchLayout.padded(left, batch.lengths, side="left")
        with replay.microbatch(batch.masks, layout), replay.observe() as also_observed, computed_experts(model) as seen:
            logits = model(input_ids=left, attention_mask=mask, position_ids=positions, use_cache=False).logits
        replay.check()
    routes = zip(observed.indices(batch.layout), also_observed.indices(layout), strict=True)
    for expected, found in routes:
        assert torch.equal(expected[:-1].sort(-1).values, found[:-1].sort(-1).values)
    for sequence, (length, one, indices) in enumerate(zip(batch.lengths, batch.masks, batch.indices, strict=True)):
        for position in one.valid.nonzero().flatten().tolist():
            place = sequence * width + width - length + position
            assert set(seen[2][0][place].tolist()) == set(indices[position, 1].tolist())
        found, expected = logits[sequence, width - length :][:-1], right[sequence, : length - 1]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", PACKING)
def test_padded_and_packed_are_what_single_sequences_are(family):
    model, batch = build(family), batch_of(family, invalid=0.0)
    positions = torch.cat([torch.arange(length) for length in batch.lengths])[None]
    with attach(model, overlap_every=None) as replay, torch.no_grad():
        with replay.microbatch(batch.masks, batch.layout):
            padded = logits_of(model, batch)
        with replay.microbatch(batch.masks, batch.packed_layout), computed_experts(model) as seen:
            packed = model(input_ids=batch.packed_ids, position_ids=positions, use_cache=False).logits[0]
        replay.check()
        singles = []
        for ids, masks, length in zip(batch.token_ids, batch.masks, batch.lengths, strict=True):
            alone = ids[None, :length]
            with replay.microbatch([masks], BatchLayout.padded(alone, [length])):
                singles.append(model(input_ids=alone, use_cache=False).logits[0])
    starts = batch.cu_seqlens.tolist()
    for sequence, (single, length) in enumerate(zip(singles, batch.lengths, strict=True)):
        # Of what the last token computes nothing is read. Sums of at most 96 products in float32, in another order
        # in each of some twenty products of matrices on the way.
        bound = 20 * 96 * 2.0**-24 * single.abs().max()
        for found in (padded[sequence, : length - 1], packed[starts[sequence] : starts[sequence] + length - 1]):
            assert (found - single[:-1]).abs().max() < bound
        for position in range(length - 1):
            experts = seen[2][0][starts[sequence] + position]
            assert set(experts.tolist()) == set(batch.indices[sequence][position, -1].tolist())


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(PACKING)))
def test_packed_places_take_their_experts_where_attention_needs_other_kernels(family):
    model, batch = build(family), batch_of(family)
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        replay.microbatch(batch.masks, batch.packed_layout),
    ):
        model(input_ids=batch.packed_ids, use_cache=False)
    starts = batch.cu_seqlens.tolist()
    for index, layer in enumerate(seen):
        for start, one, indices in zip(starts[:-1], batch.masks, batch.indices, strict=True):
            for position in one.valid.nonzero().flatten().tolist():
                assert set(seen[layer][0][start + position].tolist()) == set(indices[position, index].tolist())


@families
def test_off_routes_as_stock(family):
    model, batch = build(family), batch_of(family)
    stock = logits_of(model, batch)
    with attach(model, overlap_every=None) as replay:
        with replay.off():
            native = logits_of(model, batch)
        with replay.microbatch(batch.masks, batch.layout):
            replayed = logits_of(model, batch)
    assert torch.equal(native, stock)
    assert not torch.equal(replayed, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("codec", ["ordered", "bitset"])
@families
def test_own_routes_replayed_change_nothing(family, codec, dtype):
    """Bit for bit, whether the codec keeps the columns of the router's choice or not."""
    model, batch = build(family, dtype=dtype), batch_of(family)
    with attach(model, overlap_every=None) as replay:
        with replay.off(), replay.observe() as observed:
            native = logits_of(model, batch)
        masks = [
            RoutingMasks.from_indices(
                routes, torch.ones(len(routes), dtype=torch.bool), start=0, geometry=replay.geometry, codec=codec,
                token_ids=ids,
            )
            for routes, ids in zip(observed.indices(_layout(batch)), batch.token_ids, strict=True)
        ]  # fmt: skip
        with replay.microbatch(masks, _layout(batch)) as bound:
            replayed = logits_of(model, batch)
    assert bound.num_replayed == bound.num_places == 36
    assert torch.equal(replayed, native)


def _layout(batch):
    """Every place is a token: what stands in padding would take other experts, and share products of matrices."""
    return BatchLayout.padded(batch.token_ids, [batch.token_ids.shape[1]] * 3)


@families
def test_recorded_routes_replayed_change_nothing(family):
    """R2, as it is bound on the rank that recorded, padding included."""
    model, batch = build(family), batch_of(family)
    with attach(model) as replay, torch.no_grad():
        with replay.record(batch.layout) as recorded:
            native = logits_of(model, batch)
        with replay.microbatch(recorded.routes) as bound, computed_experts(model) as seen:
            replayed = logits_of(model, batch)
        replay.check()
        assert replay.metrics()["overlap/recorded"] == 1
        masks = join_parts([recorded.part()])
    assert torch.equal(replayed, native)
    assert bound.num_native == 0
    for sequence, one in enumerate(masks):
        assert one.valid.all()
        for position in range(one.num_tokens):
            experts = seen[2][0][batch.place(sequence, position)]
            assert torch.equal(one.indices()[position, -1].long(), experts)


def test_two_replays_are_bound_apart():
    family = "olmoe"
    policy, reference, batch = build(family), build(family), batch_of(family)
    with (
        attach(policy, overlap_every=None) as first,
        attach(reference, overlap_every=None) as second,
        computed_experts(policy) as seen,
        first.microbatch(batch.masks, batch.layout),
        second.off(),
    ):
        logits_of(policy, batch)
        native = logits_of(reference, batch)
    assert wrong_rows(seen, batch) == 0
    assert torch.equal(native, logits_of(reference, batch))


def test_a_batch_of_masks_is_replayed_as_a_list_of_them_is():
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        replay.microbatch(RoutingMasksBatch.of(batch.masks), batch.layout),
    ):
        logits_of(model, batch)
    assert wrong_rows(seen, batch) == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_share_a_pack_take_their_part_of_it(rank):
    """Ulysses cuts a pack into equal runs before the model is called; attention, which is exchanged, is left away."""
    family = "qwen3_moe"
    model, batch = build(family), batch_of(family)
    part = batch.packed_ids[:, 13 * rank : 13 * (rank + 1)]
    shards = Shards(2, rank, "contiguous")
    with (
        attach(model, overlap_every=None) as replay,
        computed_experts(model) as seen,
        replay.microbatch(batch.masks, batch.packed_layout, shards=shards),
    ):
        model(input_ids=part, use_cache=False)
        replay.check()
    whole = batch.packed_layout
    for place in range(13):
        sequence, position = whole.sequence[13 * rank + place], whole.position[13 * rank + place]
        one = batch.masks[sequence]
        if position < one.num_tokens and one.valid[position]:
            expected = batch.indices[sequence][position, 0]
            assert set(seen[1][0][place].tolist()) == set(expected.tolist())


def test_the_text_model_of_a_composite_one():
    """Qwen3.5 beside its vision tower, called with token ids alone."""
    text = build("qwen3_5_moe").config.to_dict()
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "patch_size": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    model, batch = transformers.Qwen3_5MoeForConditionalGeneration(config), batch_of("qwen3_5_moe")
    inputs = {"input_ids": batch.token_ids, "attention_mask": attention_mask(batch), "use_cache": False}
    stock = model(**inputs).logits
    with attach(model, overlap_every=None) as replay:
        assert replay.geometry == geometry_of("qwen3_5_moe")
        with replay.off():
            assert torch.equal(model(**inputs).logits, stock)
        with replay.microbatch(batch.masks, batch.layout), replay.observe() as observed:
            model(**inputs)
        replay.check()
        assert "passes/input ids not seen" not in replay.metrics()
    for routes, one, indices in zip(observed.indices(batch.layout), batch.masks, batch.indices, strict=True):
        for position in one.valid.nonzero().flatten().tolist():
            assert torch.equal(routes[position].sort(-1).values, indices[position].sort(-1).values)
