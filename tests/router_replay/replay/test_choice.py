"""The experts of every place of one layer, without any trainer: recorded, spread, or chosen and then frozen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from router_replay.errors import PairingError
from router_replay.masks import RoutingMasks
from router_replay.replay import BatchLayout, MicrobatchRoutes, place
from router_replay.replay.binding import Frame, State
from router_replay.replay.choice import in_own_order, replayed_experts, replayed_or_own
from tests.router_replay.replay.batches import GEOMETRY, padded, recorded

CPU = torch.device("cpu")


def worst_first(scores: Tensor) -> Tensor:
    return scores.topk(3).indices.flip(1)


def never(scores: Tensor) -> Tensor:
    raise AssertionError("the trainer's own top-k was asked for")


@pytest.fixture
def routes() -> MicrobatchRoutes:
    ids, masks, _ = recorded([6, 3], 0)
    return place(masks, padded(ids), GEOMETRY, CPU)


@pytest.fixture
def scores(routes: MicrobatchRoutes) -> Tensor:
    return torch.randn(routes.num_places, GEOMETRY.num_experts, generator=torch.Generator().manual_seed(1))


def test_own_places_take_the_trainers_choice_best_first(routes, scores):
    experts = replayed_experts(routes, State(), 3, "router", scores.requires_grad_(), worst_first)
    native = set(routes.own_places.tolist())
    assert 2 <= len(native) < routes.num_places
    best, placed = scores.topk(3).indices, routes.experts(3)
    for at in range(routes.num_places):
        assert experts[at].tolist() == (best if at in native else placed)[at].tolist()


def test_the_choice_is_not_part_of_the_graph(routes, scores):
    def choose(of: Tensor) -> Tensor:
        assert not of.requires_grad
        return worst_first(of)

    replayed_experts(routes, State(), 1, "router", scores.requires_grad_(), choose)


def test_own_top_k_is_not_asked_for_where_every_place_has_a_row(scores):
    ids, _, indices = recorded([6, 3], 0)
    masks = [
        RoutingMasks.from_indices(
            each, torch.ones(len(each), dtype=torch.bool), start=0, geometry=GEOMETRY, codec="rank", token_ids=tokens
        )
        for each, tokens in zip(indices, ids, strict=True)
    ]
    # The last token of a sequence has no row, so it has no place here either.
    layout = BatchLayout.padded(torch.nn.utils.rnn.pad_sequence(ids, batch_first=True), [6, 3])
    part = layout.at(layout.position < layout.lengths[layout.sequence] - 1)
    routes = place(masks, part, GEOMETRY, CPU)
    experts = replayed_experts(routes, State(), 1, "router", scores[: routes.num_places], never)
    assert torch.equal(experts, routes.experts(1))


def test_a_checkpoint_keeps_the_choice_of_its_forward_pass(routes, scores):
    outer, inner = Frame(), Frame()
    first = replayed_experts(routes, State(frames=(outer,)), 1, "router", scores, worst_first)
    # The recompute of the outer checkpoint, in which an inner one runs its forward pass: nothing is chosen anew.
    again = replayed_experts(routes, State(frames=(outer, inner)), 1, "router", -scores, never)
    assert torch.equal(again, first)
    assert torch.equal(replayed_experts(routes, State(frames=(inner,)), 1, "router", -scores, never), first)
    native = routes.own_places
    other = replayed_experts(routes, State(frames=(outer, inner)), 1, "another router", -scores, worst_first)
    assert (other[native] != first[native]).any(1).all()


def test_another_number_of_places(routes, scores):
    message = "decoder layer 3 got 11 places, the layout of this microbatch has 12 on this rank: build the"
    with pytest.raises(PairingError, match=message):
        replayed_experts(routes, State(), 3, "router", scores[:-1], worst_first)


def test_own_experts_by_place_are_taken_as_they_stand(routes, scores):
    own = worst_first(scores)
    experts = replayed_or_own(routes, State(), 3, "router", own, lambda places: own.index_select(0, places))
    native, placed = set(routes.own_places.tolist()), routes.experts(3)
    assert native
    for at in range(routes.num_places):
        assert experts[at].tolist() == (own if at in native else placed)[at].tolist()


def test_columns_are_the_trainers_own_where_the_experts_are():
    experts = torch.tensor([[0, 1, 2], [0, 1, 3], [4, 5, 6], [0, 1, 2]])
    own = torch.tensor([[2, 0, 1], [3, 1, 2], [4, 5, 6], [0, 2, 1]])
    assert in_own_order(experts, own).tolist() == [[2, 0, 1], [0, 1, 3], [4, 5, 6], [0, 2, 1]]
