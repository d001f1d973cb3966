"""Rows at their places, in any layout; and what is no microbatch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router_replay.errors import InputError, PairingError
from router_replay.masks import RoutingMasks, RoutingMasksBatch
from router_replay.replay import BatchLayout, MicrobatchRoutes, ObservedRoutes, place
from tests.router_replay.replay.batches import GEOMETRY, padded, recorded

CPU = torch.device("cpu")


def check(routes: MicrobatchRoutes, layout: BatchLayout, masks: list[RoutingMasks], indices: list[Tensor]) -> None:
    """Every place against its own token, one by one."""
    native = set(routes.own_places.tolist())
    replayed = padding = 0
    for layer_index, layer in enumerate(GEOMETRY.moe_layers):
        experts = routes.experts(layer)
        places = zip(layout.sequence.tolist(), layout.position.tolist(), strict=True)
        for at, (sequence, position) in enumerate(places):
            known = sequence >= 0 and position < masks[sequence].num_tokens and masks[sequence].valid[position]
            if sequence < 0 or (not known and position == layout.lengths[sequence] - 1):
                padding += 1
                assert len(set(experts[at].tolist())) == 3 and at not in native
            elif known:
                replayed += 1
                assert experts[at].tolist() == indices[sequence][position, layer_index].tolist()
                assert at not in native
            else:
                assert at in native
    assert (routes.num_replayed, routes.num_padding, routes.num_native) == (replayed // 2, padding // 2, len(native))
    assert routes.num_places == layout.num_places


LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000), st.sampled_from(["right", "left", "packed"]), st.data())
def test_every_place_has_its_own_tokens_experts(lengths, seed, kind, data):
    ids, masks, indices = recorded(lengths, seed)
    layout = BatchLayout.packed(torch.cat(ids), [0, *torch.tensor(lengths).cumsum(0).tolist()])
    if kind != "packed":
        layout = padded(ids, kind)
    check(place(masks, layout, GEOMETRY, CPU), layout, masks, indices)
    some = data.draw(st.permutations(range(layout.num_places)))[: data.draw(st.integers(0, layout.num_places))]
    part = layout.at([*some, -1])
    check(place(masks, part, GEOMETRY, CPU), part, masks, indices)


def zigzag(width: int, batch: int, ranks: int, rank: int) -> Tensor:
    """Places of a context-parallel rank: of 2 * ranks chunks of the sequence dimension its r-th from either end."""
    chunks = torch.arange(width * batch).view(2 * ranks, -1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]])


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000), st.sampled_from([1, 2, 4]))
def test_context_parallel_zigzag_is_an_index(lengths, seed, ranks):
    ids, masks, indices = recorded(lengths, seed)
    width = -(-max(*lengths, 1) // (2 * ranks)) * 2 * ranks
    layout = padded(ids, width=width)
    seen = []
    for rank in range(ranks):
        index = zigzag(width, len(ids), ranks, rank)
        part = layout.at(index)
        check(place(masks, part, GEOMETRY, CPU), part, masks, indices)
        seen += [place for place in zip(part.sequence.tolist(), part.position.tolist(), strict=True) if place[0] >= 0]
        # The first and the last chunk are the first rank's: positions from both ends of the padded width.
        positions = index // len(ids)
        assert positions.min() == rank * width // (2 * ranks)
        assert positions.max() == width - 1 - rank * width // (2 * ranks)
    assert sorted(seen) == [(number, position) for number, length in enumerate(lengths) for position in range(length)]


def test_padding_loads_all_experts_alike():
    ids, masks, _ = recorded([4, 2], 0)
    layout = padded(ids)
    # As many places that nothing reads as there are experts; the sequences' last tokens are two of them.
    part = layout.at((~layout.is_padding).nonzero().flatten().tolist() + [-1] * (GEOMETRY.num_experts - 2))
    routes = place(masks, part, GEOMETRY, CPU)
    assert routes.num_padding == GEOMETRY.num_experts
    for layer in GEOMETRY.moe_layers:
        unread = part.is_padding | (part.position == part.lengths[part.sequence] - 1)
        load = routes.experts(layer)[unread].flatten().bincount(minlength=GEOMETRY.num_experts)
        assert load.tolist() == [GEOMETRY.top_k] * GEOMETRY.num_experts


def test_padding_may_take_the_trainers_own():
    ids, masks, indices = recorded([4, 2], 0)
    layout = padded(ids)
    apart, own = (place(masks, layout, GEOMETRY, CPU, spread=spread) for spread in (True, False))
    check(apart, layout, masks, indices)
    unread = (layout.is_padding | (layout.position == layout.lengths[layout.sequence] - 1)).nonzero().flatten()
    assert own.num_padding == apart.num_padding == len(unread) == 4
    assert own.num_native == apart.num_native and own.native_causes == apart.native_causes
    assert sorted(own.own_places.tolist()) == sorted([*apart.own_places.tolist(), *unread.tolist()])


def test_observed_routes_go_back_to_their_tokens():
    ids, _, _ = recorded([3, 2], 0)
    layout = padded(ids).at([5, 4, 1, 0])
    observed = ObservedRoutes((1, 3))
    taken = {layer: torch.arange(12).view(4, 3) + 100 * layer for layer in (1, 3)}
    for layer, experts in taken.items():
        observed.record(layer, experts)
    first, second = observed.indices(layout)
    # Places 5, 4, 1, 0 of [S, B]: padding, token 2 of sequence 0, token 0 of sequence 1, token 0 of sequence 0.
    assert first[:, 0].tolist() == [[109, 110, 111], [-1, -1, -1], [103, 104, 105]]
    assert second[:, 1].tolist() == [[306, 307, 308], [-1, -1, -1]]
    with pytest.raises(PairingError, match="the observed pass had 4 places, the layout has 6"):
        observed.indices(padded(ids))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda masks: masks[0], "masks of a microbatch are a list, got a RoutingMasks alone: pass a list with one"),
        (lambda masks: None, "masks of a microbatch are a list, got None alone"),
        (lambda masks: {"store": "inline"}, "masks of a microbatch are a list, got a dict alone"),
        (lambda masks: [masks[0], {"store": "inline"}], "masks of sequence 1 are a dict: .*masks_from_meta_info"),
        (lambda masks: [masks[0], 3], "masks of sequence 1 are a int"),
    ],
)
def test_what_is_no_list_of_masks(wrong, message):
    ids, masks, _ = recorded([4, 5], 0)
    with pytest.raises(InputError, match=message):
        place(wrong(masks), padded(ids), GEOMETRY, CPU)


@pytest.mark.parametrize("wrong", [{"shards": 2}, {"fresh": ["v1"]}])
def test_what_is_no_part_and_no_list_of_weights(wrong):
    ids, masks, _ = recorded([4, 5], 0)
    with pytest.raises(InputError, match=f"{next(iter(wrong))} is .*, but must be a"):
        place(masks, padded(ids), GEOMETRY, CPU, **wrong)


def test_a_generator_of_masks_is_a_list_of_them():
    ids, masks, indices = recorded([4, 5], 0)
    layout = padded(ids)
    check(place((one for one in masks), layout, GEOMETRY, CPU), layout, masks, indices)


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 1000), st.data())
def test_a_batch_and_a_part_of_it_are_placed_as_a_list_is(lengths, seed, data):
    ids, masks, _ = recorded([*lengths, 5], seed)
    without = data.draw(st.sets(st.integers(0, len(lengths) - 1)))
    listed = [None if index in without else one for index, one in enumerate(masks)]
    first = data.draw(st.integers(0, len(lengths)))
    for part in (slice(None), slice(first, None)):
        layout = padded(ids[part])
        expected = place(listed[part], layout, GEOMETRY, CPU)
        found = place(RoutingMasksBatch.of(listed)[part], layout, GEOMETRY, CPU)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.own_places, expected.own_places) and torch.equal(found.sample, expected.sample)
        assert found.native_causes == expected.native_causes and found.fingerprint == expected.fingerprint
        assert (found.num_replayed, found.num_padding) == (expected.num_replayed, expected.num_padding)


def test_a_batch_of_other_sequences_is_refused():
    ids, masks, _ = recorded([4, 5, 4], 0)
    batch = RoutingMasksBatch.of(masks)
    with pytest.raises(PairingError, match="the layout has 3 sequences, masks were given for 2"):
        place(batch[1:], padded(ids), GEOMETRY, CPU)
    with pytest.raises(PairingError, match=r"masks of sequence 0: .* digest"):
        place(batch[::-1], padded(ids), GEOMETRY, CPU)


@pytest.mark.parametrize("layout", [None, torch.zeros(2, 5), [3, 4]])
def test_what_is_no_layout(layout):
    _, masks, _ = recorded([4, 5], 0)
    with pytest.raises(
        InputError, match=r"the layout of a microbatch is (None|a Tensor|a list): .*BatchLayout\.padded"
    ):
        place(masks, layout, GEOMETRY, CPU)


def test_a_batch_padded_on_the_other_side_is_told():
    ids, masks, _ = recorded([5, 4], 0)
    left = torch.stack([ids[0], torch.cat([ids[1].new_zeros(1), ids[1]])])
    place(masks, BatchLayout.padded(left, [5, 4], side="left"), GEOMETRY, CPU)
    with pytest.raises(PairingError, match=r'masks of sequence 1: .* digest .*BatchLayout\.padded\(.*side="left"\)'):
        place(masks, BatchLayout.padded(left, [5, 4]), GEOMETRY, CPU)


@pytest.mark.gpu
def test_token_ids_and_masks_of_a_device():
    ids, masks, indices = recorded([5, 4], 0)
    on_cpu = padded(ids)
    padded_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).cuda()
    layout = BatchLayout.padded(padded_ids, torch.tensor([5, 4], device="cuda"))
    assert torch.equal(layout.position, on_cpu.position) and torch.equal(layout.token_ids, on_cpu.token_ids)
    batch = RoutingMasksBatch.of(masks)
    for given_as in (masks, batch, batch.pin_memory().to("cuda", non_blocking=True)):
        routes = place(given_as, layout, GEOMETRY, torch.device("cuda"))
        assert routes.own_places.is_cuda and routes.experts(1).is_cuda
        check(routes, layout, masks, indices)


@pytest.mark.parametrize("layout", [None, torch.zeros(2, 5)])
def test_observed_routes_ask_for_a_layout(layout):
    with pytest.raises(InputError, match=r"the layout of a microbatch is (None|a Tensor): .*BatchLayout\.padded"):
        ObservedRoutes((1, 3)).indices(layout)
