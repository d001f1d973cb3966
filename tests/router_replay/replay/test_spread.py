"""Rows of places whose experts do not matter: they load experts, expert-parallel ranks and layers alike."""

from __future__ import annotations

import pytest
import torch

from router_replay.masks import RoutingGeometry, get_codec
from router_replay.replay.spread import spread_rows

GEOMETRIES = {
    "128 choose 8": RoutingGeometry(4, (0, 1, 3), 128, 8),
    "8 choose 2": RoutingGeometry(2, (0, 1), 8, 2),
    "10 choose 3": RoutingGeometry(2, (1,), 10, 3),
    "4 choose 4": RoutingGeometry(1, (0,), 4, 4),
}


@pytest.mark.parametrize("codec", ["bitset", "rank", "ordered"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_expert_of_every_layer_is_chosen_equally_often(name, codec):
    geometry = GEOMETRIES[name]
    experts = get_codec(codec).unpack_indices(spread_rows(codec, geometry), geometry)
    for index in range(geometry.num_moe_layers):
        of_layer = experts[:, index]
        assert all(len(set(row)) == geometry.top_k for row in of_layer.tolist())
        load = of_layer.flatten().bincount(minlength=geometry.num_experts)
        assert load.tolist() == [geometry.top_k] * geometry.num_experts


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_experts_of_a_place_are_on_all_expert_parallel_ranks(ranks):
    geometry = GEOMETRIES["128 choose 8"]
    experts = get_codec("rank").unpack_indices(spread_rows("rank", geometry), geometry)
    rank_of = experts // (128 // ranks)
    assert all(len(set(row)) == ranks for row in rank_of.flatten(0, 1).tolist())


def test_layers_begin_with_other_experts():
    geometry = GEOMETRIES["128 choose 8"]
    experts = get_codec("rank").unpack_indices(spread_rows("rank", geometry), geometry)
    assert not any(torch.equal(experts[0, one], experts[0, other]) for one, other in ((0, 1), (1, 2), (0, 2)))
